from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ltx2_tuner.checkpoint import Checkpoint, load_transformer, write_tiny_checkpoint
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.sampling.contexts import PromptContext


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    write_tiny_checkpoint(path, seed=0)
    return Checkpoint.open(path)


@pytest.fixture
def transformer(checkpoint: Checkpoint) -> LTXTransformer:
    return load_transformer(checkpoint, "av", "cpu", torch.float32, progress=False).eval()


@pytest.fixture
def context(transformer: LTXTransformer) -> PromptContext:
    generator = torch.Generator().manual_seed(0)

    def embedding(stream: str) -> torch.Tensor:
        return torch.randn(1, 16, transformer.config.context_width(stream), generator=generator)

    return PromptContext(*(embedding(stream) for stream in ("video", "audio", "video", "audio")))


@pytest.fixture(scope="session")
def upsamplers() -> Path:
    """Folder of the tiny golden upsamplers."""
    return Path(__file__).parents[1] / "golden" / "data" / "upsampler"
