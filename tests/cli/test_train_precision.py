"""Training from the command line on every kind of frozen weights, with recomputation and with streamed blocks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ltx2_tuner.checkpoint import write_tiny_checkpoint
from ltx2_tuner.checkpoint.quantise_file import quantise_checkpoint
from ltx2_tuner.cli.ltx2_train_network import main
from ltx2_tuner.lora import load_lora
from tests.training.tiny import Clip, Workspace, make_trainer, write_workspace

SCRIPT = Path(__file__).resolve().parents[2] / "ltx2_train_network.py"
# name -> (checkpoint, flags)
PRECISIONS = {
    "bf16": ("full", []),
    "fp8 cast": ("full", ["--fp8_base"]),
    "fp8 scaled": ("full", ["--fp8_base", "--fp8_scaled", "--quantize_device", "cpu"]),
    "fp8 compute": ("full", ["--fp8_base", "--fp8_scaled", "--fp8_compute"]),
    "fp8 file": ("fp8", ["--fp8_base"]),
    "nf4": ("full", ["--nf4_base", "--nf4_block_size", 16]),
    "nf4 file": ("nf4", ["--nf4_base"]),
    "loftq": ("full", ["--nf4_base", "--loftq_init"]),
    "loftq file": ("nf4", ["--nf4_base", "--loftq_init"]),
    "awq": ("full", ["--nf4_base", "--awq_calibration", "--awq_num_batches", 2]),
}
MEMORY = {
    "recomputed": ["--gradient_checkpointing"],
    "streamed": ["--blocks_to_swap", 1],
    "both": ["--blocks_to_swap", 1, "--gradient_checkpointing", "--gradient_checkpointing_cpu_offload"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {name: folder / f"{name}.safetensors" for name in ("full", "fp8", "nf4")}
    write_tiny_checkpoint(paths["full"], "2.3")
    write_tiny_checkpoint(paths["fp8"], "2.3", fp8="scaled")
    assert quantise_checkpoint(paths["full"], paths["nf4"], loftq_rank=4, progress=False)
    return paths


def workspace(folder: Path, checkpoint: Path) -> Workspace:
    return write_workspace(folder, checkpoint, [Clip(sound=17)])


def flags_of(space: Workspace, *more: object) -> list[str]:
    return space.arguments("--ltx2_mode", "av", "--dit_dtype", "bfloat16", "--max_train_steps", 2, *more)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_memory_flags_change_no_number(tmp_path, files, precision):
    checkpoint, flags = PRECISIONS[precision]
    space = workspace(tmp_path, files[checkpoint])

    def run(*more: object) -> tuple[dict, dict]:
        trainer = make_trainer(flags_of(space, *flags, *more))
        trainer.train()
        return trainer.metrics, trainer.run.network.state_dict()

    expected, trained = run("--no-gradient_checkpointing")
    for name, memory in MEMORY.items():
        metrics, state = run(*memory)
        assert metrics == expected, name
        assert all(torch.equal(tensor, trained[key]) for key, tensor in state.items()), name


GRID = [
    pytest.param(precision, memory, marks=[] if (precision, memory) == ("loftq", "both") else [pytest.mark.slow])
    for precision in PRECISIONS
    for memory in MEMORY
]


@pytest.mark.parametrize(("precision", "memory"), GRID)
def test_the_script_trains(tmp_path, files, precision, memory):
    checkpoint, flags = PRECISIONS[precision]
    space = workspace(tmp_path, files[checkpoint])
    command = [sys.executable, str(SCRIPT), *flags_of(space, *flags, *MEMORY[memory])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (space.output / "tiny.comfy.safetensors").is_file()


@pytest.mark.parametrize(
    ("checkpoint", "flags", "message"),
    [
        ("nf4", [], "add --nf4_base"),
        ("nf4", ["--fp8_base"], "add --nf4_base"),
        ("nf4", ["--nf4_base", "--awq_calibration"], "is nf4 already and --awq_calibration needs full weights"),
        ("nf4", ["--nf4_base", "--loftq_init", "--network_dim", 8], "re-run ltx2_quantize_model.py --loftq_init"),
        ("fp8", ["--fp8_base", "--fp8_scaled"], "drop --fp8_scaled"),
        ("full", ["--fp8_base", "--nf4_base"], "choose one of --fp8_base and --nf4_base"),
        ("full", ["--fp8_scaled"], "--fp8_scaled needs --fp8_base"),
        ("full", ["--loftq_init"], "--loftq_init needs --nf4_base"),
        ("full", ["--awq_calibration"], "--awq_calibration needs --nf4_base"),
        ("full", ["--nf4_base", "--loftq_init", "--network_module", "lycoris.kohya"], "for the built-in LoRA only"),
        ("full", ["--nf4_base", "--loftq_init", "--loftq_iters", 0], "--loftq_iters must be at least 1 (got 0)"),
        ("full", ["--nf4_base", "--awq_alpha", 1.5], "--awq_alpha must be between 0 and 1 (got 1.5)"),
        ("full", ["--nf4_base", "--awq_num_batches", 0], "--awq_num_batches must be at least 1 (got 0)"),
        ("full", ["--nf4_base", "--nf4_block_size", 24], "--nf4_block_size must be 16, 32, 64, 128 ... (got 24)"),
        ("full", ["--blocks_to_swap", 2], "blocks_to_swap must be at most 1 (the model has 2 blocks), got 2"),
        ("full", ["--gradient_checkpointing_cpu_offload"], "needs --gradient_checkpointing"),
    ],
)
def test_misuse_is_one_sentence(tmp_path, files, capsys, checkpoint, flags, message):
    space = workspace(tmp_path, files[checkpoint])
    assert main(flags_of(space, *flags)) == 1
    assert message in capsys.readouterr().err


def test_an_fp8_file_without_fp8_base_is_said(tmp_path, files, caplog):
    """T5: where there is room for it; with less than 48 GB of VRAM it is an error (test_flags_against_checkpoints)."""
    assert main(flags_of(workspace(tmp_path, files["fp8"]), "--preflight_only")) == 0
    assert "is an fp8 checkpoint, which takes twice its size without --fp8_base; add --fp8_base" in caplog.text


@pytest.mark.parametrize(
    ("value", "flags", "message"),
    [
        ("gpu", ["--nf4_base"], "LTX2_NF4_CALC_DEVICE is cuda, but this torch sees no CUDA device"),
        ("there", ["--nf4_base"], "LTX2_NF4_CALC_DEVICE is there; set it to cpu or cuda"),
        ("gpu", ["--fp8_base", "--fp8_scaled"], "LTX2_FP8_CALC_DEVICE is cuda, but this torch sees no CUDA device"),
        ("gpu", ["--nf4_base", "--quantize_device", "cpu"], None),
        ("gpu", ["--fp8_base", "--fp8_scaled", "--quantize_device", "cpu"], None),
        ("gpu", [], None),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_the_environment_says_where_weights_are_quantised(tmp_path, files, capsys, monkeypatch, value, flags, message):
    monkeypatch.setenv(f"LTX2_{'FP8' if '--fp8_base' in flags else 'NF4'}_CALC_DEVICE", value)
    space = workspace(tmp_path, files["full"])
    assert main(flags_of(space, *flags)) == (0 if message is None else 1)
    assert message is None or message in capsys.readouterr().err


def test_a_comfy_file_leaves_out_what_loftq_began_with(tmp_path, files):
    """The original file adds to the nf4 base, the ComfyUI file to the full weights: both make the same layer."""
    space = workspace(tmp_path, files["full"])
    flags = flags_of(space, "--nf4_base", "--loftq_init", "--network_alpha", 2, "--learning_rate", 1e-2)
    trainer = make_trainer(flags)
    layers = dict(trainer.run.network.adapters())
    path = "transformer_blocks.1.attn1.to_q"
    base = trainer.run.model.get_submodule(path).base.dense(torch.float32)
    start = layers[path].delta()
    trainer.train()
    original = load_lora(space.output / "tiny.safetensors").modules[path].delta()
    comfy = load_lora(space.output / "tiny.comfy.safetensors").modules[path]
    assert comfy.rank == 8
    torch.testing.assert_close(original, layers[path].delta())
    torch.testing.assert_close(comfy.delta(), original - start, atol=1e-6, rtol=1e-5)
    assert comfy.delta().abs().max() > 1e-4
    full = load_file(files["full"])[f"model.diffusion_model.{path}.weight"].float()
    assert (full - base - start).norm() < 0.9 * (full - base).norm()
    with safe_open(space.output / "tiny.comfy.safetensors", "pt") as file:
        assert file.metadata()["ss_loftq_init"] == "True"
        assert "taken out" in file.metadata()["ss_loftq_start"]
    side = load_file(space.output / "tiny.loftq_init.safetensors")
    name = "lora_unet_model_transformer_blocks_1_attn1_to_q"
    torch.testing.assert_close(side[f"{name}.lora_B"] @ side[f"{name}.lora_A"], start)


def test_a_state_is_not_resumed_on_another_base(tmp_path, files, capsys):
    space = workspace(tmp_path, files["full"])
    loftq = ["--nf4_base", "--loftq_init", "--save_state"]
    assert main(flags_of(space, *loftq)) == 0
    resume = ["--resume", space.output / "tiny-state", "--max_train_steps", 3]
    assert main(flags_of(space, *loftq, "--loftq_iters", 1, *resume)) == 1
    assert "loftq was" in capsys.readouterr().err
    assert main(flags_of(space, *loftq, *resume)) == 0


def test_network_weights_win_over_loftq(tmp_path, files):
    space = workspace(tmp_path, files["full"])
    assert main(flags_of(space)) == 0
    plain = make_trainer(flags_of(space, "--nf4_base"))
    weights = ["--network_weights", space.output / "tiny.safetensors"]
    warm = make_trainer(flags_of(space, "--nf4_base", "--loftq_init", *weights))
    path = "transformer_blocks.0.attn1.to_q"
    bases = [trainer.run.model.get_submodule(path).base.codes for trainer in (plain, warm)]
    assert torch.equal(*bases), "the base that start values go with is no base for other values"
    assert warm.run.saver.loftq is None
