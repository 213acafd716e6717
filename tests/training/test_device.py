"""The GPU of a run has its number, without which torch refuses to limit its memory."""

from __future__ import annotations

import types

import accelerate
import pytest
import torch

from ltx2_tuner.cli import training_run, values
from ltx2_tuner.cli.config_file import parse_with_config
from ltx2_tuner.cli.ltx2_train_network import build_parser
from ltx2_tuner.cli.training_config import training_config
from ltx2_tuner.devices import exact
from ltx2_tuner.training import footprint
from ltx2_tuner.training.sources import Processes, open_sources
from tests.training.tiny import Clip, write_workspace

TOTAL = 24_000_000_000


@pytest.fixture
def gpu(monkeypatch) -> list[tuple[float, int]]:
    """A machine whose current GPU is number 1; returns the limits that are set."""
    limits = []

    def limit(fraction, device):
        limits.append((fraction, torch.cuda._utils._get_device_index(device)))  # as torch does

    properties, current = types.SimpleNamespace(total_memory=TOTAL), [1]
    for name, answer in {
        "is_available": lambda: True,
        "current_device": lambda: current[-1],
        "set_device": lambda device: current.append(device.index),
        "mem_get_info": lambda device: (TOTAL, TOTAL),
        "get_device_properties": lambda device: properties,
        "set_per_process_memory_fraction": limit,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(footprint, "measure_speed", lambda device: None)
    return limits


def join(monkeypatch, *flags: str, found: str = "cuda", count: int = 1) -> Processes:
    """What a process becomes whose device accelerate calls `found`."""
    state = types.SimpleNamespace(
        device=torch.device(found),
        is_main_process=True,
        num_processes=count,
        process_index=0,
        local_process_index=0,
        wait_for_everyone=lambda: None,
    )
    monkeypatch.setattr(accelerate, "PartialState", lambda cpu, **_: state)
    return training_run.join_processes(build_parser().parse_args(list(flags)))


def test_a_budget_limits_the_gpu_of_a_run_without_a_launcher(tmp_path, checkpoint, gpu, monkeypatch):
    space = write_workspace(tmp_path, checkpoint, [Clip(sound=17)])
    config = training_config(parse_with_config(build_parser(), space.arguments("--vram_budget", 12)), "no")
    processes = join(monkeypatch)
    sources = open_sources(config, processes)
    assert footprint.plan_memory(config, sources, processes) is not None
    assert gpu == [(pytest.approx(11.5e9 / TOTAL), 1)]


@pytest.mark.parametrize(
    ("flags", "found", "wanted"),
    [
        ([], "cuda", "cuda:1"),
        (["--device", "cuda"], "cuda", "cuda:1"),
        (["--device", "cuda"], "cuda:3", "cuda:3"),  # the launcher gave this process another one
        (["--device", "cuda:2"], "cuda", "cuda:2"),
        ([], "cpu", "cpu"),
    ],
)
def test_training_runs_where_the_flag_and_the_launcher_say(gpu, monkeypatch, flags, found, wanted):
    device = join(monkeypatch, *flags, found=found).device
    assert device == torch.device(wanted)
    assert device.type == "cpu" or torch.cuda.current_device() == device.index, "streams are made on the current one"


@pytest.mark.parametrize(
    ("text", "wanted"), [(None, "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")]
)
def test_other_scripts_run_on_a_gpu_with_its_number(gpu, text, wanted):
    assert values.device(text) == torch.device(wanted)


def test_devices_without_numbers_stay_as_they_are():
    assert exact("cpu") == torch.device("cpu") and exact(torch.device("meta")).type == "meta"
    assert values.device("cpu") == torch.device("cpu")
