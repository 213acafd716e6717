from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.tiny import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LTX-2.3 checkpoint."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")
