"""Saves a run: the adapter files, and the state that a later run goes on from."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.training import state as states
from ltx2_tuner.training.groups import load_optimizer, load_scheduler, parameter_names
from ltx2_tuner.training.loftq import LoftQStart
from ltx2_tuner.training.options import SaveOptions
from ltx2_tuner.training.pack import pack, unpack
from ltx2_tuner.training.progress import progress_record
from ltx2_tuner.training.random import default_generator_states, restore_default_generators
from ltx2_tuner.training.saving import CheckpointWriter, Moment, check_finite, rotate_state, with_suffix
from ltx2_tuner.training.upload import Uploader

if TYPE_CHECKING:
    from ltx2_tuner.training.loop import Trainer
    from ltx2_tuner.training.run import Run

logger = logging.getLogger(__name__)

# Keys of the fingerprint whose change makes a state useless; the others only change how the run goes on.
_STRUCTURE = (
    "network_module",
    "rank",
    "alpha",
    "targets",
    "mode",
    "strategy",
    "ltx_version",
    "base",
    "seed",
    "loftq",
    "awq_alpha",
    "optimizer",
)


@dataclass
class RunSaver:
    """Writes what `options` ask for at each moment.

    metadata: makes the strings of a LoRA file from (step, epoch). fingerprint: what a resumed run must share.
    is_main: only the first process writes. wait: all processes meet here. loftq: what the adapters started from.
    uploader: sends what is written to the hub.
    """

    options: SaveOptions
    metadata: Callable[[int, int], Mapping[str, str]]
    fingerprint: Mapping[str, object]
    is_main: bool = True
    wait: Callable[[], None] = lambda: None
    resumed_from: Path | None = None
    loftq: LoftQStart | None = None
    uploader: Uploader | None = None
    _writer: CheckpointWriter = field(init=False)

    def __post_init__(self) -> None:
        self._writer = CheckpointWriter(self.options, self.loftq)

    def save(self, moment: Moment, trainer: Trainer) -> None:
        """Write the files of a moment; generators must be those of training.

        Raises:
            UserError: the adapter is not finite (nothing is written), or the disk is full.
        """
        if self.is_main:
            wants_state = self._wants_state(moment)
            if moment.kind != "interrupt" or not wants_state:
                self._save_adapter(moment, trainer)
            if wants_state:
                self._save_state(moment, trainer)
        self.wait()

    def _wants_state(self, moment: Moment) -> bool:
        return self.options.state or (self.options.state_on_train_end and moment.kind == "final")

    def _save_adapter(self, moment: Moment, trainer: Trainer) -> None:
        tensors = trainer.run.network.state_dict()
        record = progress_record(trainer.progress, trainer.metrics, _learning_rate(trainer.run.optimizer))
        written = self._writer.save(moment, tensors, self.metadata(moment.step, moment.epoch), record)
        self._upload(written, moment)
        trainer.run.regularizers.write_files(self.options.output_dir)
        if moment.kind == "interrupt":
            name = moment.stem(self.options.output_name)
            logger.info(
                "without --save_state only the adapter is kept: --network_weights %s.safetensors starts from it", name
            )

    def _save_state(self, moment: Moment, trainer: Trainer) -> None:
        run, progress = trainer.run, trainer.progress
        network = {name: tensor.detach().cpu().contiguous() for name, tensor in run.network.state_dict().items()}
        check_finite(network, f"the adapter at step {moment.step}")
        optimizer, optimizer_form = pack(run.optimizer.state_dict(), "optimizer")
        scheduler, scheduler_form = pack(_state_of(run.scheduler), "scheduler")
        metadata = {
            **progress.state(),
            **trainer.average.state(),
            "optimizer": optimizer_form,
            "scheduler": scheduler_form,
            "groups": list(run.group_names),
            "parameters": _parameters(run),
            "scaler": _state_of(run.scaler),
            "balance": run.balancer.state(),
            "supervision": run.monitor.state() if run.monitor else None,
            "skipped": run.guard.state(),
            "fingerprint": dict(self.fingerprint),
        }
        folder = with_suffix(self.options.output_dir / moment.stem(self.options.output_name), "-state")
        states.save_state(
            folder,
            {
                "network": network,
                "optimizer": {**optimizer, **scheduler},
                "random": default_generator_states(),
                **run.regularizers.state(),
            },
            metadata,
            state_type=moment.kind,
            step=progress.step,
            epoch=progress.epoch,
            step_in_epoch=progress.step_in_epoch,
        )
        if moment.kind == "interrupt":
            logger.info("to go on: the same command with --resume %s, or with --autoresume", folder)
        if self.uploader is not None and self.uploader.options.states:
            self._upload([folder], moment)
        rotate_state(moment, self.options, self.resumed_from)

    def _upload(self, paths: Sequence[Path], moment: Moment) -> None:
        if self.uploader is not None:
            for path in paths:
                self.uploader.send(path, last=moment.kind in ("final", "interrupt"))

    def resume(self, folder: Path, trainer: Trainer) -> None:
        """Put a run back where a state was saved.

        Raises:
            UserError: no complete state, or one of another network.
        """
        run = trainer.run
        state = states.load_state(folder)
        self._compare(folder, state.metadata["fingerprint"])
        run.network.load_state_dict(state.tensors["network"])
        optimizer = unpack(state.tensors["optimizer"], state.metadata["optimizer"])
        parameters = _parameters(run)
        load_optimizer(
            run.optimizer,
            optimizer,
            state.metadata.get("parameters", parameters),
            parameters,
            state.metadata.get("groups", run.group_names),
            run.group_names,
        )
        if run.scheduler is not None and state.metadata["scheduler"] is not None:
            scheduler = unpack(state.tensors["optimizer"], state.metadata["scheduler"])
            load_scheduler(run.scheduler, scheduler, run.optimizer)
        if run.scaler is not None and state.metadata["scaler"]:
            run.scaler.load_state_dict(state.metadata["scaler"])
        run.balancer.load_state(state.metadata["balance"])
        if run.monitor is not None and state.metadata["supervision"]:
            run.monitor.load_state(state.metadata["supervision"])
        run.guard.load_state(state.metadata["skipped"])
        run.regularizers.load_state(state.tensors, folder)
        trainer.progress.load_state(state.metadata)
        trainer.average.load_state(state.metadata)
        restore_default_generators(state.tensors["random"])
        self.resumed_from = folder
        logger.info("resumed from %s at step %d", folder, trainer.progress.step)

    def _compare(self, folder: Path, saved: Mapping[str, object]) -> None:
        for key, mine in self.fingerprint.items():
            theirs = saved.get(key)
            if theirs == mine:
                continue
            if key in _STRUCTURE:
                raise UserError(
                    f"--resume {folder}: {key} was {theirs} there and is {mine} now; use the settings the state was "
                    "saved with, or start a new run from its adapter with --network_weights"
                )
            logger.warning("%s was %s when the state was saved and is %s now", key, theirs, mine)


def _parameters(run: Run) -> list[list[str]]:
    names = dict(zip(run.gradients.parameters, run.gradients.names))
    return parameter_names(run.optimizer, names)


def _state_of(part: object) -> dict | None:
    """A state dict without what cannot be stored: a scheduler's own functions are rebuilt from the flags."""
    if part is None:
        return None
    return {key: value for key, value in part.state_dict().items() if not callable(value)}


def _learning_rate(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"] or 0.0)


def now() -> str:
    """The time for metadata, whole seconds."""
    return datetime.datetime.now().isoformat(timespec="seconds")
