"""`key=value` tokens of list flags (08 sections 9.1 and 9.6)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

logger = logging.getLogger(__name__)


def parse_key_values(tokens: Sequence[str] | None, flag: str, errors: list[str]) -> dict[str, str]:
    """Key -> text, split at the first `=`; a key given twice keeps its last value, with a warning.

    Args:
        flag: where the tokens were typed, for messages.
        errors: a sentence is added for each token without `=`.
    """
    found: dict[str, str] = {}
    for token in tokens or ():
        key, equals, value = token.partition("=")
        if not equals or not key:
            errors.append(f"{flag} {token}: expected key=value")
            continue
        if key in found:
            logger.warning("%s: %s is given twice; the last value counts", flag, key)
        found[key] = value
    return found
