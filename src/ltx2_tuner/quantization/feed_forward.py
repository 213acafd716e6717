"""Feed-forwards whose two layers multiply as one, in the way that suits how these are stored."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ltx2_tuner.quantization import cublaslt, dense_feed_forward, fp8_feed_forward, row_kernels


def fuse_feed_forwards(feed_forwards: Iterable[nn.Module]) -> None:
    """Have the two layers multiply as one in compiled code, wherever that can be.

    Args:
        feed_forwards: with the layers as `net.0.proj`, which `net.0` puts GELU behind, and `net.2`; `multiply` is what
            they call with themselves and x.
    """
    for module in feed_forwards:
        layers = module.net[0].proj, module.net[2]
        # Kernels are tried last: that takes time, and only those that would be used are worth it.
        if fp8_feed_forward.suits(*layers) and (not torch.cuda.is_available() or row_kernels.available()):
            module.multiply = fp8_feed_forward.multiply
        elif dense_feed_forward.suits(*layers) and cublaslt.available():
            module.multiply = dense_feed_forward.multiply
