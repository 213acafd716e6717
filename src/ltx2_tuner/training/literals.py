"""`key=value` texts of --optimizer_args and --lr_scheduler_args as Python values."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping


def literals(args: Mapping[str, str]) -> dict[str, object]:
    """Each text as a Python literal (also true/false in any case), or as it is when it is none."""
    return {key: _literal(text) for key, text in args.items()}


def keywords_of(found: type) -> list[str] | None:
    """Names of a class's constructor parameters, None when it takes any (`**kwargs`)."""
    parameters = [p for name, p in inspect.signature(found.__init__).parameters.items() if name != "self"]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]


def _literal(text: str) -> object:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
