"""Makes a training run from its opened sources: the arranged weights, then the parts of the loop around them."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ltx2_tuner.checkpoint import Checkpoint
from ltx2_tuner.checkpoint.precision import PrecisionOptions, effective_format
from ltx2_tuner.data.batches import TrainingData, ValidationData
from ltx2_tuner.lora.build import optimizer_groups
from ltx2_tuner.training.arrange import MIXED_PRECISION, Arranged, arrange
from ltx2_tuner.training.balance import AudioBalancer
from ltx2_tuner.training.footprint import largest_batch, moment_bytes, plan_memory, settled
from ltx2_tuner.training.guard import NonFiniteGuard
from ltx2_tuner.training.loftq import LoftQStart
from ltx2_tuner.training.logs import Trackers
from ltx2_tuner.training.loop import Trainer
from ltx2_tuner.training.metadata import RunMetadata, training_facts
from ltx2_tuner.training.modes import MODES, Compute, Mode
from ltx2_tuner.training.modes.streams import Text
from ltx2_tuner.training.network import trained_parameters
from ltx2_tuner.training.optimizers import create_optimizer, describe_optimizer, optimizer_path, scheduler_warnings
from ltx2_tuner.training.options import DrawOptions, LoopOptions
from ltx2_tuner.training.random import seed_default_generators
from ltx2_tuner.training.regularizers.base import Regularizers
from ltx2_tuner.training.regularizers.build import Setting, make_regularizers
from ltx2_tuner.training.regularizers.prompts import PreservationPrompts, Prompt
from ltx2_tuner.training.rehearsal import rehearse
from ltx2_tuner.training.run import Run, Sampler
from ltx2_tuner.training.saver import RunSaver
from ltx2_tuner.training.saving import check_free_disk
from ltx2_tuner.training.schedulers import create_scheduler
from ltx2_tuner.training.silence import find_silence
from ltx2_tuner.training.sources import Processes, Sources, TrainingConfig
from ltx2_tuner.training.state import newest_state, remove_leftovers
from ltx2_tuner.training.supervision import AudioMonitor, audio_plan
from ltx2_tuner.training.upload import Uploader
from ltx2_tuner.training.validation import Validator
from ltx2_tuner.training.window import Gradients, LossScaler, mean_over_ranks

logger = logging.getLogger(__name__)


def build(
    config: TrainingConfig,
    processes: Processes,
    sources: Sources,
    trackers: Trackers,
    sampler: Sampler | None = None,
    make_trainer: Callable[[Run], Trainer] = Trainer,
    prompts: PreservationPrompts | None = None,
    blank: Prompt | None = None,
) -> Trainer:
    """Load the weights and make the trainer, resumed where the configuration asks for it.

    Args:
        sampler: makes previews; its prompts are encoded already, so that Gemma and the transformer never meet.
        prompts: embeddings of the preservation prompts, where the regularizers need any.
        blank: the empty prompt, where dropped captions become it and not zeros.
    """
    device = processes.device
    seed_default_generators(config.loop.seed, processes.rank)
    config = replace(config, precision=_settle_precision(config, sources.checkpoint, device))
    plan = plan_memory(config, sources, processes)
    config = settled(config, plan)
    arranged = arrange(config, sources, processes, plan, stays=not getattr(sampler, "offloads", False))
    trainer = make_trainer(_make_run(config, processes, sources, trackers, arranged, sampler, prompts, blank))
    _resume(config, trainer)
    trainer.start_loading()
    if plan is not None:
        rehearse(trainer, _largest(config, sources, trainer), arranged.arrangement, config.optimizer.type)
    logger.info("%s", _length_line(trainer, sources))
    if config.trained_mode == "av":
        logger.info("%s", _audio_plan(config, sources.training.audio_share))
    return trainer


def _make_run(
    config: TrainingConfig,
    processes: Processes,
    sources: Sources,
    trackers: Trackers,
    arranged: Arranged,
    sampler: Sampler | None,
    prompts: PreservationPrompts | None,
    blank: Prompt | None,
) -> Run:
    """What the loop works with, around the arranged model."""
    device, model, network = processes.device, arranged.model, arranged.network
    data = sources.training.loader(
        rank=processes.rank,
        world_size=processes.count,
        workers=config.workers,
        persistent_workers=config.persistent_workers,
        pin_memory=device.type == "cuda",
    )
    loop = _settle_length(config.loop, len(data))
    mode, autocast = _make_mode(config, sources, device, blank), _autocast(device, config.mixed_precision)
    setting = _regularizer_setting(config, arranged, mode, device, autocast, loop)
    regularizers = make_regularizers(config.regularizers, setting, prompts)
    optimizer, group_names = _make_optimizer(config, network, regularizers)
    scheduler = create_scheduler(optimizer, config.scheduler, loop.max_steps, config.optimizer.learning_rate)
    draws = settle_draws(config.draws, sources.version)
    validator = None
    if sources.validation is not None:
        items = _Share(sources.validation, processes)
        validator = Validator(model, mode, items, draws.sampler, loop.seed, device)
    others = {extra.name: extra.module for extra in regularizers.trained()}
    parameters, names = trained_parameters(network, optimizer, others)
    if processes.is_main:
        _check_disk(config, parameters)
    return Run(
        device=device,
        rank=processes.rank,
        autocast=autocast,
        model=model,
        network=network,
        mode=mode,
        data=data,
        optimizer=optimizer,
        scheduler=scheduler,
        gradients=Gradients(parameters, names, config.optimizer.max_grad_norm),
        group_names=group_names,
        loop=loop,
        draws=draws,
        loss=config.loss,
        balancer=AudioBalancer(config.loss.balance, device, mean_over_ranks),
        monitor=AudioMonitor(config.loss.supervision) if config.trained_mode == "av" else None,
        guard=NonFiniteGuard(config.loop.nan_check),
        saver=_make_saver(
            config, sources, describe_optimizer(optimizer, config.optimizer), processes, loop, len(data), arranged.loftq
        ),
        log=trackers.log,
        histogram=trackers.histogram,
        show_sample=trackers.sample,
        histogram_interval=config.logs.histogram_interval if config.logs.trackers else 0,
        validation=config.validation,
        validator=validator,
        samples=config.samples,
        sampler=sampler,
        swapped=config.memory.blocks_to_swap or 0,
        scaler=LossScaler(device.type) if config.mixed_precision == "fp16" else None,
        regularizers=regularizers,
        before_samples=arranged.arrangement.release,
    )


def _regularizer_setting(
    config: TrainingConfig,
    arranged: Arranged,
    mode: Mode,
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager],
    loop: LoopOptions,
) -> Setting:
    """What regularizers are told of the run."""
    output, datasets = config.save.output_dir, config.data.datasets
    return Setting(
        model=arranged.model,
        network=arranged.network,
        mode=mode,
        device=device,
        autocast=autocast,
        seed=loop.seed,
        steps=loop.max_steps,
        learning_rate=config.optimizer.learning_rate,
        output_dir=output,
        cache_directory=datasets[0].cache_directory if datasets else output,
    )


def _make_optimizer(
    config: TrainingConfig, network: nn.Module, regularizers: Regularizers
) -> tuple[torch.optim.Optimizer, list[str]]:
    """The optimizer of the adapters and of what regularizers train, and the names of its groups."""
    rates = config.optimizer
    groups, names = optimizer_groups(network, rates.learning_rate, rates.audio_learning_rate, rates.lr_args)
    for extra in regularizers.trained():
        groups.append({"params": list(extra.module.parameters()), "lr": extra.learning_rate})
        names.append(extra.name)
    optimizer = create_optimizer(rates, groups)
    for warning in scheduler_warnings(optimizer, config.scheduler.name, rates.max_grad_norm):
        logger.warning("%s", warning)
    return optimizer, names


def _audio_plan(config: TrainingConfig, share: float) -> str:
    without_sound = None
    if config.modes.silence_regularizer:
        without_sound = f"silence (weight {config.modes.silence_weight:g})"
    elif config.regularizers.preservation.audio_dop is not None:
        without_sound = "the plain model's sound (--audio_dop)"
    return audio_plan(share, without_sound=without_sound, balance=config.loss.balance.mode)


def _check_disk(config: TrainingConfig, parameters: Sequence[nn.Parameter]) -> None:
    values = sum(parameter.numel() for parameter in parameters)
    itemsize = config.adapter_dtype.itemsize
    wanted = config.save.state or config.save.state_on_train_end
    state = values * itemsize + moment_bytes(config.optimizer.type, values, itemsize)
    check_free_disk(config.save, values, state if wanted else 0)


def _largest(config: TrainingConfig, sources: Sources, trainer: Trainer) -> dict:
    """The batch that needs most memory; of a slider the first."""
    if isinstance(sources.training, TrainingData):
        return sources.training[0, largest_batch(config, sources.training)[0]]
    trainer.run.data.set_epoch(1)
    return next(iter(trainer.run.data))


def _length_line(trainer: Trainer, sources: Sources) -> str:
    items = sum(len(found.items) for found in sources.training.inventories)
    batches, steps = len(trainer.run.data), trainer.max_steps
    if not items:
        return f"{steps} optimizer steps"
    seen = steps * trainer.run.loop.accumulation / max(batches, 1)
    return (
        f"{items} items, {batches} batches an epoch, {steps} optimizer steps: "
        f"every item is seen about {seen:.1f} times its num_repeats"
    )


def _settle_precision(config: TrainingConfig, checkpoint: Checkpoint, device: torch.device) -> PrecisionOptions:
    """The precision that is used in the end: the file and the device may know better."""
    precision = replace(config.precision, weights=effective_format(checkpoint, config.precision.weights, device))
    if precision.loftq_rank and config.network.weights is not None:
        logger.warning("--network_weights wins over --loftq_init: weights are quantised plainly")
        precision = replace(precision, loftq_rank=0)
    return precision


def settle_draws(draws: DrawOptions, version: str) -> DrawOptions:
    """The sampler's mode `auto` becomes that of the checkpoint's version."""
    if draws.sampler.mode != "auto":
        return draws
    mode = "legacy" if version == "2.0" else "stretched"
    return replace(draws, sampler=replace(draws.sampler, mode=mode))


def _settle_length(loop: LoopOptions, batches: int) -> LoopOptions:
    """max_epochs becomes max_steps. `batches` is what one process sees in an epoch."""
    if loop.max_epochs is None:
        return loop
    return replace(loop, max_steps=loop.max_epochs * math.ceil(batches / loop.accumulation))


def _make_mode(config: TrainingConfig, sources: Sources, device: torch.device, blank: Prompt | None) -> Mode:
    compute = Compute(device, config.dtype, None if blank is None else Text(blank.video, blank.audio, blank.mask))
    options = replace(config.modes, audio_width=sources.model.audio_in_channels)
    mode = MODES[config.mode, config.strategy]
    if not options.silence_regularizer:
        return mode(options, compute)
    silence = find_silence(sources.training.inventories[0].dataset.cache_directory, options.audio_width)
    return mode(options, compute, silence)


def _autocast(device: torch.device, mixed_precision: str) -> Callable[[], contextlib.AbstractContextManager]:
    dtype = MIXED_PRECISION.get(mixed_precision)
    if dtype is None:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype)


@dataclass(frozen=True)
class _Share:
    """The validation items of one process, iterable again and again."""

    data: ValidationData
    processes: Processes

    def __iter__(self) -> Iterator[dict]:
        for index in range(self.processes.rank, len(self.data), self.processes.count):
            yield self.data[index]


def _make_saver(
    config: TrainingConfig,
    sources: Sources,
    optimizer: str,
    processes: Processes,
    loop: LoopOptions,
    batches: int,
    loftq: LoftQStart | None,
) -> RunSaver:
    draws = settle_draws(config.draws, sources.version)
    facts = training_facts(config, sources, draws, optimizer, loop, batches)
    low, high = round(draws.sampler.minimum * 1000), round(draws.sampler.maximum * 1000)
    metadata = RunMetadata(
        config.metadata,
        facts,
        output_name=config.save.output_name,
        timestep_range=(low, high) if (low, high) != (0, 1000) else None,
    )
    network = config.network
    fingerprint = {
        "network_module": network.module,
        "rank": network.dim,
        "alpha": network.alpha,
        "targets": network.args.get("include_patterns", network.preset),
        "mode": config.mode,
        "strategy": config.strategy,
        "ltx_version": sources.version,
        "base": config.precision.weights.kind,
        "loftq": None if loftq is None else loftq.digest,
        "awq_alpha": config.precision.awq_alpha,
        "seed": loop.seed,
        "max_train_steps": loop.max_steps,
        "learning_rate": config.optimizer.learning_rate,
        "gradient_accumulation_steps": loop.accumulation,
        "optimizer": optimizer_path(config.optimizer.type),
    }
    return RunSaver(
        config.save,
        metadata.at,
        fingerprint,
        is_main=processes.is_main,
        wait=processes.wait,
        loftq=loftq,
        uploader=Uploader(config.upload) if config.upload and processes.is_main else None,
    )


def _resume(config: TrainingConfig, trainer: Trainer) -> None:
    folder = config.resume
    if folder is None and config.autoresume:
        folder = newest_state(config.save.output_dir, config.save.output_name)
        if folder is None:
            logger.info("--autoresume: no state of %s yet, starting from scratch", config.save.output_name)
    if folder is not None:
        trainer.run.saver.resume(folder, trainer)
    if trainer.run.saver.is_main and (folder is not None or config.autoresume):
        remove_leftovers(config.save.output_dir, config.save.output_name)
