"""Makes the regularizers of a run, and checks them before any weight is read."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ltx2_tuner.data.cache_files import read_header
from ltx2_tuner.data.inventory import Inventory
from ltx2_tuner.errors import UserError
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.training.modes import AVMode, Mode
from ltx2_tuner.training.regularizers.audio_dop import AudioDop, silent_mode
from ltx2_tuner.training.regularizers.base import Regularizer, Regularizers
from ltx2_tuner.training.regularizers.crepa import Crepa, check_features
from ltx2_tuner.training.regularizers.options import CrepaOptions, PreservationOptions, RegularizerOptions
from ltx2_tuner.training.regularizers.passes import Passes
from ltx2_tuner.training.regularizers.preservation import PriorDivergence, PromptPreservation
from ltx2_tuner.training.regularizers.prompts import PreservationPrompts
from ltx2_tuner.training.regularizers.self_flow import SelfFlow
from ltx2_tuner.training.silence import find_silence

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """What regularizers need to know of the run they join.

    steps: optimizer steps of the whole run. cache_directory: of the first dataset, where encoded silence is looked for.
    """

    model: LTXTransformer
    network: nn.Module
    mode: Mode
    device: torch.device
    autocast: Callable[[], contextlib.AbstractContextManager]
    seed: int
    steps: int
    learning_rate: float
    output_dir: Path
    cache_directory: Path


def check_regularizers(
    options: RegularizerOptions, strategy: str, depth: int, inventories: Sequence[Inventory]
) -> None:
    """Whether the model and the caches are fit for the options.

    Args:
        strategy: settled --ic_lora_strategy.
        depth: number of transformer blocks.

    Raises:
        UserError: a block that the model lacks, references with Self-Flow, or DINO features that are missing or of
            another model.
    """
    crepa, self_flow = options.crepa, options.self_flow
    if crepa is not None:
        _check_depth("--crepa_args", depth, crepa.last_block)
        if crepa.mode == "dino":
            _check_features(crepa, inventories)
    if self_flow is not None:
        if strategy == "v2v":
            raise UserError("--self_flow is not supported with reference tokens; drop it or --ic_lora_strategy v2v")
        student, teacher = self_flow.blocks(depth)
        _check_depth("--self_flow_args", depth, student, teacher)
        if teacher <= student:
            raise UserError(
                f"--self_flow_args: the teacher block {teacher} must be deeper than the student block {student} "
                f"(of {depth}); raise teacher_block_ratio or lower student_block_ratio"
            )


def _check_depth(flag: str, depth: int, *blocks: int) -> None:
    for block in blocks:
        if not 0 <= block < depth:
            raise UserError(f"{flag}: block {block} does not exist, the model's blocks are 0 to {depth - 1}")


def _check_features(options: CrepaOptions, inventories: Sequence[Inventory]) -> None:
    items = [item for inventory in inventories for item in inventory.items]
    headers = [read_header(item.dino_path) for item in items if item.dino_path is not None]
    check_features(options, {header.path.name: (dict(header.metadata), header.shape) for header in headers})
    if len(headers) < len(items):
        missing = len(items) - len(headers)
        logger.warning("%d of %d items have no DINO features: CREPA leaves their batches out", missing, len(items))


def make_regularizers(
    options: RegularizerOptions, setting: Setting, prompts: PreservationPrompts | None = None
) -> Regularizers:
    """The regularizers of a run; one line tells what they cost.

    Args:
        prompts: embeddings of the preservation prompts, where the options need any.
    """
    passes = Passes(setting.model, setting.network, setting.autocast)
    config = setting.model.config
    members: list[Regularizer] = []
    common = {"width": config.video_width, "seed": setting.seed, "device": setting.device}
    common["learning_rate"] = setting.learning_rate
    # Self-Flow comes first: the others see the inputs that it makes.
    if options.self_flow is not None:
        blocks = options.self_flow.blocks(config.num_layers)
        members.append(SelfFlow(options.self_flow, passes, blocks=blocks, **common))
    if options.crepa is not None:
        members.append(
            Crepa(
                options.crepa,
                autocast=setting.autocast,
                max_steps=setting.steps,
                output_dir=setting.output_dir,
                **common,
            )
        )
    members += _preservation(options.preservation, setting, passes, prompts)
    if members:
        costs = "; ".join(f"{member.metric.removeprefix('loss/')} {member.cost}" for member in members)
        logger.info("extra passes a micro-batch: %s", costs)
    return Regularizers(members, passes)


def _preservation(
    options: PreservationOptions, setting: Setting, passes: Passes, prompts: PreservationPrompts | None
) -> list[Regularizer]:
    members: list[Regularizer] = []
    if options.prior_divergence is not None:
        members.append(PriorDivergence(passes, options.prior_divergence))
    if options.blank is not None:
        blank = prompts.blank.placed(setting.device)
        members.append(PromptPreservation("loss/blank_pres", passes, blank, options.blank))
    if options.dop is not None:
        members.append(PromptPreservation("loss/dop", passes, prompts.dop.placed(setting.device), options.dop))
    if options.audio_dop is not None and isinstance(setting.mode, AVMode):
        silence = find_silence(setting.cache_directory, setting.mode.options.audio_width)
        members.append(AudioDop(passes, silent_mode(setting.mode, silence), options.audio_dop))
    if options.needs_prompts and isinstance(setting.mode, AVMode) and not prompts.has_sound:
        logger.warning(
            "the preservation prompts have no sound embeddings, so the picture alone is preserved; run "
            "ltx2_cache_text_encoder_outputs.py --ltx2_mode av --precache_preservation_prompts for both"
        )
    return members
