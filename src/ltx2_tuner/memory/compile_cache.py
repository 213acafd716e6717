"""Where torch keeps what it compiles."""

from __future__ import annotations

import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

_SETTING = "TORCHINDUCTOR_CACHE_DIR"


def keep_compilations() -> None:
    """Have torch keep it in the user's cache folder. What the user has set stays.

    torch's own choice is the folder for temporary files, which most systems other than Windows empty when they start,
    and the first run after that would compile anew. Call it before anything is compiled.
    """
    home, caches = os.environ.get("HOME"), os.environ.get("XDG_CACHE_HOME")
    if os.name == "nt" or _SETTING in os.environ or not (home or caches):
        return
    folder = Path(caches or f"{home}/.cache") / "ltx2-tuner" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if folder.is_absolute() and os.access(folder, os.W_OK | os.X_OK):
        os.environ[_SETTING] = str(folder)
        logger.info("what is compiled is kept in %s", folder)
