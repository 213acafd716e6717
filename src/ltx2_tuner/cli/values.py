"""Types and small parsers that flags of several scripts share."""

from __future__ import annotations

import argparse

import torch

from ltx2_tuner.devices import exact
from ltx2_tuner.errors import UserError, did_you_mean

MODES = {"video": "video", "v": "video", "av": "av", "va": "av", "audio": "audio", "a": "audio"}

_DTYPES = {
    **dict.fromkeys(("fp32", "float32", "float"), torch.float32),
    **dict.fromkeys(("fp16", "float16", "half"), torch.float16),
    **dict.fromkeys(("bf16", "bfloat16"), torch.bfloat16),
    **dict.fromkeys(("fp8", "fp8_e4m3", "fp8_e4m3fn", "float8_e4m3fn", "e4m3fn"), torch.float8_e4m3fn),
    **dict.fromkeys(("fp8_e5m2", "float8_e5m2", "e5m2"), torch.float8_e5m2),
}


def mode(text: str) -> str:
    """argparse type of --ltx2_mode: one of video, av, audio (or their short forms)."""
    try:
        return MODES[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"'{text}' is no mode; use video (v), av (va) or audio (a)") from None


def dtype(text: str) -> torch.dtype:
    """argparse type of the dtype flags."""
    try:
        return _DTYPES[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no dtype; use one of {', '.join(_DTYPES)}{did_you_mean(text.lower(), _DTYPES)}"
        ) from None


def dtype_name(value: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(value).removeprefix("torch.")


def device(text: str | None) -> torch.device:
    """The torch device a --device flag names, with the number of a GPU; None picks CUDA where there is one."""
    if text is None:
        text = "cuda" if torch.cuda.is_available() else "cpu"
    return exact(named_device(text))


def named_device(text: str) -> torch.device:
    """The torch device a --device flag names, as it was typed: each process gives "cuda" a number of its own.

    Raises:
        UserError: there is no such device.
    """
    try:
        chosen = torch.device(text)
    except RuntimeError as error:
        raise UserError(f"--device {text}: no such device; use cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {text}: this torch sees no CUDA device; use --device cpu or install a CUDA build")
    return chosen
