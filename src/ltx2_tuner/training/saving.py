"""The LoRA files of a run: names, formats, metadata hashes, sidecars and rotation."""

from __future__ import annotations

import datetime
import hashlib
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ltx2_tuner import files
from ltx2_tuner.errors import UserError
from ltx2_tuner.lora.formats import any_to_comfy, comfy_metadata
from ltx2_tuner.training.loftq import LoftQStart
from ltx2_tuner.training.options import SaveOptions

logger = logging.getLogger(__name__)

PRECISIONS = {"float": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_LEGACY_OFFSET = 0x100000
_LEGACY_LENGTH = 0x10000


@dataclass(frozen=True)
class Moment:
    """When something is saved: kind is `step`, `epoch`, `final` or `interrupt`."""

    kind: str
    step: int
    epoch: int

    def stem(self, name: str) -> str:
        """File name without suffix."""
        if self.kind == "step":
            return f"{name}-step{self.step:08d}"
        if self.kind == "epoch":
            return f"{name}-{self.epoch:06d}"
        if self.kind == "interrupt":
            return f"{name}-interrupt-step{self.step:08d}"
        return name


class CheckpointWriter:
    """Writes LoRA files in both key formats and removes the ones that rotate out.

    A LoftQ run's ComfyUI file is for the full model: what the adapters started with, a part of its base, is not in it.
    """

    def __init__(self, options: SaveOptions, loftq: LoftQStart | None = None) -> None:
        self.options = options
        self.loftq = loftq

    def save(
        self,
        moment: Moment,
        tensors: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str],
        progress: Mapping[str, float],
    ) -> list[Path]:
        """Write the adapter under its moment's name; returns the files.

        tensors: kohya keys. progress: numbers of the sidecar (loss, loss_avg, lr, ...).

        Raises:
            UserError: a tensor holds NaN or infinity (nothing is written), or the disk is full.
        """
        check_finite(tensors, f"the adapter at step {moment.step}")
        dtype = PRECISIONS[self.options.precision]
        base = self.options.output_dir / moment.stem(self.options.output_name)
        converted = self._convert(tensors, dtype) if self.options.comfy else None
        written = []
        if self.options.original or converted is None:
            cast = {name: tensor.detach().to("cpu", dtype) for name, tensor in tensors.items()}
            about = metadata if self.loftq is None else {**metadata, "ss_loftq_start": "contained: for the nf4 base"}
            written.append(self._write(with_suffix(base, ".safetensors"), cast, about))
        if converted is not None:
            about = comfy_metadata(metadata)
            if self.loftq is not None:
                about["ss_loftq_start"] = "taken out: for the model before quantisation"
            written.append(self._write(with_suffix(base, ".comfy.safetensors"), converted, about))
        if self.options.sidecar:
            self._write_sidecar(base, moment, progress)
        logger.info("saved %s", ", ".join(path.name for path in written))
        self._rotate(moment)
        return written

    def _convert(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
        """The adapter under ComfyUI's keys, None (with one line) where another network module made it."""
        try:
            return any_to_comfy(tensors if self.loftq is None else self.loftq.taken_out(tensors), dtype)
        except UserError as error:
            logger.info("no ComfyUI copy: %s", error)
            return None

    def _write(self, path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Path:
        check_finite(tensors, f"{path.name} in --save_precision {self.options.precision}")
        files.write_safetensors(path, tensors, {**metadata, **model_hashes(tensors, metadata)})
        return path

    def _write_sidecar(self, base: Path, moment: Moment, progress: Mapping[str, float]) -> None:
        now = datetime.datetime.now().isoformat(timespec="seconds")
        record = {"step": moment.step, "epoch": moment.epoch, "timestamp": now, **progress}
        files.write_json(with_suffix(base, ".json"), record)

    def _rotate(self, moment: Moment) -> None:
        old = rotated_out(moment, self.options)
        if old is None:
            return
        base = self.options.output_dir / old.stem(self.options.output_name)
        for suffix in (".safetensors", ".comfy.safetensors", ".json"):
            path = with_suffix(base, suffix)
            if path.exists():
                path.unlink()
                logger.info("removed %s", path.name)


def rotate_state(moment: Moment, options: SaveOptions, keep: Path | None) -> None:
    """Remove the state that rotates out at this moment; never `keep`, the one the run resumed from."""
    last_steps = options.last_steps if options.last_steps_state is None else options.last_steps_state
    last_epochs = options.last_epochs if options.last_epochs_state is None else options.last_epochs_state
    old = rotated_out(moment, options, last_steps, last_epochs, own=True)
    if old is None:
        return
    folder = options.output_dir / f"{old.stem(options.output_name)}-state"
    if folder.is_dir() and (keep is None or folder.resolve() != keep.resolve()):
        # Renamed first, so that a kill in the middle leaves nothing that looks like a state.
        doomed = folder.with_name(f".{folder.name}.removed")
        folder.rename(doomed)
        shutil.rmtree(doomed)
        logger.info("removed %s", folder.name)


def rotated_out(
    moment: Moment,
    options: SaveOptions,
    last_steps: int | None = None,
    last_epochs: int | None = None,
    *,
    own: bool = False,
) -> Moment | None:
    """The earlier moment whose files go when this one's are on disk, None when nothing goes."""
    if not own:
        last_steps, last_epochs = options.last_steps, options.last_epochs
    if moment.kind == "step" and last_steps is not None and options.every_steps:
        step = moment.step - last_steps - 1
        step -= step % options.every_steps
        return Moment("step", step, moment.epoch) if step > 0 else None
    if moment.kind == "epoch" and last_epochs is not None and options.every_epochs:
        epoch = moment.epoch - options.every_epochs * last_epochs
        return Moment("epoch", moment.step, epoch) if epoch > 0 else None
    return None


def check_free_disk(options: SaveOptions, trained: int, state: int) -> None:
    """Refuse to start a run whose first checkpoint or state would not fit on the disk; warn where two would not.

    Args:
        trained: values of the adapter. state: bytes of a saved state, 0 where none is saved.

    Raises:
        UserError: too little is free.
    """
    files_each = options.comfy + (options.original or not options.comfy)
    needed = trained * PRECISIONS[options.precision].itemsize * files_each + state
    try:
        free = shutil.disk_usage(options.output_dir).free
    except OSError:
        return
    message = f"--output_dir {options.output_dir}: {free / 1e9:.3g} GB are free and a save takes {needed / 1e9:.3g} GB"
    if free < needed:
        raise UserError(f"{message}; make room or name another disk")
    if free < 2 * needed:
        logger.warning("%s: there is room for one; make room or use --save_last_n_steps", message)


def with_suffix(base: Path, suffix: str) -> Path:
    """Append a suffix; unlike Path.with_suffix, dots in the name stay."""
    return base.with_name(base.name + suffix)


def check_finite(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Refuse to write NaN or infinity.

    Raises:
        UserError: naming the first bad tensor.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{what} holds NaN or infinite values ({name}) and was not written; go on from the last good "
                "checkpoint with a lower --learning_rate"
            )


def model_hashes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash`, over the tensors serialised with only the `ss_` metadata."""
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    header = files.safetensors_header(entries, kept)
    whole = hashlib.sha256()
    window = bytearray()
    position = len(header)
    for name in sorted(entries):
        data = files.tensor_bytes(tensors[name])
        whole.update(data)
        start, end = max(_LEGACY_OFFSET - position, 0), _LEGACY_OFFSET + _LEGACY_LENGTH - position
        if end > 0:
            window += data[start:end]
        position += len(data)
    if len(header) > _LEGACY_OFFSET:
        window = bytearray(header[_LEGACY_OFFSET : _LEGACY_OFFSET + _LEGACY_LENGTH]) + window
    legacy = hashlib.sha256(bytes(window[:_LEGACY_LENGTH])).hexdigest()[:8]
    return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": legacy}
