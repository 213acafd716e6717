"""Last in the folder: names the case files that no test covers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden import cases


def test_case_is_covered(case_name: str, covered_cases: set[str]) -> None:
    if case_name not in covered_cases:
        pytest.skip(f"{case_name}: no feature built yet")


def test_patterns_take_and_leave_cases() -> None:
    assert cases.matches("transformer_20/av_scalar_t", ("transformer_*/av_*", "!*/av_bf16"))
    assert not cases.matches("transformer_20/av_bf16", ("transformer_*/av_*", "!*/av_bf16"))
    assert not cases.matches("audio_20/decode", ("transformer_*/av_*",))


def test_the_folder_has_cases(golden_dir: Path) -> None:
    assert cases.case_names(golden_dir), f"no golden case below {golden_dir}"
