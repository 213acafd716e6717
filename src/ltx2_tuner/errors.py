"""The one exception type for mistakes a user can make, and nearest-name suggestions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What was found, where, and what to do: printed without a traceback, exit status 1.

    Anything else that escapes a script is a bug and shows its traceback.
    """


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, or None when nothing is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` or an empty string, ready to append to a message."""
    match = nearest(name, known)
    return f" (did you mean '{match}'?)" if match else ""
