"""A small world for latent caching: clips with sound, a dataset file, a tiny checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from ltx2_tuner.caching.run import read_metadata
from ltx2_tuner.checkpoint import write_tiny_checkpoint
from ltx2_tuner.cli import ltx2_cache_latents
from tests.media.zoo import make_clip, make_sound, numbered_frames, tone

RESOLUTION = (96, 64)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative name; the report lists runs and is left out."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "ltx2_cache_report.json"
    }


class World:
    """Everything lies below `folder`; `clips` holds the sources."""

    def __init__(self, folder: Path, checkpoint: Path | None = None) -> None:
        self.folder = folder
        self.clips = folder / "my clips, été [1]"
        self.cache = folder / "cache 影"
        self.clips.mkdir(parents=True, exist_ok=True)
        self.checkpoint = checkpoint or folder / "tiny.safetensors"
        if not self.checkpoint.exists():
            write_tiny_checkpoint(self.checkpoint)
        self.config = folder / "data.toml"

    def add_clip(self, name: str, frames: int = 20, *, caption: str | None = "a cat", seconds: float = 0.0, **options):
        """A clip of numbered frames, with a tone of `seconds` where wanted."""
        sound = tone(48000, seconds) if seconds else None
        path = make_clip(self.clips / name, numbered_frames(frames), sound=sound, **options)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    def add_sound(self, name: str, seconds: float, rate: int = 16000):
        path = make_sound(self.clips / name, tone(rate, seconds, 1), rate, "pcm_s16le", "mono")
        path.with_suffix(".txt").write_text("a hum", encoding="utf-8")
        return path

    def configure(self, source: str = "video_directory", cache: Path | None = None, **options: object) -> World:
        """Write the dataset file; `options` are TOML options of the one dataset."""
        values = {
            "resolution": list(RESOLUTION),
            source: self.clips,
            "cache_directory": cache or self.cache,
            **options,
        }
        lines = [f"{name} = {_toml(value)}" for name, value in values.items()]
        self.config.write_text("\n".join(["[[datasets]]", *lines]), encoding="utf-8")
        return self

    def arguments(self, *extra: object, mode: str = "video") -> list[str]:
        fixed = ["--dataset_config", self.config, "--ltx2_checkpoint", self.checkpoint, "--ltx2_mode", mode]
        fixed += ["--device", "cpu", "--vae_dtype", "float32", "--ltx2_audio_dtype", "float32", "--num_workers", 0]
        return [str(value) for value in (*fixed, *extra)]

    def run(self, *extra: object, mode: str = "video") -> int:
        """Run the script in this process."""
        torch.set_num_threads(1)
        return ltx2_cache_latents.main(self.arguments(*extra, mode=mode))

    def names(self, folder: Path | None = None) -> list[str]:
        """Cache files, without the common end of their names."""
        found = sorted((folder or self.cache).glob("*_ltx2*.safetensors"))
        return [path.name.replace("_0096x0064", "").removesuffix(".safetensors") for path in found]

    def metadata(self, name: str, folder: Path | None = None) -> dict[str, str]:
        """Metadata of the cache file whose name starts like this."""
        (path,) = (folder or self.cache).glob(f"{name}.safetensors")
        return read_metadata(path)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return str(value) if isinstance(value, int | float) else f"'{value}'"
