"""Which cache files can stay and which must be made."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from ltx2_tuner.caching.run import Journal, read_metadata
from ltx2_tuner.data.metadata import stale_reason

logger = logging.getLogger(__name__)


class Ledger:
    """Decides over one run, by what the interrupted run finished and by what each file says about itself.

    Args:
        journal: files that are complete although the run before was interrupted.
        skip_existing: keep every existing file that still fits (--skip_existing).
    """

    def __init__(self, journal: Journal, skip_existing: bool) -> None:
        self.journal = journal
        self.skip_existing = skip_existing

    def keeps(self, path: Path, expected: Mapping[str, str]) -> bool:
        """Whether the file is there, may be kept, and fits the metadata it would be given now."""
        if not path.is_file() or not (self.skip_existing or str(path) in self.journal.done):
            return False
        found = read_metadata(path)
        if found is None:
            logger.warning("%s: damaged, made again", path)
            return False
        reason = stale_reason(found, expected)
        if reason is not None:
            logger.info("%s: stale, made again: %s", path.name, reason)
        return reason is None

    def wrote(self, path: Path) -> None:
        """Note a complete file."""
        self.journal.add(str(path))
