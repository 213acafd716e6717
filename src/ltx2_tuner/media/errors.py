"""The error of a picture, clip or sound file that cannot be used."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ltx2_tuner.errors import UserError


class MediaError(UserError):
    """A media file is missing, empty, damaged or of an unknown kind; the message names the file.

    Callers that walk over many files count it against that one file and go on.
    """


@contextlib.contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Turn whatever a decoder raises while it reads `path` into a `MediaError` that names the file."""
    try:
        yield
    except (MediaError, MemoryError, AttributeError, NameError, ImportError):
        raise  # not the file's fault
    except FileNotFoundError as error:
        raise MediaError(f"{path}: no such file") from error
    except Exception as error:  # on damaged input the parsers below raise nearly every type there is
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise MediaError(f"{path}: cannot be decoded ({reason}); replace the file or take it out") from error
