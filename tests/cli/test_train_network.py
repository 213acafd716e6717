"""ltx2_train_network.py from the command line."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ltx2_tuner.cli.ltx2_train_network import build_parser, main
from tests.training.tiny import Clip, Workspace, read_json, write_checkpoint, write_workspace

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "ltx2_train_network.py"
DOCUMENTED = """
config_file dataset_config dataset_manifest ltx2_mode ltx_mode ltx2_audio_only_model ltx_version ltx_version_check_mode
cache_check_mode dit vae vae_dtype dit_dtype device seed disable_numpy_memmap mixed_precision fp8_base fp8_scaled
fp8_scale_mode fp8_compute nf4_base nf4_block_size quantize_device loftq_init loftq_iters awq_calibration awq_alpha
awq_num_batches vram_budget blocks_to_swap use_pinned_memory_for_block_swap block_swap_h2d_only block_swap_ring_size
gradient_checkpointing gradient_checkpointing_cpu_offload ffn_chunk_target ffn_chunk_size split_attn_target
split_attn_mode split_attn_chunk_size split_attn sdpa flash_attn flash3 xformers sage_attn img_in_txt_in_offloading
compile compile_backend compile_mode compile_dynamic compile_fullgraph compile_cache_size_limit dynamo_backend
dynamo_mode dynamo_fullgraph dynamo_dynamic cuda_allow_tf32 cuda_cudnn_benchmark network_module network_dim
network_alpha network_dropout network_args lora_target_preset ic_lora_strategy lycoris_config init_lokr_norm
network_weights dim_from_weights scale_weight_norms base_weights base_weights_multiplier training_comment no_metadata
learning_rate audio_lr lr_args optimizer_type optimizer_args max_grad_norm lr_scheduler lr_warmup_steps lr_decay_steps
lr_scheduler_num_cycles lr_scheduler_power lr_scheduler_timescale lr_scheduler_min_lr_ratio lr_scheduler_type
lr_scheduler_args gradient_accumulation_steps max_train_steps max_train_epochs max_data_loader_n_workers
persistent_data_loader_workers ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph full_fp16 full_bf16
timestep_sampling logit_mean logit_std min_timestep max_timestep preserve_distribution_shape shifted_logit_mode
shifted_logit_eps shifted_logit_uniform_prob shifted_logit_shift num_timestep_buckets show_timesteps discrete_flow_shift
sigmoid_scale mode_scale weighting_scheme guidance_scale loss_type huber_delta video_loss_weight audio_loss_weight
audio_loss_balance_mode audio_loss_balance_min audio_loss_balance_max audio_loss_balance_beta audio_loss_balance_eps
audio_loss_balance_ema_init audio_loss_balance_target_ratio audio_loss_balance_ema_decay separate_audio_buckets
audio_bucket_strategy audio_bucket_interval min_audio_batches_per_accum audio_batch_probability caption_dropout_rate
caption_dropout_mode independent_audio_timestep audio_silence_regularizer audio_silence_regularizer_weight
audio_supervision_mode audio_supervision_warmup_steps audio_supervision_check_interval audio_supervision_min_ratio
audio_only_sequence_resolution reference_downscale reference_frames ltx2_first_frame_conditioning_p
audio_ref_use_negative_positions audio_ref_mask_cross_attention_to_reference
audio_ref_mask_reference_from_text_attention audio_ref_identity_guidance_scale caption_field debug_dataset
blank_preservation blank_preservation_args dop dop_args prior_divergence prior_divergence_args audio_dop audio_dop_args
use_precached_preservation preservation_prompts_cache crepa crepa_args self_flow self_flow_args sample_prompts
sample_at_first sample_every_n_steps sample_every_n_epochs height width sample_num_frames sample_with_offloading
sample_tiled_vae sample_vae_tile_size sample_vae_tile_overlap sample_vae_temporal_tile_size
sample_vae_temporal_tile_overlap sample_merge_audio sample_audio_only sample_disable_audio sample_audio_subprocess
sample_disable_flash_attn sample_i2v_token_timestep_mask sample_include_reference precache_sample_prompts
use_precached_sample_prompts sample_prompts_cache use_precached_sample_latents sample_latents_cache sample_two_stage
spatial_upsampler_path distilled_lora_path sample_stage2_steps vae_chunk_size sample_sampling_preset video_cfg_scale
audio_cfg_scale video_modality_scale audio_modality_scale video_rescale_scale audio_rescale_scale stg_scale stg_blocks
validate_every_n_steps validate_every_n_epochs output_dir output_name save_every_n_epochs save_every_n_steps
save_last_n_epochs save_last_n_steps save_last_n_epochs_state save_last_n_steps_state save_state
save_state_on_train_end resume autoresume save_precision no_convert_to_comfy no_save_original_lora
save_checkpoint_metadata metadata_title metadata_author metadata_description metadata_license metadata_tags
metadata_reso metadata_arch huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token
huggingface_repo_visibility save_state_to_huggingface resume_from_huggingface async_upload logging_dir log_with
log_prefix log_tracker_name log_tracker_config wandb_run_name wandb_api_key log_config
log_timestep_distribution_interval nan_check preflight_only ltx2_checkpoint ltx2_text_encoder_checkpoint gemma_root
gemma_safetensors gemma_load_in_8bit gemma_load_in_4bit gemma_bnb_4bit_quant_type gemma_bnb_4bit_disable_double_quant
gemma_bnb_4bit_compute_dtype gemma_fp8_weight_offload version
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


@pytest.fixture
def space(tmp_path: Path, checkpoint: Path) -> Workspace:
    return write_workspace(tmp_path, checkpoint)


def run_script(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=240)


def errors_of(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """Run in this process, expect exit status 1, and return what it printed."""
    assert main([str(argument) for argument in arguments]) == 1
    return capsys.readouterr().err


def test_plain_python_trains_and_saves(tmp_path, checkpoint):
    folder = tmp_path / "mäp with spaces"
    folder.mkdir()
    space = write_workspace(folder, checkpoint)
    done = run_script(*space.arguments("--max_train_steps", 2))
    assert done.returncode == 0, done.stderr
    names = {path.name for path in space.output.iterdir()}
    files = {f"tiny.{ending}" for ending in ("safetensors", "comfy.safetensors", "config.toml")}
    assert names == files | {"tiny.log.csv", "tiny.report.html"}
    assert "avr_loss" in done.stderr and "s/step" in done.stderr


def test_accelerate_launch(space):
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1")
    launcher += ("--mixed_precision", "bf16", "--dynamo_backend", "no")
    arguments = space.arguments("--max_train_steps", 2)
    place = arguments.index("--mixed_precision")
    done = run_script(*arguments[:place], *arguments[place + 2 :], launcher=launcher)
    assert done.returncode == 0, done.stderr
    with safe_open(space.output / "tiny.safetensors", "pt") as file:
        assert file.metadata()["ss_mixed_precision"] == "bf16", "the launcher's choice holds where none is typed"


@pytest.mark.slow
def test_two_processes_train_one_adapter(space):
    """Each rank takes half of the batches; both step on the same gradients and one of them writes."""
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517")
    done = run_script(*space.arguments("--max_train_steps", 3, "--save_state"), launcher=launcher)
    assert done.returncode == 0, done.stderr
    state = read_json(space.output / "tiny-state" / "resume_metadata.json")
    assert state["global_step"] == 3 and state["epoch"] == 2  # 3 batches on 2 ranks: 2 steps an epoch


@pytest.mark.parametrize(
    ("version", "more", "expected"),
    [
        ("1", [], "accelerate was told to use FSDP version 1; add --fsdp_version 2 after accelerate launch"),
        ("2", [], "--shard_base spreads the base over the processes of a machine, and there is one alone"),
        ("2", ["--blocks_to_swap", 1], "--blocks_to_swap keeps blocks in host memory, a sharded base"),
    ],
)
def test_fsdp_that_cannot_be(space, capsys, monkeypatch, version, more, expected):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    found = errors_of(capsys, *space.arguments(*more))
    assert expected in found and "Traceback" not in found


def test_a_typed_no_wins_over_the_launcher(space, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(space.arguments("--max_train_steps", 1, "--no-shard_base")) == 0


def test_a_stopped_run_can_go_on(space):
    """Ctrl-C finishes the step, keeps the state and exits with 130."""
    if sys.platform == "win32":
        pytest.skip("signals of this kind do not exist on Windows")
    arguments = space.arguments("--max_train_steps", 100000, "--save_state", "--save_every_n_steps", 3)
    command = [sys.executable, str(SCRIPT), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (space.output / "tiny-step00000003-state").is_dir():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    (folder,) = space.output.glob("tiny-interrupt-step*-state")
    step = int(folder.name.split("step")[1][:8])
    done = run_script(*space.arguments("--autoresume", "--max_train_steps", step + 1))
    assert done.returncode == 0, done.stderr
    assert f"at step {step}" in done.stderr


def test_every_documented_flag_is_known():
    flags = {flag.removeprefix("--") for flag in build_parser().flags()}
    assert not set(DOCUMENTED) - flags


def test_all_mistakes_come_at_once(space, capsys):
    flags = ["--fp8_base", "--nf4_base", "--min_timestep", 900, "--max_timestep", 100, "--sage_attn"]
    flags += ["--no_convert_to_comfy", "--no_save_original_lora", "--ltx2_checkpoint", "nowhere.safetensors"]
    found = errors_of(capsys, *space.arguments(*flags))
    for part in (
        "choose one of --fp8_base and --nf4_base",
        "min_timestep must be below max_timestep (got 900 and 100)",
        "--sage_attn has no backward pass",
        "leave nothing to save",
    ):
        assert part in found
    assert "nowhere" not in found, "flags are checked before any file is opened"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--shard_base"], "--shard_base spreads the base over the processes of a machine, and there is one alone"),
        (["--shard_base", "--blocks_to_swap", 1], "--blocks_to_swap keeps blocks in host memory, a sharded base"),
        (["--shard_base", "--network_module", "lycoris.kohya"], "--shard_base: lycoris.kohya may read base weights"),
        (["--fp8_scaled"], "--fp8_scaled needs --fp8_base"),
        (["--fp8_compute"], "--fp8_compute needs --fp8_base"),
        (["--fp8_base", "--fp8_scale_mode", "row"], "--fp8_scale_mode needs --fp8_scaled"),
        (["--blocks_to_swap", -1], "--blocks_to_swap must be at least 0 (got -1)"),
        (["--block_swap_ring_size", 0], "--block_swap_ring_size must be at least 1 (got 0)"),
        (["--ffn_chunk_target", "all", "--ffn_chunk_size", -1], "must be at least 0"),
        (["--split_attn", "--split_attn_chunk_size", -1], "must be at least 0"),
        (["--loftq_init"], "--loftq_init needs --nf4_base"),
        (["--nf4_block_size", 24], "nf4_block_size must be 16, 32, 64, 128"),
        (["--lycoris_config", "x.toml"], "--lycoris_config needs --network_module lycoris.kohya"),
        (["--ltx2_mode", "av", "--audio_dop", "--audio_silence_regularizer"], "exclude each other"),
        (["--audio_silence_regularizer"], "--audio_silence_regularizer needs --ltx2_mode av"),
        (["--min_audio_batches_per_accum", 1, "--audio_batch_probability", 0.5], "exclude each other"),
        (["--min_audio_batches_per_accum", 3], "--gradient_accumulation_steps 1"),
        (["--ltx2_mode", "av", "--ic_lora_strategy", "v2v"], "v2v training is video-only"),
        (["--ic_lora_strategy", "audio_ref_only_ic"], "needs sound"),
        (["--ic_lora_strategy", "v2v"], "needs reference_directory"),
        (["--ltx2_audio_only_model"], "--ltx2_audio_only_model needs --ltx2_mode audio"),
        (["--sample_audio_only", "--sample_disable_audio"], "--sample_audio_only and --sample_disable_audio"),
        (["--flash_attn", "--xformers"], "keep one attention back end"),
        (["--blocks_to_swap", 2], "blocks_to_swap must be at most 1 (the model has 2 blocks), got 2"),
        (["--gradient_checkpointing_cpu_offload"], "needs --gradient_checkpointing"),
        (["--sample_prompts", SCRIPT, "--sample_at_first"], "samples need --gemma_root"),
        (["--resume", SCRIPT], "is a file"),
        (["--ltx_version", "2.0", "--ltx_version_check_mode", "error"], "LTX-2.3 checkpoint"),
        (["--validate_every_n_steps", 2], "validation"),
        (["--timestep_sampling", "sigmoid"], "is not available for LTX-2"),
        (["--dataset_manifest", "x.json"], "one of --dataset_config and --dataset_manifest"),
        (["--weighting_scheme", "mode"], "remove --weighting_scheme"),
        (["--audio_loss_weight", -1], "--audio_loss_weight must be ≥ 0 (got -1)"),
        (["--audio_loss_balance_mode", "inv_freq"], "--audio_loss_balance_mode needs --ltx2_mode av"),
        (["--ltx2_mode", "av", "--video_loss_weight", 0, "--audio_loss_weight", 0], "both loss weights are 0"),
        (["--save_last_n_steps", 3], "--save_last_n_steps needs --save_every_n_steps"),
        (["--dim_from_weights"], "--dim_from_weights needs --network_weights"),
        (["--async_upload"], "--async_upload needs --huggingface_repo_id"),
        (["--huggingface_repo_id", "a/b", "--save_state_to_huggingface"], "needs --save_state"),
        (["--resume_from_huggingface"], "--resume_from_huggingface needs --resume"),
        (["--resume_from_huggingface", "--resume", "user/repo"], "give user/repository/path"),
        (["--num_timestep_buckets", 1], "at least 2"),
        (["--shifted_logit_eps", 0.5], "below 0.5"),
        (["--full_bf16"], "--full_bf16 needs --mixed_precision bf16"),
        (["--caption_dropout_rate", 1.5], "--caption_dropout_rate must lie between 0 and 1"),
        (["--ltx2_checkpoint", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--ltx2_mode", "av"], "python ltx2_cache_latents.py --dataset_config "),
        (["--lr_scheduler", "linear", "--lr_warmup_steps", 9], "warmup"),
        (["--dataset_config", ""], "one of --dataset_config and --dataset_manifest"),
        (["--dit", "other.safetensors"], "--dit is an older name"),
        (["--init_lokr_norm", 1.0], "--init_lokr_norm needs --network_module lycoris.kohya"),
        (["--sample_every_n_steps", 2], "--sample_every_n_steps needs --sample_prompts"),
        (["--sample_two_stage"], "--sample_two_stage needs --spatial_upsampler_path"),
        (["--audio_dop"], "--audio_dop needs --ltx2_mode av"),
        (["--ltx2_mode", "av", "--self_flow"], "Self-Flow needs --ltx2_mode video"),
        (["--crepa", "--crepa_args", "mode=dino", "student_block_idx=0"], "ltx2_cache_dino_features.py"),
        (["--blank_preservation"], "--gemma_root"),
        (["--ltx2_mode", "av", "--sample_audio_only", "--sample_disable_audio"], "leave nothing to make"),
        (["--fp8_base", "--nf4_base"], "choose one of --fp8_base and --nf4_base"),
        (["--min_timestep", 500, "--max_timestep", 500], "min_timestep must be below max_timestep"),
        (["--vram_budget", "much"], "give auto or a number of GB"),
        (["--network_dim", 0], "the rank is at least 1"),
        (["--output_dir", SCRIPT], "is a file; give a folder"),
        (["--seed", 2**64], "--seed 18446744073709551616: give a number from 0 to"),
        (["--seed", -1], "leave it out for a random one"),
        (["--lr_scheduler", "polynomial", "--lr_scheduler_power", -1], "--lr_scheduler_power -1"),
        (["--lr_scheduler_type", "torch.optim.lr_scheduler.StepLR"], "step_size"),
        (["--full_fp16", "--mixed_precision", "fp16"], "add --optimizer_args eps=1e-4"),
        (["--optimizer_args", "betas=0.9"], "correct --optimizer_args"),
        (["--log_tracker_config", "nowhere.toml"], "--log_tracker_config nowhere.toml: cannot be read as TOML"),
    ],
)
def test_flags_that_do_not_go_together(space, capsys, flags, expected):
    assert expected in errors_of(capsys, *space.arguments(*flags))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--ffn_chunk_size", 4], "--ffn_chunk_target and --ffn_chunk_size work together only"),
        (["--no_save_original_lora", "--save_state"], "states still hold"),
        (["--ltx_version", "2.0"], "is an LTX-2.3 checkpoint"),
        (["--huber_delta", 2], "--huber_delta has no effect"),
        (["--ffn_chunk_target", "all"], "--ffn_chunk_target and --ffn_chunk_size work together only"),
        (["--max_train_steps", 1001], "nothing is saved before the end; --save_every_n_steps 250"),
        (["--learning_rate", 4e-4], "--learning_rate 0.0004 is high for a LoRA"),
        (["--network_alpha", 1], "effective scale is 0.25"),
        (["--ltx2_first_frame_conditioning_p", 0], "text to video only"),
        (["--img_in_txt_in_offloading"], "--img_in_txt_in_offloading has no effect"),
        (["--nf4_block_size", 64], "--nf4_block_size has no effect without --nf4_base"),
        (["--quantize_device", "cpu"], "--quantize_device has no effect without --nf4_base or --fp8_scaled"),
        (["--loftq_iters", 3], "--loftq_iters has no effect without --loftq_init"),
        (["--awq_alpha", 0.5], "--awq_alpha has no effect without --awq_calibration"),
        (["--awq_num_batches", 2], "--awq_num_batches has no effect without --awq_calibration"),
        (["--split_attn_mode", "query"], "--split_attn_mode has no effect without --split_attn_target"),
        (["--split_attn_chunk_size", 4], "--split_attn_chunk_size has no effect without --split_attn_target"),
        (["--split_attn", "--split_attn_chunk_size", 4], "has an effect with --split_attn_mode query only"),
        (["--blocks_to_swap", 0, "--use_pinned_memory_for_block_swap"], "has no effect without --blocks_to_swap"),
        (["--block_swap_h2d_only"], "--block_swap_h2d_only is what always happens"),
        (["--no-compile", "--compile_mode", "max-autotune"], "--compile_mode has no effect without --compile"),
        (["--lr_decay_steps", 2], "constant does not read --lr_decay_steps"),
        (["--log_prefix", "x", "--wandb_run_name", "y"], "--wandb_run_name: no effect without --log_with wandb"),
        (["--huggingface_token", "x"], "--huggingface_token: no effect without --huggingface_repo_id"),
        (["--log_prefix", "x"], "--log_prefix: no effect without --logging_dir"),
    ],
)
def test_flags_without_effect_are_said(space, caplog, flags, expected):
    assert main(space.arguments(*flags, "--preflight_only")) == 0
    assert expected in caplog.text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--flash_attn"], "the package flash_attn does not load"),
        (["--resume", "."], "no complete state"),
        (["--network_weights", "DAMAGED"], "DAMAGED"),
        (["--base_weights", "DAMAGED"], "DAMAGED"),
    ],
)
def test_what_cannot_be_used_is_found_before_weights_are_read(space, capsys, monkeypatch, flags, expected):
    monkeypatch.setattr("ltx2_tuner.training.arrange._load_model", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    damaged = space.root / "damaged.safetensors"
    damaged.write_bytes(b"not a tensor in it")
    flags = [str(damaged) if flag == "DAMAGED" else flag for flag in flags]
    assert expected.replace("DAMAGED", str(damaged)) in errors_of(capsys, *space.arguments(*flags))


def test_unknown_flags_name_the_nearest(space, capsys):
    with pytest.raises(SystemExit) as stop:
        main(space.arguments("--max_train_stepz", 3))
    assert stop.value.code == 2
    assert "did you mean --max_train_steps?" in capsys.readouterr().err


def test_caches_of_another_checkpoint_are_refused(tmp_path, space, capsys):
    other = write_checkpoint(tmp_path / "other.safetensors", seed=5)
    found = errors_of(capsys, *space.arguments("--ltx2_checkpoint", other))
    assert "do not fit this run" in found and "ltx2_cache_latents.py" in found
    assert main(space.arguments("--ltx2_checkpoint", other, "--cache_check_mode", "off", "--preflight_only")) == 0


def test_distilled_checkpoints_are_not_for_training(tmp_path, space, capsys, caplog):
    distilled = tmp_path / "ltx-2-distilled.safetensors"
    shutil.copy(space.checkpoint, distilled)
    assert main(space.arguments("--ltx2_checkpoint", distilled, "--preflight_only")) == 0
    assert "should not be trained on" in caplog.text
    found = errors_of(capsys, *space.arguments("--ltx2_checkpoint", distilled, "--ltx_version_check_mode", "error"))
    assert "give the full one" in found


def test_running_out_of_memory_names_what_is_not_on_yet(space, capsys, monkeypatch):
    def fail(self):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("ltx2_tuner.training.loop.Trainer.train", fail)
    found = errors_of(capsys, *space.arguments())
    assert "try, in this order: --gradient_checkpointing, --fp8_base --fp8_scaled, --blocks_to_swap 20" in found
    found = errors_of(capsys, *space.arguments("--gradient_checkpointing"))
    assert "try, in this order: --fp8_base --fp8_scaled, --blocks_to_swap 20" in found


def test_show_timesteps(space, capsys):
    assert main(space.arguments("--show_timesteps", "console")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("100000 noise levels for 12 tokens") and len(lines) == 41
    assert main(space.arguments("--show_timesteps", "image")) == 0
    assert (space.output / "tiny_timesteps.png").is_file()


def test_debug_dataset_lists_one_epoch(space, capsys):
    assert main(space.arguments("--debug_dataset")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("latents (1, 8, 3, 2, 2)" in line for line in lines)


def test_preflight_tries_each_bucket_and_trains_nothing(tmp_path, checkpoint, capsys):
    space = write_workspace(tmp_path, checkpoint, [Clip(), Clip(grid=(1, 2, 2)), Clip()])
    assert main(space.arguments("--preflight_only")) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"Python {sys.version_info.major}.") and f"torch {torch.__version__}" in printed[0]
    assert any(line.startswith("memory estimate of the largest batch: 0.0 GiB") for line in printed)
    assert any(line.startswith("8 GB: fits from --blocks_to_swap 0 on") for line in printed)
    lines = [line for line in printed if line.startswith("bucket")]
    assert len(lines) == 2 and all("loss" in line for line in lines)
    assert not list(space.output.glob("*.safetensors"))


def test_preflight_answers_for_a_typed_budget(space, capsys):
    assert main(space.arguments("--preflight_only", "--vram_budget", 24)) == 0
    printed = capsys.readouterr().out
    assert "24 GB: fits from --blocks_to_swap 0 on, no recomputation" in printed and "\n8 GB:" not in printed


def test_how_often_items_are_seen_is_told(space, caplog):
    caplog.set_level("INFO")
    flags = ("--preflight_only", "--max_train_steps", 12, "--gradient_accumulation_steps", 2)
    assert main(space.arguments(*flags)) == 0
    assert "3 items, 3 batches an epoch, 12 optimizer steps: every item is seen about 8.0 times" in caplog.text


def test_tensorboard_gets_the_documented_names(tmp_path, checkpoint):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    space = write_workspace(tmp_path, checkpoint, [Clip(sound=17)] * 2)
    logs = tmp_path / "logs"
    flags = ["--logging_dir", logs, "--log_prefix", "run-", "--log_timestep_distribution_interval", 2]
    assert main(space.arguments("--ltx2_mode", "av", *flags)) == 0
    (folder,) = logs.iterdir()
    assert folder.name.startswith("run-2")
    events = EventAccumulator(str(folder / "network_train"), size_guidance={"histograms": 0}).Reload()
    names = set(events.Tags()["scalars"])
    losses = ("current", "average", "epoch", "video", "audio", "audio_video_ratio")
    assert {f"loss/{name}" for name in losses} <= names
    assert {"lr/unet", "grad_norm/total", "grad_norm/video", "grad_norm/audio", "perf/step_seconds"} <= names
    assert any(name.startswith("loss_v/sigma_") for name in names)
    assert set(events.Tags()["histograms"]) == {"timestep/used_values", "timestep/used_values_audio"}
    assert [event.step for event in events.Histograms("timestep/used_values")] == [2, 4]


def test_the_effective_configuration_reproduces_the_run(space):
    assert main(space.arguments("--save_precision", "bf16", "--network_args", "rank_dropout=0.1")) == 0
    first = (space.output / "tiny.safetensors").read_bytes()
    config = space.output / "tiny.config.toml"
    text = config.read_text(encoding="utf-8")
    assert 'save_precision = "bf16"' in text and "ltx2_mode" in text
    copy = space.root / "again.toml"
    copy.write_text(text, encoding="utf-8")
    assert main(["--config_file", str(copy), "--output_dir", str(space.root / "again")]) == 0
    second = (space.root / "again" / "tiny.safetensors").read_bytes()
    assert first[-1000:] == second[-1000:]
