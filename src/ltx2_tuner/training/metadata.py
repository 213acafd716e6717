"""The strings that a saved LoRA says about itself. No path, user name or token is among them."""

from __future__ import annotations

import datetime
import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ltx2_tuner.version import toolkit_version

if TYPE_CHECKING:
    from ltx2_tuner.training.options import DrawOptions, LoopOptions
    from ltx2_tuner.training.sources import Sources, TrainingConfig

# What --no_metadata keeps besides the modelspec block and the hashes.
_MINIMAL = (
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
_IMPLEMENTATION = "https://github.com/Lightricks/LTX-Video"


@dataclass(frozen=True)
class MetadataOptions:
    """comment: --training_comment. minimal: --no_metadata. modelspec: typed --metadata_* by field name."""

    comment: str | None = None
    minimal: bool = False
    modelspec: Mapping[str, str] = field(default_factory=dict)


class RunMetadata:
    """Makes the metadata of each saved file of a run.

    facts: `ss_*` values known at the start, without the prefix.
    """

    def __init__(
        self,
        options: MetadataOptions,
        facts: Mapping[str, object],
        *,
        output_name: str,
        timestep_range: tuple[int, int] | None = None,
    ) -> None:
        self._options = options
        self._output_name = output_name
        self._timestep_range = timestep_range
        self._facts = {f"ss_{key}": value for key, value in facts.items()}
        self._facts["ss_training_started_at"] = time.time()
        self._facts["ss_training_comment"] = options.comment
        self._facts["ss_toolkit_version"] = toolkit_version()

    def at(self, step: int, epoch: int) -> dict[str, str]:
        """Metadata of a file saved after `step` optimizer steps in `epoch`; all values are strings."""
        facts = {
            **self._facts,
            "ss_steps": step,
            "ss_epoch": epoch,
            "ss_training_finished_at": time.time(),
        }
        factor = facts.get("ss_reference_downscale_factor")
        if self._options.minimal:
            facts = {key: value for key, value in facts.items() if key in _MINIMAL}
        if factor is not None:  # under the names that official inference tools read
            facts |= {"reference_downscale_factor": factor, "reference_spatial_scale_factor": factor}
        return {key: _text(value) for key, value in {**facts, **self._modelspec()}.items()}

    def _modelspec(self) -> dict[str, str]:
        typed = dict(self._options.modelspec)
        block = {
            "sai_model_spec": "1.0.0",
            "architecture": typed.pop("arch", "LTX2/lora"),
            "implementation": _IMPLEMENTATION,
            "title": typed.pop("title", None) or self._output_name or f"LoRA@{time.time()}",
            "date": datetime.datetime.now().isoformat(timespec="seconds"),
            "resolution": typed.pop("reso", "1280x720"),
            **typed,
        }
        if self._timestep_range is not None:
            low, high = self._timestep_range
            block["timestep_range"] = f"{low},{high}"
        return {f"modelspec.{key}": value for key, value in block.items()}


def _text(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def training_facts(
    config: TrainingConfig, sources: Sources, draws: DrawOptions, optimizer: str, loop: LoopOptions, batches: int
) -> dict[str, object]:
    """What is known of a run at its start, by `ss_` key without that prefix.

    Args:
        optimizer: class and arguments as text.
        batches: batches of an epoch in one process.
    """
    network, sampler, memory, precision = config.network, draws.sampler, config.memory, config.precision
    steps_per_epoch = -(-batches // loop.accumulation)
    facts = {
        "session_id": uuid.uuid4().hex,
        "output_name": config.save.output_name,
        "seed": loop.seed,
        "sd_model_name": config.checkpoint.name,
        "base_model_version": "ltx2_v1",
        "ltx2_mode": config.mode,
        "ltx_version": sources.version,
        # data
        "num_train_items": sum(len(found.items) * found.dataset.num_repeats for found in sources.training.inventories),
        "num_batches_per_epoch": batches,
        "num_epochs": -(-loop.max_steps // steps_per_epoch),
        "max_train_steps": loop.max_steps,
        "datasets": [_dataset(found.dataset, len(found.items)) for found in sources.training.inventories],
        # optimisation
        "learning_rate": config.optimizer.learning_rate,
        "audio_lr": config.optimizer.audio_learning_rate,
        "lr_args": dict(config.optimizer.lr_args),
        "lr_scheduler": config.scheduler.custom_class or config.scheduler.name,
        "lr_warmup_steps": config.scheduler.warmup,
        "optimizer": optimizer,
        "max_grad_norm": config.optimizer.max_grad_norm,
        "gradient_accumulation_steps": loop.accumulation,
        "gradient_checkpointing": bool(memory.checkpointing),
        "gradient_checkpointing_cpu_offload": memory.checkpoint_offload,
        "mixed_precision": config.mixed_precision,
        "full_fp16": str(config.adapter_dtype) == "torch.float16",
        "full_bf16": str(config.adapter_dtype) == "torch.bfloat16",
        "fp8_base": precision.weights.kind == "fp8",
        "nf4_base": precision.weights.kind == "nf4",
        "loftq_init": bool(precision.loftq_rank),
        "awq_calibration": precision.awq_alpha is not None,
        # network
        "network_module": network.module,
        "network_dim": network.dim,
        "network_alpha": network.alpha,
        "network_dropout": network.dropout,
        "lora_target_preset": network.preset,
        # noise levels
        "weighting_scheme": "none",
        "timestep_sampling": sampler.sampling,
        "logit_mean": 0.0,
        "logit_std": sampler.std,
        "mode_scale": 1.29,
        "sigmoid_scale": 1.0,
        "discrete_flow_shift": 1.0,
        "guidance_scale": 3.0,
        "shifted_logit_mode": sampler.mode,
        "shifted_logit_eps": sampler.eps,
        "shifted_logit_uniform_prob": sampler.uniform_prob,
    }
    if network.args:
        facts["network_args"] = dict(network.args)
    if network.base_weights:
        facts["base_weights"] = [[path.name, multiplier] for path, multiplier in network.base_weights]
    return facts | _reference_facts(config)


def _reference_facts(config: TrainingConfig) -> dict[str, object]:
    if config.slider is not None:
        return dict(config.slider)
    if config.strategy == "none":
        return {}
    facts: dict[str, object] = {"ic_lora_strategy": config.strategy}
    if config.strategy == "v2v":
        facts["v2v_training"] = True
        if config.modes.reference_downscale != 1:
            facts["reference_downscale_factor"] = config.modes.reference_downscale
    else:
        facts["audio_ref_ic_training"] = True
        if config.modes.audio_reference.negative_positions:
            facts["audio_ref_use_negative_positions"] = True
    return facts


def _dataset(dataset, items: int) -> dict[str, object]:
    return {
        "kind": dataset.kind,
        "items": items,
        "resolution": list(dataset.resolution),
        "batch_size": dataset.batch_size,
        "num_repeats": dataset.num_repeats,
        "target_fps": dataset.target_fps,
        "target_frames": list(dataset.target_frames),
        "frame_extraction": dataset.frame_extraction,
    }
