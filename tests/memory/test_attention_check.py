"""A kernel that miscomputes is not used, one that does not run is named."""

from __future__ import annotations

import logging

import pytest
import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.memory import attention_check
from ltx2_tuner.memory.attention_check import usable_backend
from ltx2_tuner.models.transformer.attention_backends import sdpa

CPU = torch.device("cpu")


def forgets_the_mask(query, key, value, mask=None):
    return sdpa(query, key, value)


def wrong_gradient(query, key, value, mask=None):
    return sdpa(query, key, value.detach() + 0.5 * (value - value.detach()), mask)


def gives_nan(query, key, value, mask=None):
    return sdpa(query, key, value, mask) * float("nan")


def does_not_run(query, key, value, mask=None):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


@pytest.mark.parametrize("kernel", [forgets_the_mask, wrong_gradient, gives_nan])
def test_a_wrong_kernel_is_replaced(monkeypatch, caplog, kernel):
    monkeypatch.setattr(attention_check, "attention_function", lambda name: kernel)
    with caplog.at_level(logging.WARNING):
        assert usable_backend("flash_attn", CPU) == "sdpa"
    assert "--flash_attn: its results differ" in caplog.text


def test_a_right_kernel_is_kept(monkeypatch, caplog):
    noisy = lambda *arguments: sdpa(*arguments) * 1.005  # noqa: E731
    monkeypatch.setattr(attention_check, "attention_function", lambda name: noisy)
    assert usable_backend("flash3", CPU) == "flash3" and not caplog.text
    assert usable_backend("sdpa", CPU) == "sdpa"


def test_a_kernel_that_does_not_run_is_an_error(monkeypatch):
    monkeypatch.setattr(attention_check, "attention_function", lambda name: does_not_run)
    with pytest.raises(UserError, match=r"--flash_attn: its kernel does not run on cpu \(FlashAttention only.*--sdpa"):
        usable_backend("flash_attn", CPU)
