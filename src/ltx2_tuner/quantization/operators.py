"""Operators with derivatives of our own, in a form whose compilation torch can keep from one run to the next.

torch refuses to keep the compilation of a graph with a `torch.autograd.Function` in it, so every start of a run would
compile anew. An operator that is registered says the same and is kept. torch knows such a graph by the operator's
name, not by its code; so the name carries a digest of the code, and other code never finds what this code compiled.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Results = Tensor | tuple[Tensor, ...]

_DECOMPOSED: dict[torch._ops.OpOverload, Callable[..., Results]] = {}


def operator(
    forward: Callable[..., Results],
    *,
    fake: Callable[..., Results] | None = None,
    setup: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Results]:
    """`forward` as an operator.

    Args:
        forward: arguments annotated as `torch.library.infer_schema` takes them; changes no argument, returns none.
        fake: the results' shapes, for an operator that a compiler shall not look into. None lets Inductor look into
            `forward` as if it were no operator, once `open_to_inductor` has been called.
        setup, backward: as `torch.library.register_autograd` takes them. A compiler always looks into `backward`.
    """
    name = f"ltx2_tuner::{forward.__name__.strip('_')}_{_digest(inspect.getfile(forward))}"
    made = torch.library.custom_op(name, forward, mutates_args=())
    made.register_fake(fake or forward)
    made.register_autograd(backward, setup_context=setup)
    if fake is None:
        _DECOMPOSED[getattr(torch.ops.ltx2_tuner, name.split("::")[1]).default] = forward
    return made


def open_to_inductor() -> None:
    """Let Inductor look into the operators that are made to be looked into. One that may not is slower, not wrong."""
    try:
        from torch._inductor import decomposition
    except ImportError:  # no public interface: other versions of torch may have it elsewhere
        return
    if _DECOMPOSED.items() <= getattr(decomposition, "decompositions", {}).items():
        return
    decomposition.decompositions.update(_DECOMPOSED)
    table = getattr(decomposition, "fast_random_decomps", None)
    if hasattr(table, "cache_clear"):  # it was copied from the other one when something else was compiled
        table.cache_clear()


@functools.cache
def _digest(path: str) -> str:
    """Of a source file and those of this room, which it may call."""
    files = {Path(path), *Path(__file__).parent.glob("*.py")}
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:12]
