"""How Gemma is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class GemmaOptions:
    """Where Gemma lies and in what precision it runs.

    Attributes:
        root: Hugging Face style directory.
        safetensors: single file with weights and tokenizer; wins over `root`, which then only fills in a tokenizer
            that the file lacks.
        load_in_8bit, load_in_4bit: quantise with bitsandbytes while loading (`root` and a CUDA device).
        bnb_4bit_quant_type: `nf4` or `fp4`.
        bnb_4bit_double_quant: quantise the scales too.
        bnb_4bit_compute_dtype: None means the compute dtype of the run.
        fp8_weight_offload: fp8 weights of a single file stay in host memory and travel layer by layer.
    """

    root: Path | None = None
    safetensors: Path | None = None
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    bnb_4bit_quant_type: str = "nf4"
    bnb_4bit_double_quant: bool = True
    bnb_4bit_compute_dtype: torch.dtype | None = None
    fp8_weight_offload: bool = True

    @property
    def source(self) -> Path:
        """What error messages name."""
        path = self.safetensors or self.root
        assert path is not None, "GemmaOptions needs root or safetensors"
        return path

    @property
    def quantized(self) -> bool:
        return self.load_in_8bit or self.load_in_4bit
