"""A small dataset with a tiny checkpoint and a tiny Gemma, and the text script run over it in this process."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ltx2_tuner.checkpoint import SafetensorsFile, write_tiny_checkpoint
from ltx2_tuner.cli import ltx2_cache_text_encoder_outputs as script
from ltx2_tuner.text_encoding import write_tiny_gemma, write_tiny_gemma_file

CAPTIONS = ["a cat walks", "the wind in the trees", "a cat walks", "", "two people talk", "a red fox, soft light"]


@dataclass(frozen=True)
class Models:
    """Files that never change; made once a session."""

    checkpoint: Path
    other_checkpoint: Path
    old_checkpoint: Path
    gemma: Path
    gemma_fp8: Path


def make_models(folder: Path) -> Models:
    """Write the model files into `folder`."""
    models = Models(
        *(folder / name for name in ("a.safetensors", "b.safetensors", "c.safetensors", "gemma", "fp8.safetensors"))
    )
    write_tiny_checkpoint(models.checkpoint)
    write_tiny_checkpoint(models.other_checkpoint, seed=1)
    write_tiny_checkpoint(models.old_checkpoint, version="2.0")
    write_tiny_gemma(models.gemma)
    write_tiny_gemma_file(models.gemma_fp8, fp8=True)
    return models


@dataclass(frozen=True)
class World:
    """One dataset of pictures `p0.png`... in `root/sources`, caches in `root/cache`."""

    root: Path
    models: Models

    @property
    def sources(self) -> Path:
        return self.root / "sources"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def config(self) -> Path:
        return self.root / "data set.toml"

    def create(
        self, captions: list[str] = CAPTIONS, extra: str = "", suffix: str = ".png", key: str = "image"
    ) -> World:
        """Write sources (empty files, nothing decodes them), captions and the dataset file."""
        self.sources.mkdir(parents=True)
        for index, caption in enumerate(captions):
            (self.sources / f"p{index}{suffix}").touch()
            (self.sources / f"p{index}.txt").write_text(caption, encoding="utf-8")
        table = f"{key}_directory = {json.dumps(str(self.sources))}\ncache_directory = {json.dumps(str(self.cache))}\n"
        general = '[general]\nresolution = [64, 64]\ncaption_extension = ".txt"\nbatch_size = 2\n'
        self.config.write_text(f"{general}[[datasets]]\n{table}{extra}", encoding="utf-8")
        return self

    def arguments(self, *more: object, mode: str = "av") -> list[str]:
        """The flags of a plain run."""
        flags = {
            "dataset_config": self.config,
            "ltx2_checkpoint": self.models.checkpoint,
            "gemma_root": self.models.gemma,
            "ltx2_mode": mode,
            "mixed_precision": "bf16",
            "device": "cpu",
        }
        return [str(token) for name, value in flags.items() for token in (f"--{name}", value)] + [*map(str, more)]

    def run(self, *more: object, mode: str = "av") -> int:
        """Exit status of the script."""
        return script.main(self.arguments(*more, mode=mode))

    def text(self, index: int) -> Path:
        return self.cache / f"p{index}_ltx2_te.safetensors"

    def metadata(self, index: int) -> dict[str, str]:
        with SafetensorsFile(self.text(index)) as file:
            return file.metadata

    def report(self) -> dict:
        return json.loads((self.cache / "ltx2_cache_report.json").read_text(encoding="utf-8"))["text"]


def digests(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file of a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
