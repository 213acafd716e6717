"""Reading safetensors files: a strict header check, then plain reads of single tensors.

Nothing is memory-mapped and nothing is kept: a 40 GB checkpoint costs the host the tensors that are being read. Tensors
that live on a CUDA device pass through two pinned staging buffers, so that reading and copying overlap. Threads may
read at the same time: each has a file handle and buffers of its own for that while.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.files import SAFETENSORS_DTYPES

MAX_HEADER_BYTES = 100_000_000  # the limit of the format
STAGING_BYTES = 8 << 20  # of each buffer; a thread that reads has two


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header; `start` and `end` are byte offsets from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class SafetensorsFile:
    """A validated safetensors file.

    Attributes:
        path: the file.
        metadata: the `__metadata__` strings, empty when there are none.
        tensors: name -> TensorEntry, in the order of the header.

    Raises:
        UserError: the file is missing, is no safetensors file, is cut short or damaged; the message names the file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._idle: list[_Reader] = []  # readers that no thread uses right now
        try:
            reader = _Reader(open(self.path, "rb", buffering=0))  # noqa: SIM115 (closed by close)
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such file; check the path") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be opened ({error.strerror}); give a .safetensors file") from error
        self._opened = os.fstat(reader.file.fileno())
        self._idle.append(reader)
        try:
            self.metadata, self.tensors = self._parse_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_exception) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):
            self.close()

    def close(self) -> None:
        """Close the file and drop the staging buffers; what is read later opens it again."""
        while self._idle:
            self._idle.pop().file.close()

    def read(self, name: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor `name`, on `device`, cast to `dtype` there when one is given.

        Raises:
            KeyError: no such tensor.
            UserError: the file became shorter since it was opened, or is another one now.
        """
        tensor = self.reserve(name, device)
        self.fill(name, tensor)
        return tensor if dtype is None else tensor.to(dtype)

    def reserve(self, name: str, device: str | torch.device = "cpu") -> torch.Tensor:
        """Memory for the tensor `name`, for `fill`."""
        entry = self.tensors[name]
        return torch.empty(entry.shape, dtype=entry.dtype, device=device)

    def fill(self, name: str, tensor: torch.Tensor, start: int = 0, stop: int | None = None) -> None:
        """Read the bytes from `start` to `stop` of the tensor `name` into what `reserve` gave.

        Raises:
            UserError: as `read`.
        """
        if tensor.device.type == "meta":
            return
        raw = tensor.reshape(-1).view(torch.uint8)[start:stop]
        position = self.tensors[name].start + start
        with self._reader() as reader:
            if raw.device.type == "cuda":
                reader.staging = reader.staging or _PinnedStaging(raw.device)
                reader.staging.fill(raw, lambda offset, view: self._read_into(reader, position + offset, view))
            else:
                host = raw if raw.device.type == "cpu" else torch.empty_like(raw, device="cpu")
                self._read_into(reader, position, memoryview(host.numpy()))
                if host is not raw:
                    raw.copy_(host)

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Up to `length` raw bytes of a tensor from its byte `start` on; fewer where the tensor ends."""
        entry = self.tensors[name]
        first = min(entry.start + start, entry.end)
        buffer = bytearray(max(min(length, entry.end - first), 0))
        with self._reader() as reader:
            self._read_into(reader, first, memoryview(buffer))
        return bytes(buffer)

    @contextlib.contextmanager
    def _reader(self) -> Iterator[_Reader]:
        """A reader for this thread alone; another one is opened where all are in use.

        Raises:
            UserError: the path leads to another file than before.
        """
        try:
            reader = self._idle.pop()
        except IndexError:
            reader = self._another()
        try:
            yield reader
        finally:
            self._idle.append(reader)

    def _another(self) -> _Reader:
        try:
            reader = _Reader(open(self.path, "rb", buffering=0))  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); check the disk") from error
        if not os.path.samestat(self._opened, os.fstat(reader.file.fileno())):
            reader.file.close()
            raise UserError(f"{self.path}: was replaced while it was read; start again")
        return reader

    def _read_into(self, reader: _Reader, position: int, view: memoryview) -> None:
        """Fill `view` from the byte `position` of the file on."""
        try:
            reader.file.seek(position)
            done = 0
            while done < len(view):
                count = reader.file.readinto(view[done:])
                if not count:
                    raise UserError(f"{self.path}: ended while it was read; copy or download it again")
                done += count
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); check the disk") from error

    def _parse_header(self) -> tuple[dict[str, str], dict[str, TensorEntry]]:
        size = self._opened.st_size
        if size < 8:
            raise UserError(f"{self.path}: is no safetensors file ({size} bytes); give the complete model file")
        reader = self._idle[0]
        prefix = bytearray(8)
        self._read_into(reader, 0, memoryview(prefix))
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise UserError(f"{self.path}: is no safetensors file, or its header is damaged; give a .safetensors file")
        if 8 + length > size:
            raise UserError(
                f"{self.path}: is cut short ({size} bytes, its header alone needs {8 + length}); "
                "copy or download it again"
            )
        text = bytearray(length)
        self._read_into(reader, 8, memoryview(text))
        header = self._decode(bytes(text))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._damaged("its metadata is no map of strings")
        return metadata, self._checked_entries(header, 8 + length, size)

    def _decode(self, text: bytes) -> dict[str, object]:
        def refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
            content = dict(pairs)
            if len(content) != len(pairs):
                names = [name for name, _ in pairs]
                twice = next(name for name in names if names.count(name) > 1)
                raise self._damaged(f"it has the key {twice!r} twice")
            return content

        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=refuse_duplicates)
        except (ValueError, RecursionError):
            raise self._damaged("it is no JSON text") from None
        if not isinstance(header, dict):
            raise self._damaged("it is no JSON object")
        return header

    def _checked_entries(self, header: dict[str, object], data_start: int, size: int) -> dict[str, TensorEntry]:
        entries = {name: self._checked_entry(name, value, data_start) for name, value in header.items()}
        end = data_start
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != end:
                what = "overlaps another tensor" if entry.start < end else "leaves a gap before it"
                raise self._damaged(f"the tensor {name!r} {what}")
            end = entry.end
        if end > size:
            raise UserError(f"{self.path}: is cut short ({size} of {end} bytes are there); copy or download it again")
        if end < size:
            raise self._damaged(f"the file has {size - end} bytes more than it names")
        return entries

    def _checked_entry(self, name: str, value: object, data_start: int) -> TensorEntry:
        if any(ord(letter) < 32 for letter in name) or name.startswith(("/", "\\")) or ".." in name:
            raise self._damaged(f"{name!r} is no tensor name")
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise self._damaged(f"the entry of {name!r} lacks dtype, shape or data_offsets")
        shape, offsets = value["shape"], value["data_offsets"]
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._damaged(f"the entry of {name!r} has an impossible shape or impossible offsets")
        dtype = SAFETENSORS_DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
        if dtype is None:
            raise UserError(
                f"{self.path}: the tensor {name!r} has the unsupported type {value['dtype']!r}; "
                "give a bf16, fp16, fp32, fp8 or nf4 file"
            )
        if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
            raise self._damaged(f"the shape of {name!r} does not fit its {offsets[1] - offsets[0]} bytes")
        return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path}: its header is damaged ({what}); copy or download the file again")


def _are_sizes(value: object) -> bool:
    """A list of non-negative integers (JSON `true` is none), each below 2^63."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


@dataclass(eq=False)
class _Reader:
    """What a thread reads with: a handle that keeps its own position, and buffers for what goes to a CUDA device."""

    file: BinaryIO
    staging: _PinnedStaging | None = None


class _PinnedStaging:
    """Two pinned buffers: while one is copied to the device, the next bytes are read into the other."""

    def __init__(self, device: torch.device) -> None:
        self.buffers = [torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        with torch.cuda.device(device):
            self.copied = [torch.cuda.Event() for _ in range(2)]
        self.turn = 0

    def fill(self, target: torch.Tensor, read) -> None:
        """Fill the device bytes `target` by `read(offset, view)` calls."""
        with torch.cuda.device(target.device):
            for offset in range(0, target.numel(), STAGING_BYTES):
                self.turn = 1 - self.turn
                buffer, copied = self.buffers[self.turn], self.copied[self.turn]
                copied.synchronize()
                part = buffer[: min(STAGING_BYTES, target.numel() - offset)]
                read(offset, memoryview(part.numpy()))
                target[offset : offset + part.numel()].copy_(part, non_blocking=True)
                copied.record()
