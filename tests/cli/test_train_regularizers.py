"""The flags of preservation, CREPA and Self-Flow: every key, every misuse, and whole runs as users start them."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ltx2_tuner.caching.text_side_files import PreservationFile
from ltx2_tuner.checkpoint import Checkpoint
from ltx2_tuner.cli.ltx2_train_network import build_parser
from ltx2_tuner.cli.regularizers import regularizer_options
from ltx2_tuner.text_encoding import GemmaOptions, load_text_encoder, write_tiny_gemma
from ltx2_tuner.training.regularizers import CrepaOptions, RegularizerOptions, SelfFlowOptions
from tests.cli.test_train_network import errors_of, run_script
from tests.training.tiny import Clip, Workspace, write_checkpoint, write_workspace

# Every key of the documented tables with a value that is not its default, and what it is read as.
CREPA = {
    "mode": ("dino", "dino"),
    "dino_model": ("dinov2_vitg14", "dinov2_vitg14"),
    "student_block_idx": ("3", 3),
    "teacher_block_idx": ("40", 40),
    "lambda_crepa": ("0.5", 0.5),
    "tau": ("2", 2.0),
    "num_neighbors": ("0", 0),
    "schedule": ("cosine", "cosine"),
    "warmup_steps": ("10", 10),
    "max_steps": ("99", 99),
    "normalize": ("No", False),
}
SELF_FLOW = {
    "teacher_mode": ("partial_ema", "partial_ema"),
    "student_block_idx": ("3", 3),
    "teacher_block_idx": ("40", 40),
    "student_block_ratio": ("0.3", 0.3),
    "teacher_block_ratio": ("0.7", 0.7),
    "student_block_stochastic_range": ("2", 2),
    "lambda_self_flow": ("0.2", 0.2),
    "mask_ratio": ("0.5", 0.5),
    "frame_level_mask": ("yes", True),
    "mask_focus_loss": ("1", True),
    "max_loss": ("0.25", 0.25),
    "temporal_mode": ("hybrid", "hybrid"),
    "lambda_temporal": ("0.1", 0.1),
    "lambda_delta": ("0.05", 0.05),
    "temporal_tau": ("0.5", 0.5),
    "num_neighbors": ("0", 0),
    "temporal_granularity": ("patch", "patch"),
    "patch_spatial_radius": ("1", 1),
    "patch_match_mode": ("soft", "soft"),
    "patch_match_temperature": ("0.2", 0.2),
    "delta_num_steps": ("3", 3),
    "motion_weighting": ("teacher_delta", "teacher_delta"),
    "motion_weight_strength": ("0.7", 0.7),
    "temporal_schedule": ("linear", "linear"),
    "temporal_warmup_steps": ("5", 5),
    "temporal_max_steps": ("50", 50),
    "teacher_momentum": ("0.9", 0.9),
    "teacher_update_interval": ("2", 2),
    "projector_hidden_multiplier": ("2", 2),
    "projector_lr": ("1e-5", 1e-5),
    "loss_type": ("one_minus_cosine", "one_minus_cosine"),
    "dual_timestep": ("false", False),
    "tokenwise_timestep": ("0", False),
    "offload_teacher_features": ("TRUE", True),
    "offload_teacher_params": ("true", True),
}


def read(*flags: object, mode: str = "video") -> tuple[RegularizerOptions, list[str]]:
    """Options and mistakes of a command line."""
    errors: list[str] = []
    args = build_parser().parse_args(["--ltx2_mode", mode, *map(str, flags)])
    return regularizer_options(args, errors), errors


@pytest.mark.parametrize(
    ("flag", "kind", "table"), [("crepa", CrepaOptions, CREPA), ("self_flow", SelfFlowOptions, SELF_FLOW)]
)
def test_every_documented_key_is_read(flag, kind, table):
    assert set(table) == {spec.name for spec in dataclasses.fields(kind)}
    options, errors = read(f"--{flag}", f"--{flag}_args", *(f"{key}={text}" for key, (text, _) in table.items()))
    assert not errors
    found = getattr(options, flag)
    assert {key: getattr(found, key) for key in table} == {key: value for key, (_, value) in table.items()}
    defaults = kind()
    assert all(getattr(defaults, key) != value for key, (_, value) in table.items()), "each value is not the default"
    assert read(f"--{flag}") == (dataclasses.replace(RegularizerOptions(), **{flag: defaults}), [])


def test_preservation_keys():
    options, errors = read(
        *("--blank_preservation", "--blank_preservation_args", "multiplier=0.6", "--use_precached_preservation"),
        *("--dop", "--dop_args", "class=a red fox = animal", "multiplier=0.7", "--prior_divergence"),
        *("--prior_divergence_args", "multiplier=0.05", "--audio_dop", "--audio_dop_args", "multiplier=0.3"),
        mode="av",
    )
    found = options.preservation
    assert not errors
    assert (found.blank, found.dop, found.prior_divergence, found.audio_dop) == (0.6, 0.7, 0.05, 0.3)
    assert found.dop_class == "a red fox = animal"
    flags = ("--blank_preservation", "--dop", "--prior_divergence", "--audio_dop", "--use_precached_preservation")
    found = read(*flags, mode="av")[0].preservation
    assert (found.blank, found.dop, found.prior_divergence, found.audio_dop) == (1.0, 1.0, 0.1, 0.5)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--crepa", "--crepa_args", "lamda_crepa=1"], "unknown key (did you mean 'lambda_crepa'?)"),
        (["--crepa", "--crepa_args", "tau"], "--crepa_args tau: expected key=value"),
        (["--crepa", "--crepa_args", "tau=0"], "--crepa_args tau=0: must be above 0"),
        (["--crepa", "--crepa_args", "tau=x"], "--crepa_args tau=x: expected a number"),
        (["--crepa", "--crepa_args", "tau=nan"], "expected a finite number"),
        (["--crepa", "--crepa_args", "num_neighbors=1.5"], "expected a whole number"),
        (["--crepa", "--crepa_args", "num_neighbors=-1"], "num_neighbors=-1: must be at least 0"),
        (["--crepa", "--crepa_args", "lambda_crepa=-1"], "lambda_crepa=-1: must be at least 0"),
        (["--crepa", "--crepa_args", "warmup_steps=-1"], "warmup_steps=-1: must be at least 0"),
        (["--crepa", "--crepa_args", "mode=dyno"], "expected one of backbone, dino (did you mean 'dino'?)"),
        (["--crepa", "--crepa_args", "dino_model=dino"], "expected one of dinov2_vits14, dinov2_vitb14"),
        (["--crepa", "--crepa_args", "schedule=step"], "expected one of constant, linear, cosine"),
        (["--crepa", "--crepa_args", "normalize=maybe"], "expected true or false"),
        (
            ["--crepa", "--crepa_args", "teacher_block_idx=16"],
            "teacher_block_idx must be deeper than student_block_idx",
        ),
        (["--crepa", "--ltx2_mode", "audio"], "--crepa needs a video stream"),
        (["--self_flow", "--ltx2_mode", "av"], "Self-Flow needs --ltx2_mode video"),
        (["--self_flow", "--self_flow_args", "mask_ratio=0.6"], "mask_ratio=0.6: must lie between 0 and 0.5"),
        (["--self_flow", "--self_flow_args", "teacher_momentum=1"], "teacher_momentum=1: must be at least 0 and below"),
        (["--self_flow", "--self_flow_args", "teacher_update_interval=0"], "teacher_update_interval=0: must be at lea"),
        (["--self_flow", "--self_flow_args", "projector_hidden_multiplier=0"], "must be at least 1"),
        (["--self_flow", "--self_flow_args", "delta_num_steps=0"], "delta_num_steps=0: must be at least 1"),
        (["--self_flow", "--self_flow_args", "patch_spatial_radius=-1"], "must be at least 0"),
        (["--self_flow", "--self_flow_args", "motion_weight_strength=-1"], "must be at least 0"),
        (["--self_flow", "--self_flow_args", "max_loss=-1"], "must be at least 0"),
        (["--self_flow", "--self_flow_args", "temporal_tau=0"], "temporal_tau=0: must be above 0"),
        (["--self_flow", "--self_flow_args", "patch_match_temperature=0"], "must be above 0"),
        (
            ["--self_flow", "--self_flow_args", "student_block_ratio=1"],
            "student_block_ratio=1: must be above 0 and bel",
        ),
        (["--self_flow", "--self_flow_args", "projector_lr=0"], "projector_lr=0: must be above 0"),
        (["--self_flow", "--self_flow_args", "mask_focus_loss=true", "mask_ratio=0"], "needs mask_ratio above 0"),
        (["--self_flow", "--self_flow_args", "lambda_self_flow=0"], "at least one of lambda_self_flow"),
        (["--self_flow", "--self_flow_args", "lambda_temporal=1"], "temporal_mode=off has no frame term"),
        (["--self_flow", "--self_flow_args", "lambda_delta=1", "temporal_mode=frame"], "has no delta term"),
        (["--self_flow", "--self_flow_args", "teacher_block_idx=9"], "must be deeper than student_block_idx (16)"),
        (
            ["--self_flow", "--self_flow_args", "temporal_warmup_steps=5", "temporal_max_steps=5"],
            "temporal_warmup_steps=5: must be below temporal_max_steps",
        ),
        (["--dop", "--dop_args", "multiplier=-1"], "--dop_args multiplier=-1: expected a finite number of at least 0"),
        (["--dop", "--dop_args", "clas=woman"], "--dop_args clas: unknown key (did you mean 'class'?)"),
        (["--prior_divergence", "--prior_divergence_args", "class=x"], "--prior_divergence_args class: unknown key"),
        (["--prior_divergence", "--prior_divergence_args", "multiplier=inf"], "expected a finite number"),
    ],
)
def test_mistakes_are_named(flags, expected):
    _, errors = read(*flags)
    assert any(expected in error for error in errors), errors


def test_preserved_prompts_need_a_source(tmp_path, checkpoint, capsys):
    space = write_workspace(tmp_path, checkpoint)
    for flags in (["--blank_preservation"], ["--dop"], ["--dop", "--preservation_prompts_cache", "none.pt"]):
        found = errors_of(capsys, *space.arguments(*flags))
        assert "need --gemma_root, --gemma_safetensors or --use_precached_preservation to know their prompts" in found


def test_self_flow_and_sound_need_their_modes(tmp_path, checkpoint, capsys):
    space = write_workspace(tmp_path, checkpoint)
    assert "--audio_dop needs --ltx2_mode av" in errors_of(capsys, *space.arguments("--audio_dop"))
    both = errors_of(capsys, *space.arguments("--audio_dop", "--audio_silence_regularizer", "--ltx2_mode", "av"))
    assert "exclude each other" in both


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--dop", "--use_precached_preservation", "--crepa_args", "tau=2"],
            "--crepa_args has no effect without --crepa",
        ),
        (["--use_precached_preservation"], "has no effect without --blank_preservation or --dop"),
        (["--preservation_prompts_cache", "x"], "has no effect without --blank_preservation or --dop"),
        (["--dop", "--gemma_root", "x"], "no class given, the empty prompt is preserved"),
        (["--dop", "--blank_preservation", "--gemma_root", "x"], "identical to blank preservation, paid twice"),
        (["--crepa", "--crepa_args", "tau=1", "tau=2"], "tau is given twice"),
        (["--self_flow", "--self_flow_args", "temporal_mode=delta"], "no effect on deltas without lambda_delta"),
        (["--self_flow", "--self_flow_args", "temporal_schedule=linear"], "does not decay without temporal_max_steps"),
        (
            ["--self_flow", "--self_flow_args", "teacher_momentum=0.5"],
            "teacher_momentum has no effect with teacher_mode",
        ),
        (["--prior_divergence", "--prior_divergence_args", "multiplier=0"], "is off: its multiplier is 0"),
    ],
)
def test_what_has_no_effect_is_said(flags, expected, caplog):
    caplog.set_level(logging.INFO)
    _, errors = read(*flags)
    assert not errors and expected in caplog.text


@pytest.mark.parametrize(
    ("ratios", "depth", "expected"),
    [((0.3, 0.7), 48, (14, 34)), ((0.7, 0.7), 10, (7, 7)), ((0.999, 0.999), 4, (3, 3)), ((0.01, 0.01), 4, (0, 1))],
)
def test_ratios_round_towards_the_ends_and_win(ratios, depth, expected):
    options = SelfFlowOptions(student_block_ratio=ratios[0], teacher_block_ratio=ratios[1])
    assert options.blocks(depth) == expected


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


@pytest.fixture(scope="module")
def space(tmp_path_factory, checkpoint) -> Workspace:
    """Clips with and without sound, with preservation prompts and DINO features."""
    space = write_workspace(tmp_path_factory.mktemp("space"), checkpoint, (Clip(sound=12), Clip()))
    cache = space.root / "datasets"
    gemma = write_tiny_gemma(space.root / "gemma")
    encoder = load_text_encoder(
        GemmaOptions(root=gemma), Checkpoint.open(checkpoint), "av", torch.device("cpu"), torch.float32
    )
    PreservationFile(cache / "ltx2_preservation_cache.pt", True, "woman").write(encoder, "av")
    encoder.close()
    for path in cache.glob("*-017_*_ltx2.safetensors"):
        features = torch.randn(17, 1369, 384).half()
        save_file({"dino_features": features}, path.with_name(f"{path.stem}_dino.safetensors"))
    return space


EVERYTHING = ["--blank_preservation", "--dop", "--dop_args", "class=woman", "--prior_divergence", "--audio_dop"]
RUNS = {
    "preservation": ["--ltx2_mode", "av", *EVERYTHING, "--use_precached_preservation"],
    "gemma": ["--blank_preservation", "--gemma_root", "{root}/gemma"],
    "crepa": ["--crepa", "--crepa_args", "student_block_idx=0", "teacher_block_idx=1"],
    "dino": ["--crepa", "--crepa_args", "mode=dino", "dino_model=dinov2_vits14", "student_block_idx=1"],
    "self_flow": ["--self_flow", "--self_flow_args", "student_block_idx=0", "teacher_block_idx=1"],
    "ema": [
        *("--self_flow", "--self_flow_args", "student_block_idx=0", "teacher_block_idx=1", "teacher_mode=partial_ema"),
        *("temporal_mode=hybrid", "lambda_temporal=0.1", "lambda_delta=0.1", "temporal_granularity=patch"),
        *("patch_spatial_radius=1", "patch_match_mode=soft", "motion_weighting=teacher_delta", "mask_focus_loss=true"),
        *("motion_weight_strength=0.5", "offload_teacher_features=true", "offload_teacher_params=true"),
    ],
}


# What tests/training/regularizers covers within this process is started as a script in slow tests alone.
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("preservation", "crepa", "ema") else pytest.mark.slow) for name in RUNS],
)
def test_runs_from_the_command_line(space, tmp_path, name):
    flags = [flag.format(root=space.root) for flag in RUNS[name]]
    done = run_script(*space.arguments(*flags, "--max_train_steps", 2, "--save_state", "--output_dir", tmp_path))
    assert done.returncode == 0, done.stderr
    assert "extra passes a micro-batch" in done.stderr
    assert "not finite" not in done.stderr
    names = {path.name for path in (tmp_path / "tiny-state").iterdir()}
    assert ("crepa_projector.safetensors" in names) == (name in ("crepa", "dino"))
    assert ("self_flow_teacher_ema.safetensors" in names) == (name == "ema")


@pytest.mark.slow
def test_two_processes_share_projector_and_teacher(space, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29518")
    flags = [*RUNS["ema"], *RUNS["crepa"], "--blank_preservation", "--use_precached_preservation"]
    done = run_script(
        *space.arguments(*flags, "--max_train_steps", 3, "--save_state", "--output_dir", tmp_path), launcher=launcher
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "crepa_projector.safetensors").is_file()
