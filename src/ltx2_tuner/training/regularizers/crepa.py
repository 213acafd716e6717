"""CREPA: frames of the video stream are drawn to what a teacher sees in the same and in neighbouring frames.

The teacher is a deeper block of the same forward pass, or DINOv2's features of the pixel frames, cached beforehand.
Legend: B batch, F/H/W latent frames, height, width, n tokens a frame, D width, P patches of a DINO frame.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltx2_tuner.devices import send
from ltx2_tuner.errors import UserError
from ltx2_tuner.training.regularizers.base import Regularizer, TensorGroups, Trained, Work
from ltx2_tuner.training.regularizers.options import DINO_WIDTHS, CrepaOptions
from ltx2_tuner.training.regularizers.projector import Projector, load_if_it_fits, read_tensors, seeded
from ltx2_tuner.training.regularizers.schedule import schedule_factor

logger = logging.getLogger(__name__)

PROJECTOR = "crepa_projector"
_EPS = 1e-12


class Crepa(Regularizer):
    """-similarity of projected student frames to the teacher's, neighbours weighted by exp(-distance / tau).

    Args:
        width: of the video stream inside the model.
        max_steps: optimizer steps of the run.
        learning_rate: of the projector.
        output_dir: where the projector is kept between runs.
    """

    metric = "loss/crepa"
    cost = "none"

    def __init__(
        self,
        options: CrepaOptions,
        *,
        width: int,
        seed: int,
        device: torch.device,
        autocast: Callable[[], contextlib.AbstractContextManager],
        max_steps: int,
        learning_rate: float,
        output_dir: Path,
    ) -> None:
        self.options = options
        self.autocast = autocast
        self.end = options.max_steps or max_steps
        self.learning_rate = learning_rate
        self._told_missing = False
        outputs = width if options.mode == "backbone" else DINO_WIDTHS[options.dino_model]
        self.projector = seeded(lambda: Projector(width, width, outputs, nn.GELU()), seed, PROJECTOR)
        kept = output_dir / f"{PROJECTOR}.safetensors"
        tensors = read_tensors(kept)
        if tensors is not None:
            load_if_it_fits(self.projector, tensors, str(kept))
        self.projector.to(device)

    def blocks(self) -> Collection[int]:
        options = self.options
        teacher = {options.teacher_block_idx} if options.mode == "backbone" else set()
        return {options.student_block_idx} | teacher

    def loss(self, work: Work) -> Tensor | None:
        options = self.options
        factor = schedule_factor(options.schedule, work.step, options.warmup_steps, self.end)
        strength = options.lambda_crepa * factor
        if strength == 0:
            return None
        student = work.hidden[options.student_block_idx]
        if options.mode == "backbone":
            teacher = work.hidden[options.teacher_block_idx].detach()
            similarity = self._frame_similarity(student, teacher, work.grid)
        else:
            features = work.batch["conditions"].get("dino_features")
            if features is None:
                self._tell_missing(work)
                return None
            similarity = self._patch_similarity(student, features, work.grid)
        return strength * alignment_loss(similarity, options.num_neighbors, options.tau)

    def _project(self, student: Tensor) -> Tensor:
        with self.autocast():
            return self.projector(student).float()

    def _frame_similarity(self, student: Tensor, teacher: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(B, F, F) similarities of frame means; student and teacher are (B, F * n, D)."""
        frames = grid[0]
        mine = self._project(student).unflatten(1, (frames, -1)).mean(dim=2)
        theirs = teacher.float().unflatten(1, (frames, -1)).mean(dim=2)
        return self._unit(mine) @ self._unit(theirs).transpose(1, 2)

    def _patch_similarity(self, student: Tensor, features: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(B, F, F) similarities patch by patch, averaged; features (B, pixel frames, P, D), on the host."""
        frames, height, width = grid
        count, patches = features.shape[1:3]
        side = math.isqrt(patches)
        index = [frame * (count - 1) // max(frames - 1, 1) for frame in range(frames)]
        # Of eight pixel frames one is compared: the others need not travel.
        picked = [send(features[:, place], student.device) for place in index]
        theirs = torch.stack(picked, dim=1).float()  # (B, F, P, D)
        mine = self._project(student).unflatten(1, (frames, height, width)).flatten(0, 1).permute(0, 3, 1, 2)
        mine = F.interpolate(mine, size=(side, side), mode="bilinear", align_corners=False)
        mine = mine.flatten(2).transpose(1, 2).unflatten(0, (-1, frames))  # (B, F, P, D)
        mine, theirs = self._unit(mine).flatten(2), self._unit(theirs).flatten(2)
        return mine @ theirs.transpose(1, 2) / patches

    def _unit(self, states: Tensor) -> Tensor:
        return F.normalize(states, dim=-1, eps=_EPS) if self.options.normalize else states

    def _tell_missing(self, work: Work) -> None:
        if not self._told_missing:
            self._told_missing = True
            items = ", ".join(work.batch["item_keys"])
            logger.warning("no DINO features for %s: CREPA leaves such batches out", items)

    def trained(self) -> list[Trained]:
        return [Trained(PROJECTOR, self.projector, self.learning_rate)]

    def state(self) -> TensorGroups:
        return {PROJECTOR: self.projector.state_dict()}

    output_files = state

    def load_state(self, groups: TensorGroups, folder: Path) -> None:
        if PROJECTOR in groups:
            load_if_it_fits(self.projector, groups[PROJECTOR], f"{folder.name}/{PROJECTOR}.safetensors")
        else:
            logger.warning("%s holds no %s: the projector is that of the output folder, or fresh", folder, PROJECTOR)


def alignment_loss(similarity: Tensor, neighbors: int, tau: float) -> Tensor:
    """Minus the weighted sum of similarities (B, F, F) of each student frame with its neighbours, per term."""
    frames = similarity.shape[-1]
    place = torch.arange(frames, device=similarity.device)
    distance = (place[:, None] - place).abs()
    near = distance <= neighbors
    weights = torch.exp(-distance / tau) * near
    terms = frames + sum(2 * (frames - k) for k in range(1, min(neighbors, frames - 1) + 1))
    return -(similarity * weights).sum(dim=(1, 2)).mean() / max(terms / frames, 1)


def check_features(options: CrepaOptions, headers: dict[str, tuple[dict[str, str], tuple[int, ...]]]) -> None:
    """Whether cached DINO features are those of the options' model.

    Args:
        headers: file name -> metadata and shape (frames, patches, width).

    Raises:
        UserError: no features, another model, or patches that are no square.
    """
    script = f"ltx2_cache_dino_features.py --dino_model {options.dino_model}"
    if not headers:
        raise UserError(f"--crepa_args mode=dino needs DINO features, but the caches hold none; run {script}")
    for name, (metadata, shape) in headers.items():
        made_with = metadata.get("dino_model", options.dino_model)
        if made_with != options.dino_model or shape[-1] != DINO_WIDTHS[options.dino_model]:
            raise UserError(
                f"{name}: features of {made_with} (width {shape[-1]}), but --crepa_args says "
                f"dino_model={options.dino_model}; give that model, or run {script}"
            )
        if len(shape) != 3 or math.isqrt(shape[1]) ** 2 != shape[1]:
            raise UserError(f"{name}: {list(shape)} is no grid of patches; run {script} again")
