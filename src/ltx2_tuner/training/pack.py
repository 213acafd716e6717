"""Optimizer and scheduler states as tensors plus JSON, so that no pickle is needed to keep them.

`pack` turns any nesting of dicts, lists, tuples, numbers, strings and tensors into (tensors, description); `unpack` is
its inverse. Keys of dicts may be numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_PLAIN = (str, int, float, bool, type(None))


def pack(value: Any, name: str = "value") -> tuple[dict[str, torch.Tensor], Any]:
    """Tensors by path, and a JSON description that refers to them.

    Raises:
        TypeError: something that has no JSON form.
    """
    tensors: dict[str, torch.Tensor] = {}
    return tensors, _pack(value, name, tensors)


def _pack(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": [[key, _pack(item, f"{path}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]}
    if isinstance(value, _PLAIN):
        return value
    if hasattr(value, "item"):  # numpy scalars
        return value.item()
    raise TypeError(f"{path} is a {type(value).__name__}, which a saved state cannot hold")


def unpack(tensors: Mapping[str, torch.Tensor], description: Any) -> Any:
    """The value that was packed."""
    if not isinstance(description, dict):
        return description
    ((kind, content),) = description.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(tensors, item) for key, item in content}
    items = [unpack(tensors, item) for item in content]
    return tuple(items) if kind == "tuple" else items
