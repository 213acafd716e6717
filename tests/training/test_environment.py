"""The estimate before a run, and whether torch has kernels for the GPU."""

from __future__ import annotations

import re

import pytest
import torch

from ltx2_tuner.errors import UserError
from ltx2_tuner.memory.options import MemoryOptions
from ltx2_tuner.memory.planner import Choice
from ltx2_tuner.training.environment import check_architecture, fitting, has_kernels
from tests.memory.test_planner import full_size


@pytest.mark.parametrize("weights", ["dense", "fp8", "nf4"])
@pytest.mark.parametrize("gigabytes", [12, 16, 24, 32, 48])
def test_the_smallest_count_of_streamed_blocks_is_told(weights, gigabytes):
    footprint = full_size("av", weights, low=True)
    line = fitting("card", MemoryOptions(), footprint, gigabytes * 1e9)

    def fits(choice: Choice) -> bool:
        return footprint.total(choice) + footprint.reserve(choice) <= gigabytes * 1e9

    counts = [n for n in range(48) if fits(Choice(n, 48))]
    counts = counts or [47] * fits(Choice(47, 48, True))
    if not counts:
        assert "does not fit" in line and "use fp8 or nf4" in line
    else:
        assert int(re.search(r"from --blocks_to_swap (\d+) on", line)[1]) == counts[0]
    assert re.search(r"[\d.]+ GiB", line)


def test_a_typed_count_is_judged_as_it_is():
    footprint = full_size("av", "dense", low=True)
    assert "does not fit" in fitting("card", MemoryOptions(blocks_to_swap=0), footprint, 24e9)
    assert "from --blocks_to_swap 47 on" in fitting("card", MemoryOptions(blocks_to_swap=47), footprint, 24e9)


@pytest.mark.parametrize(
    ("capability", "built_for", "expected"),
    [
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_80", "sm_90", "compute_90"], True),
        ((12, 0), ["sm_90", "sm_120"], True),
        ((8, 9), ["sm_80", "sm_90"], True),
        ((8, 0), ["sm_86", "sm_90"], False),
        ((7, 5), ["sm_80"], False),
        ((9, 0), ["sm_90a"], True),
        ((12, 1), ["sm_120f"], True),
        ((12, 1), ["sm_120a"], False),
        ((9, 0), [], True),
    ],
)
def test_kernels_run_on_what_they_were_built_for(capability, built_for, expected):
    assert has_kernels(capability, built_for) == expected


def test_an_old_build_names_the_one_to_install(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "RTX 5090")
    with pytest.raises(UserError, match=r"RTX 5090 is sm_120; install a newer build: .*whl/cu130"):
        check_architecture(torch.device("cuda"))
    check_architecture(torch.device("cpu"))
