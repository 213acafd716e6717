"""The step benchmark runs without a GPU, in every precision, and its arithmetic is that of the model."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import train_step

SMALL = ["--layers", "2", "--width_divisor", "8", "--size", "64", "64", "--frames", "9", "--device", "cpu"]
FIELDS = (
    "precision recompute blocks_to_swap mode frames size tokens rank sec peak_gib host_peak_gib tflops mfu gpu torch"
)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--precision", "bf16"],
        ["--precision", "fp8", "--recompute", "full"],
        ["--precision", "fp8_compute", "--mode", "video"],
        ["--precision", "nf4", "--recompute", "full", "--blocks_to_swap", "1", "--lora_dtype", "bfloat16"],
    ],
    ids=lambda arguments: arguments[1],
)
def test_prints_one_line_that_says_what_was_measured(arguments: list[str], capsys, monkeypatch) -> None:
    monkeypatch.setattr(train_step, "WARM_UP", 0)
    monkeypatch.setattr(train_step, "MEASURED", 1)
    line = train_step.main([*SMALL, *arguments])
    assert json.loads(capsys.readouterr().out) == line
    assert set(FIELDS.split()) <= set(line)
    assert line["sec"] > 0 and line["precision"] == arguments[1]
    assert line["tokens"]["video"] == 2 * 2 * 2
    assert line["graphs"] is False and line["compiled"] is False
    assert line["levels"] == 2 and line["dynamic"] == "false"


@pytest.mark.parametrize(
    ("flags", "expected"), [([], False), (["--dynamic", "auto"], None), (["--dynamic", "true"], True)]
)
def test_shapes_are_symbolic_where_that_is_asked_for(flags: list[str], expected: bool | None, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("ltx2_tuner.memory.prepare.compile_blocks", lambda _blocks, **how: asked.append(how["dynamic"]))
    train_step.Step(train_step.parse_arguments([*SMALL, "--compile", *flags]), torch.device("cpu"))
    assert asked == [expected]


@pytest.mark.parametrize("mode", ["av", "video", "audio"])
@pytest.mark.parametrize("levels", [1, 2])
def test_the_first_frame_is_clean_unless_there_is_one_level(mode: str, levels: int) -> None:
    flags = [*SMALL, "--mode", mode, *(["--levels", "1"] if levels == 1 else [])]
    args = train_step.parse_arguments(flags)
    given = train_step.inputs(args, train_step.configuration(args), torch.device("cpu"))
    video, audio = given["video"], given["audio"]
    if audio is not None:
        assert audio.timestep_index is None and audio.timesteps.tolist() == [[pytest.approx(0.7)]]
    if video is not None and levels == 1:
        assert video.timestep_index is None and video.timesteps.shape == (1, 1)
    elif video is not None:
        of_token = video.timesteps[0, video.timestep_index[0]].tolist()
        assert of_token == pytest.approx([0.0] * 4 + [0.7] * 4), "of two frames of four tokens"


@pytest.mark.parametrize("ring", [1, 3])
def test_the_ring_is_as_large_as_asked_for(ring: int) -> None:
    args = train_step.parse_arguments([*SMALL, "--layers", "4", "--blocks_to_swap", "3", "--ring", str(ring)])
    step = train_step.Step(args, torch.device("cpu"))
    block = max(memory.bytes.numel() for memory in step.plan.store._host.values())
    assert step.plan.store.device_bytes == ring * block


def test_counts_the_arithmetic_of_a_pass_at_full_size() -> None:
    config = train_step.TransformerConfig(num_layers=48)
    assert train_step.flops(config, 2688, 49) == pytest.approx(81.7e12, rel=0.01)


@pytest.mark.parametrize(
    ("flags", "recomputed"),
    [
        ([], 0),
        (["--recompute", "full"], 2),
        (["--recompute", "auto"], 0),
        (["--recompute", "auto", "--vram_budget", "50"], 0),
        (["--recompute", "auto", "--vram_budget", "0.5"], 2),
    ],
)
def test_auto_recomputes_what_the_budget_asks_for(flags: list[str], recomputed: int, monkeypatch) -> None:
    monkeypatch.setattr(train_step, "WARM_UP", 0)
    monkeypatch.setattr(train_step, "MEASURED", 1)
    assert train_step.main([*SMALL, *flags])["recomputed_blocks"] == recomputed
