from __future__ import annotations

import random

import numpy as np
import torch

from ltx2_tuner.training.random import (
    DrawKey,
    default_generator_states,
    derive_seed,
    restore_default_generators,
)


def test_a_draw_depends_on_everything_it_is_for():
    base = (7, "noise", 0, 3, "")
    others = [(8, "noise", 0, 3, ""), (7, "sigma", 0, 3, ""), (7, "noise", 1, 3, ""), (7, "noise", 0, 4, "")]
    assert len({derive_seed(*key) for key in [base, *others, (7, "noise", 0, 3, "up")]}) == 6


def test_the_hash_is_the_same_on_every_machine():
    assert derive_seed(42, "noise", 1, 5) == 4212190260345839848


def test_a_key_gives_the_same_numbers_every_time():
    key = DrawKey(seed=1, rank=0, index=9)
    first, second = (torch.randn(4, generator=key.generator("noise")) for _ in range(2))
    assert torch.equal(first, second)


def test_default_generators_come_back_where_they_were():
    def numbers():
        return torch.rand(3).tolist(), np.random.normal(size=3).tolist(), [random.gauss(0, 1) for _ in range(3)]

    numbers()
    states = default_generator_states()
    expected = numbers()
    restore_default_generators(states)
    assert numbers() == expected
