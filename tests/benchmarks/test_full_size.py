"""The benchmarks of whole scripts, on a small checkpoint and small caches made by full_size.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import combined, full_size, start_up
from benchmarks.processes import run_watched
from ltx2_tuner.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--layers", "4", "--width_divisor", "32", "--size", "64", "64", "--frames", "17", "--tokens", "16"]
CREPA = ["--crepa_args", "student_block_idx=1", "teacher_block_idx=2"]
ABSENT = ("av", "bitsandbytes", "toml", "matplotlib", "wandb", "lycoris")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("full")
    full_size.main([str(path), *SMALL, "--device", "cpu", "--items", "2"])
    return path


def test_the_checkpoint_is_one_of_the_released_version(folder) -> None:
    checkpoint = Checkpoint.open(folder / full_size.CHECKPOINT)
    names = checkpoint.component("transformer")
    weight = checkpoint.read(names["transformer_blocks.3.ff.net.2.weight"])
    checkpoint.close()
    assert checkpoint.version == "2.3" and not checkpoint.is_fp8
    assert {checkpoint.entry(name).dtype for name in names.values()} == {torch.bfloat16}
    assert weight.float().std() == pytest.approx(weight.shape[1] ** -0.5, rel=0.05)
    assert not list(folder.glob(".*.tmp"))


def test_the_full_one_has_the_released_number_of_parameters() -> None:
    config = full_size.TransformerConfig.from_dict(full_size.transformer_section(48, 1))
    with torch.device("meta"):
        model = full_size.LTXTransformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 18_988_838_144


def test_the_trainer_runs_on_them_with_and_without_regularizers(folder, capsys, monkeypatch) -> None:
    monkeypatch.setattr(combined, "WARM_UP", 1)
    more = ["--device", "cpu", "--blocks_to_swap", "3", "--cache_check_mode", "error", *CREPA]
    assert combined.main([str(folder), "--steps", "2", "--", *more]) == 0
    plain, regularized = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (plain["run"], regularized["run"]) == ("plain", "regularized")
    assert plain["steps"] == regularized["steps"] == 2 and plain["sec"] > 0 and regularized["sec"] > 0
    assert "loss/audio" in plain["losses"] and "loss/dop" not in plain["losses"]
    assert regularized["losses"]["loss/dop"] > 0 and "loss/crepa" in regularized["losses"]
    assert plain["peak_gib"] is None and plain["host_peak_gib"] > 0.1


def test_a_run_that_fails_shows_in_the_status(folder, capsys) -> None:
    assert combined.main([str(folder), "--runs", "plain", "--", "--blocks_to_swap", "99", "--device", "cpu"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["sec"] is None and "blocks_to_swap must be at most 3" in shown.err


def test_the_weights_are_counted_in_the_precision_of_the_run(folder) -> None:
    flags = ["--ltx2_checkpoint", str(folder / full_size.CHECKPOINT), "--dataset_config", "data.toml"]
    dense = start_up.weight_bytes(flags)
    assert dense == pytest.approx((folder / full_size.CHECKPOINT).stat().st_size, rel=0.02)
    assert dense / 2 < start_up.weight_bytes([*flags, "--fp8_base", "--fp8_scaled"]) < dense


def test_the_trainer_needs_no_package_that_only_other_scripts_use(folder, tmp_path) -> None:
    blocked = f"import sys; sys.modules |= dict.fromkeys({ABSENT!r}); "
    program = f"{blocked}from ltx2_tuner.cli.ltx2_train_network import main; raise SystemExit(main())"
    flags = ["--ltx2_checkpoint", folder / full_size.CHECKPOINT, "--dataset_config", folder / full_size.DATASET]
    flags += ["--output_dir", tmp_path, "--output_name", "lean", "--max_train_steps", "1", "--ltx2_mode", "av"]
    flags += ["--optimizer_type", "AdamW", "--learning_rate", "1e-4", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT)))}
    command = [sys.executable, "-c", program, *map(str, flags)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "lean.safetensors").is_file() and (tmp_path / "lean.report.html").is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="tells kinds of memory apart in /proc")
def test_memory_of_mapped_files_is_not_counted_but_shared_memory_is(tmp_path) -> None:
    big, mebi = tmp_path / "big", 1 << 20
    big.write_bytes(bytes(300 * mebi))
    hold = (
        "import mmap, time; "
        f"file = open({str(big)!r}, 'rb'); mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); "
        "touched = sum(mapped[::4096]); own = bytearray(b'x') * (100 << 20); "
        "shared = mmap.mmap(-1, 60 << 20); shared.write(b'x' * (60 << 20)); time.sleep(0.6)"
    )
    outcome = run_watched([sys.executable, "-c", hold])
    assert outcome.status == 0, outcome.error_text
    assert 160 * mebi < outcome.host_peak < 290 * mebi
