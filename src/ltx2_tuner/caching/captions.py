"""Captions that are probably not meant as they are: too short, too long for the encoder, or the same everywhere."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

FEW_WORDS = 5
MANY_WORDS = 200
_SAME_SHARE = 0.5
_LISTED = 10


def note_captions(label: str, captions: Sequence[tuple[str, str]]) -> None:
    """Log what stands out among (source name, caption) of a dataset. Empty captions are counted elsewhere."""
    words = [(name, len(caption.split())) for name, caption in captions]
    short = [name for name, count in words if 0 < count < FEW_WORDS]
    long = [name for name, count in words if count > MANY_WORDS]
    if short:
        logger.warning(
            "%s: %d captions have fewer than %d words: %s; LTX-2 was trained on sentences that tell what happens, in "
            "order",
            *(label, len(short), FEW_WORDS, _some(short)),
        )
    if long:
        logger.warning("%s: %d captions have more than %d words: %s", label, len(long), MANY_WORDS, _some(long))
    if len(captions) > 1:
        caption, count = Counter(caption for _, caption in captions).most_common(1)[0]
        if count > 1 and count > _SAME_SHARE * len(captions):
            logger.warning(
                "%s: %d of %d captions are the same (%.60r); was the clips' own text lost?",
                *(label, count, len(captions), caption),
            )


def note_truncated(label: str, captions: Sequence[tuple[str, str]], count: Callable[[str], int], limit: int) -> None:
    """Warn about captions of more than `limit` tokens, whose end the encoder does not see."""
    # A token has at least one byte, so that most captions need no counting.
    cut = [name for name, caption in captions if len(caption.encode()) >= limit and count(caption) > limit]
    if cut:
        logger.warning(
            "%s: %d captions have more than %d tokens, the rest of them is cut off: %s; shorten them",
            *(label, len(cut), limit, _some(cut)),
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
