"""DINOv2 features of the pixel frames of clips, cached beside their latents for CREPA's dino mode.

N pixel frames, H/W pixels, P patches, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ltx2_tuner.caching import run
from ltx2_tuner.caching.decoding import Failed
from ltx2_tuner.caching.latents import Group, protected_stems
from ltx2_tuner.caching.ledger import Ledger
from ltx2_tuner.caching.pictures import PictureTarget, decode_targets
from ltx2_tuner.caching.run import Journal
from ltx2_tuner.caching.workers import Workers
from ltx2_tuner.compat import prepare_torchaudio
from ltx2_tuner.data import cache_names
from ltx2_tuner.data.cache_files import NonFiniteError, write_dino
from ltx2_tuner.data.items import Item
from ltx2_tuner.data.metadata import latent_metadata
from ltx2_tuner.errors import UserError

logger = logging.getLogger(__name__)

SCRIPT = "dino"
SIDE, PATCH = 518, 14  # pixels
PATCHES = (SIDE // PATCH) ** 2
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DinoModel:
    """A DINOv2 variant: its name in the caches, the repository of its weights, and the width of its features."""

    name: str
    repository: str
    width: int


MODELS = {
    model.name: model
    for model in (
        DinoModel("dinov2_vits14", "facebook/dinov2-small", 384),
        DinoModel("dinov2_vitb14", "facebook/dinov2-base", 768),
        DinoModel("dinov2_vitl14", "facebook/dinov2-large", 1024),
        DinoModel("dinov2_vitg14", "facebook/dinov2-giant", 1536),
    )
}


@dataclass(frozen=True)
class DinoOptions:
    """What is written and what is kept. model_path: local folder of the weights, None for the hub. batch_size: frames
    a pass. strict: any failure counts."""

    model: DinoModel
    model_path: Path | None = None
    batch_size: int = 16
    skip_existing: bool = False
    keep_cache: bool = False
    ignore_disk_space: bool = False
    strict: bool = False


class DinoFeatures:
    """DINOv2 on a device, in float32.

    Raises:
        UserError: the weights cannot be had, or are of another variant.
    """

    def __init__(self, options: DinoOptions, device: torch.device) -> None:
        self.batch_size = options.batch_size
        self.device = device
        self.network = _load(options).to(device)
        self._mean, self._std = (torch.tensor(values, device=device)[:, None, None] for values in (_MEAN, _STD))

    @torch.no_grad()
    def encode(self, clip: np.ndarray) -> Tensor:
        """Features (N, P, D) float16 on the CPU of a clip, uint8 (N, H, W, 3)."""
        found = [self._encode(torch.from_numpy(frames)) for frames in run.batches(clip, self.batch_size)]
        return torch.cat(found)

    def _encode(self, frames: Tensor) -> Tensor:
        pixels = frames.to(self.device).permute(0, 3, 1, 2).float() / 255
        pixels = F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        states = self.network(pixel_values=(pixels - self._mean) / self._std).last_hidden_state
        return states[:, 1:].to("cpu", torch.float16)  # without the class token


def _load(options: DinoOptions) -> nn.Module:
    """The model of transformers, from a folder or the hub; only safetensors files are read."""
    prepare_torchaudio()
    from transformers import AutoConfig, Dinov2Model

    place, model = options.model_path or options.model.repository, options.model
    if options.model_path is not None and not options.model_path.is_dir():
        raise UserError(f"--dino_model_path {place}: there is no such folder")
    try:
        config = AutoConfig.from_pretrained(place)
        if config.model_type != "dinov2" or config.hidden_size != model.width or config.patch_size != PATCH:
            raise UserError(
                f"{place}: a {config.model_type} of width {getattr(config, 'hidden_size', None)}, but {model.name} is "
                f"a dinov2 of width {model.width} with patches of {PATCH}; give the folder of {model.repository}"
            )
        return Dinov2Model.from_pretrained(place, use_safetensors=True, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{place}: DINOv2 cannot be loaded ({str(error).splitlines()[0]}); give --dino_model_path, a folder with "
            f"config.json and model.safetensors of {model.repository}"
        ) from error


class DinoCaching:
    """One run over a dataset file.

    Args:
        groups: what `latents.scan` found.

    Raises:
        UserError: no clips, or clips without latents.
    """

    def __init__(self, groups: Sequence[Group], options: DinoOptions, workers: Workers, device: torch.device) -> None:
        self.options = options
        self.workers = workers
        self.device = device
        self.targets = {}
        for group in groups:
            clips = [item for item in group.items if item.kind == "video" and item.frames > 1]
            if clips:
                self.targets[group.tally.label] = [self._target(item) for item in clips]
            for item in group.items if clips else ():
                if item.frames <= 1:
                    group.tally.add("single frame", item.key)
        self.groups = [group for group in groups if group.tally.label in self.targets]
        if not self.groups:
            raise UserError("no clips of more than one frame: DINO features are of video datasets alone")

    def _target(self, item: Item) -> PictureTarget:
        metadata = latent_metadata(item, component_id="", preprocess={"dino_model": self.options.model.name})
        del metadata["component_id"]
        metadata |= {
            "dino_model": self.options.model.name,
            "dino_dim": str(self.options.model.width),
            "num_frames": str(item.frames),
            "num_patches": str(PATCHES),
        }
        return PictureTarget(
            key=item.key,
            path=item.dino_path,
            metadata=metadata,
            source=item.source.path,
            form=item.source.form,
            size=item.bucket,
            rate=item.rate,
            start=item.start,
            count=item.frames,
        )

    def sizes(self) -> dict[Path, int]:
        """Bytes by path of what a run that keeps nothing writes."""
        frame = 2 * PATCHES * self.options.model.width
        return {target.path: frame * target.count for targets in self.targets.values() for target in targets}

    def run(self) -> int:
        """Encode what is missing, remove orphans, print the summary.

        Returns:
            The exit status of the script.
        """
        self._check_latents()
        for group in self.groups:
            run.remove_leftovers(group.dataset.cache_directory)
        journal = Journal(self.groups[0].dataset.cache_directory, SCRIPT, self._settings())
        ledger = Ledger(journal, self.options.skip_existing)
        try:
            self._encode(ledger)
        finally:
            journal.close()
        for group in self.groups:
            self._remove_orphans(group)
        tallies = [group.tally for group in self.groups]
        run.write_reports(tallies, SCRIPT)
        journal.finish()
        for line in run.summary_lines(tallies):
            print(line)
        return run.exit_status(tallies, strict=self.options.strict)

    def _settings(self) -> dict[str, object]:
        targets = [[str(target.path), target.metadata] for targets in self.targets.values() for target in targets]
        place = None if self.options.model_path is None else str(self.options.model_path)
        return {"model": place, "skip_existing": self.options.skip_existing, "targets": targets}

    def _check_latents(self) -> None:
        items = [item for group in self.groups for item in group.items if item.kind == "video" and item.frames > 1]
        missing = [item.latent_path.name for item in items if not item.latent_path.is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(items)} clips have no latents ({', '.join(missing[:3])}"
                f"{', ...' if len(missing) > 3 else ''}); run ltx2_cache_latents.py with this dataset file first"
            )

    def _encode(self, ledger: Ledger) -> None:
        waiting: dict[str, list[PictureTarget]] = {}
        for group in self.groups:
            label = group.tally.label
            waiting[label] = [t for t in self.targets[label] if not ledger.keeps(t.path, t.metadata)]
            kept = len(self.targets[label]) - len(waiting[label])
            if kept:
                group.tally.counts["skipped (existing)"] += kept
        sizes = self.sizes()
        missing = {target.path: sizes[target.path] for targets in waiting.values() for target in targets}
        run.check_disk_space(missing, self.options.ignore_disk_space)
        if not missing:
            logger.info("all DINO features are up to date; the model is not loaded")
            return
        features = DinoFeatures(self.options, self.device)
        with tqdm(total=len(missing), unit="item", desc="dino", smoothing=0) as progress:
            for group in self.groups:
                for target, clip in decode_targets(waiting[group.tally.label], self.workers):
                    self._write(group, target, clip, features, ledger)
                    progress.update()

    def _write(
        self, group: Group, target: PictureTarget, clip: np.ndarray | Failed, features: DinoFeatures, ledger: Ledger
    ) -> None:
        if isinstance(clip, Failed):
            group.tally.fail(target.key, clip.reason)
            return
        try:
            write_dino(target.path, features.encode(clip), target.metadata)
        except NonFiniteError as error:
            group.tally.fail(target.key, str(error))
            return
        ledger.wrote(target.path)
        group.tally.add("encoded")

    def _remove_orphans(self, group: Group) -> None:
        members = [target.path for target in self.targets[group.tally.label]]
        owned = protected_stems(group)

        def belongs(name: str) -> bool:
            latent = name.removesuffix(cache_names.DINO_SUFFIX) + cache_names.LATENT_SUFFIX
            parsed = cache_names.parse_latent_name(latent, video=True)
            return parsed is not None and parsed.stem in owned

        directory = group.dataset.cache_directory
        orphans = run.find_orphans(directory, cache_names.DINO_SUFFIX, members, belongs)
        run.remove_orphans(orphans, self.options.keep_cache)
