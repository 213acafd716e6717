"""Whole runs with regularizers: what is logged, saved and resumed, and that nothing changes when they are off."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx2_tuner.caching.text_side_files import PreservationFile
from ltx2_tuner.checkpoint import Checkpoint
from ltx2_tuner.data.cache_files import write_latents
from ltx2_tuner.errors import UserError
from ltx2_tuner.models.transformer import TransformerConfig
from ltx2_tuner.text_encoding import GemmaOptions, load_text_encoder, write_tiny_gemma
from ltx2_tuner.training.regularizers import PreservationOptions
from ltx2_tuner.training.regularizers.prompts import read_prompts
from tests.training.test_resume import same_files
from tests.training.tiny import (
    Clip,
    Recorder,
    Workspace,
    make_trainer,
    train,
    write_checkpoint,
    write_workspace,
)

CREPA = ("--crepa", "--crepa_args", "student_block_idx=0", "teacher_block_idx=1")
SELF_FLOW = ("--self_flow", "--self_flow_args", "student_block_idx=0", "teacher_block_idx=1")
EMA = (*SELF_FLOW, "teacher_mode=ema", "teacher_momentum=0.5", "temporal_mode=hybrid", "lambda_temporal=0.1")


@pytest.fixture
def space(tmp_path, checkpoint) -> Workspace:
    return write_workspace(tmp_path, checkpoint)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return write_tiny_gemma(tmp_path_factory.mktemp("gemma"))


def write_prompts(space: Workspace, gemma, mode: str, class_prompt: str = "woman", folder=None):
    """The preservation cache of a workspace, as the text script writes it."""
    encoder = load_text_encoder(
        GemmaOptions(root=gemma), Checkpoint.open(space.checkpoint), mode, torch.device("cpu"), torch.float32
    )
    path = (folder or space.root / "datasets") / "ltx2_preservation_cache.pt"
    PreservationFile(path, True, class_prompt).write(encoder, mode)
    encoder.close()
    return path


def losses(recorder: Recorder, *names: str) -> list[list[float]]:
    return [recorder.values(name) for name in names]


def test_off_is_as_if_they_did_not_exist(space, caplog):
    """Multipliers of 0 and no flag at all: the same losses and the same adapter, bit for bit, and no new group."""
    caplog.set_level(logging.INFO)
    plain = train(space.arguments("--save_state"))
    first = load_file(space.output / "tiny.safetensors")
    off = ["--prior_divergence", "--prior_divergence_args", "multiplier=0", "--blank_preservation"]
    off += ["--blank_preservation_args", "multiplier=0"]
    trainer = make_trainer(space.arguments("--save_state", *off), recorder := Recorder())
    assert len(trainer.run.regularizers) == 0 and trainer.run.model.block_outputs is None
    assert list(trainer.run.group_names) == ["unet"]
    trainer.train()
    names = ("loss/current", "loss/video", "grad_norm/total")
    assert losses(plain, *names) == losses(recorder, *names)
    second = load_file(space.output / "tiny.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "--prior_divergence is off: its multiplier is 0" in caplog.text
    assert not (space.output / "crepa_projector.safetensors").exists()


def test_crepa_and_self_flow_resume_to_the_bit(tmp_path, space):
    flags = [*CREPA, "warmup_steps=2", *EMA, "teacher_update_interval=2", "--save_state", "--save_every_n_steps", 3]
    flags += ["--max_train_steps", 6, "--gradient_accumulation_steps", 2, "--lr_scheduler", "cosine"]
    whole = train(space.arguments(*flags, "--output_dir", tmp_path / "whole"))
    middle = tmp_path / "whole" / "tiny-step00000003-state"
    rest = train(space.arguments(*flags, "--output_dir", tmp_path / "rest", "--resume", middle))
    for name in ("loss/current", "loss/crepa", "loss/self_flow", "self_flow/frame_cosine", "lr/crepa_projector"):
        expected = [metrics[name] for metrics in whole.steps if metrics["step"] > 3 and name in metrics]
        assert rest.values(name) == expected and len(expected) == 3, name
    files = ("network", "optimizer", "crepa_projector", "self_flow_projector", "self_flow_teacher_ema")
    states = [tmp_path / name / "tiny-state" for name in ("whole", "rest")]
    same_files(*states, *(f"{file}.safetensors" for file in files))
    same_files(tmp_path / "whole", tmp_path / "rest", "crepa_projector.safetensors")
    names = {metric for metrics in whole.steps for metric in metrics if metric.startswith("self_flow/")}
    scalars = ["cosine", "frame_cosine", "lambda_self_flow", "lambda_temporal", "lambda_delta"]
    scalars += ["masked_token_ratio", "tau_mean", "tau_min_mean"]
    assert names == {f"self_flow/{name}" for name in scalars}
    assert not any("projector" in key for key in load_file(tmp_path / "whole" / "tiny.safetensors"))


def test_projectors_are_trained_clipped_and_have_their_rates(space):
    flags = [*CREPA, *SELF_FLOW, "projector_lr=0.0005", "--max_train_steps", 2, "--max_grad_norm", 1e-3]
    trainer = make_trainer(space.arguments(*flags), recorder := Recorder())
    modules = {extra.name: extra.module for extra in trainer.run.regularizers.trained()}
    before = {name: next(module.parameters()).detach().clone() for name, module in modules.items()}
    trainer.train()
    for name, module in modules.items():
        assert not torch.equal(before[name], next(module.parameters())), name
        assert {id(p) for p in module.parameters()} <= {id(p) for p in trainer.run.gradients.parameters}
    assert recorder.values("lr/crepa_projector") == pytest.approx([1e-3] * 2)
    assert recorder.values("lr/self_flow_projector") == pytest.approx([5e-4] * 2)


def test_a_state_may_lack_or_have_more_than_this_run(space, caplog):
    """Groups are matched by name: the adapter's moments stay its own."""
    train(space.arguments(*CREPA, "--save_state", "--max_train_steps", 2))
    state = space.output / "tiny-state"
    moments = load_file(state / "optimizer.safetensors")
    trainer = make_trainer(space.arguments(*SELF_FLOW, "--resume", state, "--max_train_steps", 4))
    assert "the projector starts fresh" in caplog.text
    optimizer = trainer.run.optimizer
    assert list(trainer.run.group_names) == ["unet", "self_flow_projector"]
    first = optimizer.param_groups[0]["params"][0]
    assert torch.equal(optimizer.state[first]["exp_avg"], moments["optimizer.state.0.exp_avg"])
    assert not any(parameter in optimizer.state for parameter in optimizer.param_groups[1]["params"])
    trainer.train()
    assert trainer.progress.step == 4
    plain = make_trainer(space.arguments("--resume", state, "--max_train_steps", 4))
    plain.train()
    assert plain.progress.step == 4


def test_the_projector_goes_on_from_the_output_folder(space, caplog):
    train(space.arguments(*CREPA, "--max_train_steps", 2))
    kept = load_file(space.output / "crepa_projector.safetensors")
    trainer = make_trainer(space.arguments(*CREPA))
    (extra,) = trainer.run.regularizers.trained()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in extra.module.state_dict().items())
    train(space.arguments("--save_state", "--max_train_steps", 2))
    resumed = make_trainer(space.arguments(*CREPA, "--resume", space.output / "tiny-state"))
    (extra,) = resumed.run.regularizers.trained()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in extra.module.state_dict().items())


@pytest.mark.parametrize("memory", [(), ("--blocks_to_swap", 1), ("--blocks_to_swap", 1, "--gradient_checkpointing")])
def test_streaming_and_recomputation_change_no_loss(tmp_path, checkpoint, gemma, memory):
    space = write_workspace(tmp_path, checkpoint, (Clip(sound=12), Clip()))
    write_prompts(space, gemma, "av")
    every = [*CREPA, "--blank_preservation", "--dop", "--dop_args", "class=woman", "--prior_divergence", "--audio_dop"]
    flags = ["--ltx2_mode", "av", *every, "--use_precached_preservation", "--nf4_base", "--seed", 3]
    plain = train(space.arguments(*flags))
    found = train(space.arguments(*flags, *memory, "--output_dir", tmp_path / "other"))
    names = ("loss/current", "loss/crepa", "loss/blank_pres", "loss/dop", "loss/prior_div", "loss/audio_dop")
    assert losses(found, *names, "grad_norm/total") == losses(plain, *names, "grad_norm/total")
    assert [len(values) for values in losses(plain, *names)] == [4, 4, 4, 4, 4, 2]
    # A network that starts without effect differs from the plain model from the second step on.
    for values in losses(plain, *names[2:5]):
        assert values[0] == 0 and all(value != 0 for value in values[1:])


def test_prompts_encoded_at_the_start_are_those_of_the_cache(tmp_path, checkpoint, gemma):
    space = write_workspace(tmp_path, checkpoint, (Clip(sound=12), Clip()))
    write_prompts(space, gemma, "av")
    flags = ["--ltx2_mode", "av", "--blank_preservation", "--dop", "--dop_args", "class=woman", "multiplier=0.5"]
    cached = make_trainer(space.arguments(*flags, "--use_precached_preservation"))
    encoded = make_trainer(space.arguments(*flags, "--gemma_root", gemma))
    for mine, theirs in zip(cached.run.regularizers.members, encoded.run.regularizers.members, strict=True):
        assert mine.metric == theirs.metric and mine.multiplier == theirs.multiplier
        assert mine.prompt.mask is None and theirs.prompt.mask is None, "all tokens are real"
        for name in ("video", "audio"):
            assert torch.equal(getattr(mine.prompt, name), getattr(theirs.prompt, name)), name


def test_a_cache_without_sound_preserves_the_picture_and_says_so(tmp_path, checkpoint, gemma, caplog):
    space = write_workspace(tmp_path, checkpoint, (Clip(sound=12), Clip()))
    path = write_prompts(space, gemma, "video", folder=tmp_path)
    flags = ["--blank_preservation", "--use_precached_preservation", "--preservation_prompts_cache", path]
    found = train(space.arguments("--ltx2_mode", "av", *flags))
    assert caplog.text.count("the picture alone is preserved") == 1
    assert len(found.values("loss/blank_pres")) == 4
    model = TransformerConfig.from_dict(Checkpoint.open(checkpoint).config["transformer"])
    with pytest.raises(UserError, match=r"holds no sound embedding for --blank_preservation; run .*--ltx2_mode audio"):
        read_prompts(path, PreservationOptions(blank=1.0), "audio", model)


def test_caches_that_do_not_fit_are_refused(space, gemma):
    flags = ["--dop", "--dop_args", "class=cat", "--use_precached_preservation"]
    with pytest.raises(UserError, match=r"no such file; run ltx2_cache_text_encoder_outputs.py .*--dop_class_prompt"):
        make_trainer(space.arguments(*flags))
    path = write_prompts(space, gemma, "video")
    with pytest.raises(UserError, match="for the class 'woman', but --dop_args says class=cat"):
        make_trainer(space.arguments(*flags))
    trainer = make_trainer(space.arguments("--dop", "--use_precached_preservation"))
    assert len(trainer.run.regularizers) == 1, "the class of the cache is taken"
    document = torch.load(path, weights_only=True)
    for change, expected in (
        ({"dop_embed": None}, "holds no prompt for --dop"),
        ({"dop_embed": torch.zeros(16, 5)}, "the checkpoint takes width 64"),
        ({"dop_mask": torch.ones(3)}, "the checkpoint takes width 64"),
    ):
        torch.save({**document, **change}, path)
        with pytest.raises(UserError, match=expected):
            make_trainer(space.arguments("--dop", "--use_precached_preservation"))


def write_features(space: Workspace, model: str = "dinov2_vits14", width: int = 384, count: int = 3) -> None:
    for path in sorted((space.root / "datasets").glob("*-017_*_ltx2.safetensors"))[:count]:
        features = torch.randn(17, 1369, width).half()
        save_file({"dino_features": features}, path.with_name(f"{path.stem}_dino.safetensors"), {"dino_model": model})


def test_dino_mode_reads_what_was_cached(space, caplog):
    flags = ("--crepa", "--crepa_args", "mode=dino", "dino_model=dinov2_vits14", "student_block_idx=1")
    with pytest.raises(UserError, match=r"the caches hold none; run ltx2_cache_dino_features\.py"):
        make_trainer(space.arguments(*flags))
    write_features(space, count=2)
    found = train(space.arguments(*flags, "--max_train_steps", 3))
    assert "1 of 3 items have no DINO features" in caplog.text
    assert len(found.values("loss/crepa")) == 2
    with pytest.raises(UserError, match="features of dinov2_vits14"):
        make_trainer(space.arguments("--crepa", "--crepa_args", "mode=dino", "student_block_idx=1"))


def test_blocks_that_the_model_lacks_are_named(space, checkpoint):
    for flags, expected in (
        (("--crepa",), "--crepa_args: block 32 does not exist, the model's blocks are 0 to 1"),
        (("--self_flow",), "--self_flow_args: block 16 does not exist"),
        (
            ("--self_flow", "--self_flow_args", "student_block_ratio=0.9", "teacher_block_ratio=0.2"),
            "teacher block 1 must be deeper than the student block 1",
        ),
    ):
        with pytest.raises(UserError, match=expected):
            make_trainer(space.arguments(*flags))


def test_references_go_with_all_but_self_flow(tmp_path, checkpoint, gemma):
    references = tmp_path / "references"
    place = references.as_posix()
    options = f"reference_cache_directory = '{place}'\nreference_directory = '{place}'\n"
    space = write_workspace(tmp_path, checkpoint, options=options)
    references.mkdir()
    for path in (tmp_path / "datasets").glob("*_ltx2.safetensors"):
        write_latents(references / path.name, torch.randn(8, 1, 2, 2), {"frame_count": 1})
    write_prompts(space, gemma, "video")
    flags = ["--ic_lora_strategy", "v2v", *CREPA, "--prior_divergence", "--blank_preservation"]
    found = train(space.arguments(*flags, "--use_precached_preservation"))
    assert [len(found.values(f"loss/{name}")) for name in ("crepa", "prior_div", "blank_pres")] == [4, 4, 4]
    with pytest.raises(UserError, match="--self_flow is not supported with reference tokens"):
        make_trainer(space.arguments("--ic_lora_strategy", "v2v", *SELF_FLOW))


def test_validation_and_previews_feed_nothing(tmp_path, checkpoint):
    """A run with validation trains as one without."""
    space = write_workspace(tmp_path, checkpoint, validation=[Clip()])
    flags = [*CREPA, *EMA]
    plain = train(space.arguments(*flags))
    checked = train(space.arguments(*flags, "--validate_every_n_steps", 1, "--output_dir", tmp_path / "other"))
    names = ("loss/current", "loss/crepa", "loss/self_flow")
    assert losses(plain, *names) == losses(checked, *names)
    assert len(checked.values("val_loss")) == 4


def test_rehearsals_run_the_extra_passes_and_log_nothing(space):
    """What is tried before the run takes the memory that steps will take; the run itself is unchanged."""
    flags = [*CREPA, *EMA, "--prior_divergence"]
    plain = train(space.arguments(*flags))
    (space.output / "crepa_projector.safetensors").unlink()
    trainer = make_trainer(space.arguments(*flags), recorder := Recorder())
    forwards = []
    trainer.run.model.transformer_blocks[0].register_forward_hook(lambda *_: forwards.append(1))
    trainer.run.data.set_epoch(1)
    trainer.rehearse(next(iter(trainer.run.data)))
    assert len(forwards) == 3, "the teacher's, the plain model's and the main pass"
    trainer.run.optimizer.zero_grad(set_to_none=True)
    assert trainer.run.regularizers.metrics() == {}
    trainer.train()
    names = ("loss/current", "loss/crepa", "loss/self_flow", "loss/prior_div")
    assert losses(plain, *names) == losses(recorder, *names)


def test_the_start_tells_the_extra_passes(space, gemma, caplog):
    caplog.set_level(logging.INFO)
    write_prompts(space, gemma, "video")
    make_trainer(space.arguments(*CREPA, "--prior_divergence", "--blank_preservation", "--use_precached_preservation"))
    expected = "extra passes a micro-batch: crepa none; prior_div +1 forward; blank_pres +2 forward +1 backward"
    assert expected in caplog.text
    assert caplog.text.count("extra passes") == 1


def test_five_layers_with_a_moving_student(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "five.safetensors", layers=5)
    space = write_workspace(tmp_path, checkpoint)
    more = ["student_block_stochastic_range=2", "student_block_ratio=0.3", "teacher_block_ratio=0.7", "max_loss=0.05"]
    found = train(space.arguments("--self_flow", "--self_flow_args", *more, "--max_train_steps", 6))
    assert all(abs(value) <= 0.05 + 1e-6 for value in found.values("loss/self_flow"))
