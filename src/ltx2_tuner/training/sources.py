"""What a training run is told and what it reads from: its checkpoint and caches, checked before any weight is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ltx2_tuner.checkpoint import Checkpoint, SafetensorsFile, check_version, component_id
from ltx2_tuner.checkpoint.precision import PrecisionOptions
from ltx2_tuner.checkpoint.precision import check as check_precision
from ltx2_tuner.data.batches import BatchOptions, TrainingData, ValidationData
from ltx2_tuner.data.config import DatasetConfig
from ltx2_tuner.data.fingerprints import ExpectedCaches, check_caches
from ltx2_tuner.errors import UserError
from ltx2_tuner.lora.options import NetworkOptions
from ltx2_tuner.memory.options import CompileOptions, MemoryOptions
from ltx2_tuner.memory.prepare import check_streamed
from ltx2_tuner.memory.sharding import Peers
from ltx2_tuner.models.transformer import TransformerConfig
from ltx2_tuner.models.transformer.attention_backends import attention_function
from ltx2_tuner.sampling.options import is_distilled
from ltx2_tuner.training.metadata import MetadataOptions
from ltx2_tuner.training.modes import ModeOptions
from ltx2_tuner.training.optimizers import OptimizerOptions
from ltx2_tuner.training.options import (
    DrawOptions,
    LogOptions,
    LoopOptions,
    LossOptions,
    SampleOptions,
    SaveOptions,
    ValidationOptions,
)
from ltx2_tuner.training.regularizers import RegularizerOptions
from ltx2_tuner.training.regularizers.build import check_regularizers
from ltx2_tuner.training.schedulers import SchedulerOptions
from ltx2_tuner.training.state import read_manifest
from ltx2_tuner.training.upload import UploadOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processes:
    """Where this process runs. wait: all processes meet there. peers: those of this machine.

    device: a GPU has its number, whatever the launcher calls it.
    """

    device: torch.device
    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None
    peers: Peers = field(default_factory=Peers)

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class TrainingConfig:
    """Everything a run is told, as the command line parsed it.

    draws.sampler.mode `auto` follows the checkpoint's version. mixed_precision: `no`, `fp16` or `bf16`. slider: facts
    of a slider for the metadata, None for other runs.
    """

    checkpoint: Path
    mode: str
    data: DatasetConfig
    network: NetworkOptions
    optimizer: OptimizerOptions
    scheduler: SchedulerOptions
    loop: LoopOptions
    save: SaveOptions
    strategy: str = "none"
    version: str | None = None
    version_check: str = "warn"
    cache_check: str = "error"
    audio_only_model: bool = False
    dtype: torch.dtype = torch.bfloat16
    mixed_precision: str = "no"
    adapter_dtype: torch.dtype = torch.float32
    precision: PrecisionOptions = field(default_factory=PrecisionOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    compilation: CompileOptions = field(default_factory=CompileOptions)
    batches: BatchOptions = field(default_factory=BatchOptions)
    workers: int = 0
    persistent_workers: bool = True
    modes: ModeOptions = field(default_factory=ModeOptions)
    draws: DrawOptions = field(default_factory=DrawOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    regularizers: RegularizerOptions = field(default_factory=RegularizerOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    samples: SampleOptions = field(default_factory=SampleOptions)
    logs: LogOptions = field(default_factory=LogOptions)
    metadata: MetadataOptions = field(default_factory=MetadataOptions)
    slider: Mapping[str, object] | None = None
    upload: UploadOptions | None = None
    resume: Path | None = None
    autoresume: bool = False

    @property
    def trained_mode(self) -> str:
        """The mode whose layers are trained: sliders train the picture alone, whatever previews make."""
        return self.mode if self.slider is None else "video"


@dataclass
class Sources:
    """What is known before any weight is read: the checkpoint's header and the caches."""

    checkpoint: Checkpoint
    version: str
    model: TransformerConfig
    training: TrainingData
    validation: ValidationData | None


def open_sources(config: TrainingConfig, processes: Processes) -> Sources:
    """Open the checkpoint's header and the caches, and check that they fit each other.

    Raises:
        UserError: what does not fit, and the command or flag that mends it.
    """
    checkpoint, version, model = open_checkpoint(config, processes)
    training = TrainingData(config.data, config.loop.seed, config.batches)
    check_regularizers(config.regularizers, config.strategy, model.num_layers, training.inventories)
    validation = None
    if config.validation.wanted:
        validation = ValidationData(config.data, replace(config.batches, dino=False))
    if config.data.validation and validation is None:
        logger.info("validation datasets are not used without --validate_every_n_steps or _epochs")
    inventories = [*training.inventories, *(validation.inventories if validation else [])]
    check_caches(inventories, expected_caches(checkpoint, model, config), config.cache_check)
    return Sources(checkpoint, version, model, training, validation)


def open_checkpoint(config: TrainingConfig, processes: Processes) -> tuple[Checkpoint, str, TransformerConfig]:
    """The checkpoint with its header read and checked against the run, the version, and the transformer's sizes.

    Raises:
        UserError: what does not fit, and the flag that mends it.
    """
    _check_files(config)
    if config.memory.shard_base and processes.peers.count < 2:
        raise UserError(
            "--shard_base spreads the base over the processes of a machine, and there is one alone; start several with "
            "accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2, or drop it"
        )
    checkpoint = Checkpoint.open(config.checkpoint)
    version = check_version(checkpoint, config.version, config.version_check)
    logger.info("%s is an LTX-%s checkpoint", checkpoint.path.name, checkpoint.version)
    if is_distilled(checkpoint.path):
        message = f"{checkpoint.path.name} is a distilled checkpoint, which adapters should not be trained on"
        if config.version_check == "error":
            raise UserError(f"{message}; give the full one")
        logger.warning(message)
    on_cuda = processes.device.type == "cuda"
    device_memory = torch.cuda.get_device_properties(processes.device).total_memory if on_cuda else None
    check_precision(checkpoint, config.precision, device_memory=device_memory)
    try:
        model = TransformerConfig.from_dict(checkpoint.config.get("transformer", {}))
    except ValueError as error:
        raise UserError(f"{checkpoint.path}: {error}; give an LTX-2 or LTX-2.3 file") from error
    check_streamed(model.num_layers, config.memory.blocks_to_swap)
    return checkpoint, version, model


def _check_files(config: TrainingConfig) -> None:
    """What is cheap to find out now and would be a pity to find out after minutes of loading.

    Raises:
        UserError: the attention package, the state or a LoRA file cannot be used.
    """
    attention_function(config.memory.attention)
    if config.resume is not None:
        read_manifest(config.resume)
    for path in (config.network.weights, *(path for path, _ in config.network.base_weights)):
        if path is not None and path.suffix == ".safetensors":
            SafetensorsFile(path).close()


def expected_caches(checkpoint: Checkpoint, model: TransformerConfig, config: TrainingConfig) -> ExpectedCaches:
    """What the caches of a run must have been made with."""
    mode = config.mode
    return ExpectedCaches(
        mode=mode,
        video_encoder=component_id(checkpoint, "video_encoder") if mode != "audio" else None,
        audio_encoder=component_id(checkpoint, "audio_encoder") if mode != "video" else None,
        text=component_id(checkpoint, "text"),
        video_width=model.context_width("video") if mode != "audio" else None,
        audio_width=model.context_width("audio") if mode != "video" else None,
        latent_channels=model.in_channels,
        reference_downscale=config.modes.reference_downscale if config.strategy == "v2v" else None,
    )
