"""Flags of the run itself: model and data, length, noise levels, losses, sound; and the options they make."""

from __future__ import annotations

import argparse
import math

from ltx2_tuner.cli import values
from ltx2_tuner.training.balance import BalanceOptions
from ltx2_tuner.training.losses import LOSS_TYPES
from ltx2_tuner.training.options import DrawOptions, LossOptions
from ltx2_tuner.training.sigmas import SigmaSampler
from ltx2_tuner.training.supervision import SupervisionOptions

_FLAG = {"action": "store_true"}
_SEEDS = 2**62  # torch takes 64 bits, and epochs are added


def add_general_arguments(parser: argparse.ArgumentParser) -> None:
    """Config file, data, model and device."""
    group = parser.add_argument_group("general")
    group.add_argument("--config_file", metavar="TOML", help="file with any of these flags; the command line wins")
    group.add_argument("--dataset_config", metavar="TOML", help="the datasets")
    group.add_argument("--dataset_manifest", metavar="JSON", help="the datasets as cached, without their sources")
    group.add_argument("--ltx2_mode", "--ltx_mode", type=values.mode, default="video", help="video, av or audio")
    group.add_argument("--ltx2_audio_only_model", **_FLAG, help="load only the sound half (mode audio)")
    group.add_argument("--ltx_version", choices=("2.0", "2.3"), help="default: what the checkpoint says")
    group.add_argument(
        "--ltx_version_check_mode",
        choices=("off", "warn", "error"),
        default="warn",
        help="what a typed --ltx_version that the checkpoint contradicts does",
    )
    group.add_argument(
        "--cache_check_mode",
        choices=("off", "warn", "error"),
        default="error",
        help="what caches of another checkpoint do",
    )
    group.add_argument("--dit", metavar="FILE", help="older name of --ltx2_checkpoint")
    group.add_argument("--vae", metavar="FILE", help="other file for the autoencoders of samples")
    group.add_argument("--vae_dtype", type=values.dtype, default="bfloat16", help="dtype of the sample decoder")
    group.add_argument("--vae_chunk_size", type=int, help="latent frames the sample decoder takes at a time")
    group.add_argument("--dit_dtype", type=values.dtype, default="bfloat16", help="compute dtype of the transformer")
    group.add_argument("--device", help="for debugging: cpu, cuda, cuda:N")
    group.add_argument("--seed", type=int, help="data order, noise, start values; random and logged when absent")
    group.add_argument("--disable_numpy_memmap", **_FLAG, help="accepted: files are always read plainly")
    group.add_argument("--debug_dataset", **_FLAG, help="print one epoch of batches and exit")
    group.add_argument("--preflight_only", **_FLAG, help="checks, memory estimate and one batch per bucket, then exit")
    group.add_argument("--nan_check", choices=("off", "warn", "skip", "error"), default="skip", help="non-finite steps")


def add_noise_arguments(parser: argparse.ArgumentParser) -> None:
    """Noise levels and losses."""
    group = parser.add_argument_group("noise levels and losses")
    number = {"type": float}
    group.add_argument("--timestep_sampling", default="shifted_logit_normal", help="or uniform")
    group.add_argument("--logit_mean", **number, default=0.0, help="accepted without effect")
    group.add_argument("--logit_std", **number, default=1.0, help="spread of the logit-normal")
    group.add_argument("--min_timestep", type=int, help="lower end of the noise levels, 0 to 1000")
    group.add_argument("--max_timestep", type=int, help="upper end")
    group.add_argument("--preserve_distribution_shape", **_FLAG, help="redraw instead of rescaling into the range")
    group.add_argument("--shifted_logit_mode", choices=("legacy", "stretched"), help="legacy for 2.0, else stretched")
    group.add_argument("--shifted_logit_eps", **number, default=1e-3, help="lower end of the stretched form")
    group.add_argument("--shifted_logit_uniform_prob", **number, default=0.1, help="share of uniform draws")
    group.add_argument("--shifted_logit_shift", **number, help="fixed shift instead of the one from the token count")
    group.add_argument("--num_timestep_buckets", type=int, help="stratify the draws of an epoch (at least 2)")
    group.add_argument("--show_timesteps", choices=("image", "console"), help="show the distribution and exit")
    group.add_argument("--discrete_flow_shift", **number, default=1.0, help="accepted without effect")
    group.add_argument("--sigmoid_scale", **number, default=1.0, help="accepted without effect")
    group.add_argument("--mode_scale", **number, default=1.29, help="accepted without effect")
    group.add_argument("--weighting_scheme", default="none", help="only none: LTX-2 weights no noise level")
    group.add_argument("--guidance_scale", **number, help="cfg of samples (3.0)")
    group.add_argument("--loss_type", choices=LOSS_TYPES, default="mse", help="element loss")
    group.add_argument("--huber_delta", **number, default=1.0, help="where huber turns linear")
    group.add_argument("--video_loss_weight", **number, default=1.0, help="a dataset's own value wins")
    group.add_argument("--audio_loss_weight", **number, default=1.0, help="a dataset's own value wins")
    group.add_argument(
        "--audio_loss_balance_mode",
        choices=("none", "inv_freq", "ema_mag"),
        default="none",
        help="weigh sound by how rare it is, or by the size of its loss",
    )
    balance = BalanceOptions()
    for name, default, meaning in (
        ("min", balance.minimum, "least weight"),
        ("max", balance.maximum, "largest weight"),
        ("beta", balance.beta, "rate of inv_freq's average"),
        ("eps", balance.eps, "floor of inv_freq's average"),
        ("ema_init", balance.ema_init, "where the averages start"),
        ("target_ratio", balance.target_ratio, "wanted sound to picture ratio of ema_mag"),
        ("ema_decay", balance.ema_decay, "decay of ema_mag's averages"),
    ):
        group.add_argument(f"--audio_loss_balance_{name}", **number, default=default, help=meaning)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Batches, conditioning and sound."""
    group = parser.add_argument_group("data and sound")
    number, share = {"type": int}, {"type": float}
    group.add_argument("--separate_audio_buckets", **_FLAG, help="no batch mixes items with and without sound")
    group.add_argument("--audio_bucket_strategy", choices=("pad", "truncate"), help="lengths of sound items (pad)")
    group.add_argument("--audio_bucket_interval", **share, help="seconds between sound buckets (2.0)")
    group.add_argument("--min_audio_batches_per_accum", **number, default=0, help="batches with sound per step")
    group.add_argument("--audio_batch_probability", **share, help="chance that the next batch has sound")
    group.add_argument("--caption_dropout_rate", **share, default=0.0, help="share of samples without text")
    group.add_argument("--caption_dropout_mode", choices=("zero", "empty"), default="zero", help="what replaces it")
    group.add_argument("--independent_audio_timestep", **_FLAG, help="sound draws its own noise level")
    group.add_argument("--audio_silence_regularizer", **_FLAG, help="train items without sound on silence")
    group.add_argument("--audio_silence_regularizer_weight", **share, default=1.0, help="loss factor of that silence")
    group.add_argument(
        "--audio_supervision_mode",
        choices=("off", "warn", "error"),
        default="off",
        help="watch how many batches have sound",
    )
    group.add_argument("--audio_supervision_warmup_steps", **number, default=50, help="batches before the first check")
    group.add_argument("--audio_supervision_check_interval", **number, default=50, help="batches between checks")
    group.add_argument("--audio_supervision_min_ratio", **share, default=0.9, help="share of batches with sound")
    group.add_argument(
        "--audio_only_sequence_resolution", **number, default=64, help="virtual picture side; 0: as cached"
    )
    group.add_argument("--reference_downscale", **number, default=1, help="references are this many times smaller")
    group.add_argument("--reference_frames", **number, help="frames of sample references (default: as cached)")
    group.add_argument(
        "--ltx2_first_frame_conditioning_p",
        **share,
        default=0.1,
        help="chance that the first frame is given: 0 text to video, 1 image to video, 0.5 both",
    )
    group.add_argument("--audio_ref_use_negative_positions", **_FLAG, help="reference sound before time 0")
    group.add_argument(
        "--audio_ref_mask_cross_attention_to_reference", **_FLAG, help="the picture does not attend to reference sound"
    )
    group.add_argument(
        "--audio_ref_mask_reference_from_text_attention", **_FLAG, help="reference sound does not attend to text"
    )
    group.add_argument("--audio_ref_identity_guidance_scale", **share, default=0.0, help="cfg of referenced sound")
    group.add_argument("--caption_field", help="accepted: captions come from the caches")


def add_regularizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Preservation, CREPA and Self-Flow."""
    group = parser.add_argument_group("preservation and regularizers")
    for name, meaning in (
        ("blank_preservation", "keep what the model does without a prompt"),
        ("dop", "keep what the model does for a class prompt"),
        ("prior_divergence", "move away from the plain model"),
        ("audio_dop", "keep the sound of clips without sound"),
        ("crepa", "align frames with their neighbours"),
        ("self_flow", "align with a cleaner view of the same clip"),
    ):
        group.add_argument(f"--{name}", **_FLAG, help=meaning)
        group.add_argument(f"--{name}_args", nargs="*", default=(), metavar="KEY=VALUE", help=f"settings of --{name}")
    group.add_argument(
        "--use_precached_preservation",
        **_FLAG,
        help="the preservation prompts must come from their cache (one that fits is used without this flag, too)",
    )
    group.add_argument("--preservation_prompts_cache", metavar="FILE", help="ltx2_preservation_cache.pt of the cache")


def check_training(args: argparse.Namespace, *, needs_data: bool = True) -> list[str]:
    """Sentences about flags of this module that are out of range or do not go together."""
    errors = [*_check_data_choice(args, needs_data), *_check_noise(args), *_check_losses(args), *_check_sound(args)]
    if args.seed is not None and not 0 <= args.seed < _SEEDS:
        errors.append(f"--seed {args.seed}: give a number from 0 to {_SEEDS - 1}, or leave it out for a random one")
    return errors


def _check_data_choice(args: argparse.Namespace, needs_data: bool) -> list[str]:
    errors = []
    if needs_data and bool(args.dataset_config) == bool(args.dataset_manifest):
        errors.append("give one of --dataset_config and --dataset_manifest")
    if not (args.ltx2_checkpoint or args.dit):
        errors.append("--ltx2_checkpoint is needed")
    if args.dit and args.ltx2_checkpoint and args.dit != args.ltx2_checkpoint:
        errors.append("--dit is an older name of --ltx2_checkpoint and names another file; drop it")
    if args.ltx2_audio_only_model and args.ltx2_mode != "audio":
        errors.append("--ltx2_audio_only_model needs --ltx2_mode audio")
    return errors


def _check_noise(args: argparse.Namespace) -> list[str]:
    errors = []
    if args.timestep_sampling not in ("shifted_logit_normal", "uniform", "sigma"):
        errors.append(
            f"--timestep_sampling {args.timestep_sampling} is not available for LTX-2; use shifted_logit_normal or "
            "uniform"
        )
    if not args.logit_std > 0:
        errors.append(f"--logit_std must be above 0 (got {args.logit_std})")
    if not 0 <= args.shifted_logit_eps < 0.5:
        errors.append(f"--shifted_logit_eps must be at least 0 and below 0.5 (got {args.shifted_logit_eps})")
    errors += _shares(args, "shifted_logit_uniform_prob", "caption_dropout_rate", "ltx2_first_frame_conditioning_p")
    if args.shifted_logit_shift is not None and not math.isfinite(args.shifted_logit_shift):
        errors.append("--shifted_logit_shift must be a finite number")
    low, high = args.min_timestep or 0, 1000 if args.max_timestep is None else args.max_timestep
    if not 0 <= low <= 1000 or not 0 <= high <= 1000:
        errors.append("--min_timestep and --max_timestep lie between 0 and 1000")
    elif low >= high:
        errors.append(f"min_timestep must be below max_timestep (got {low} and {high})")
    if args.num_timestep_buckets is not None and args.num_timestep_buckets < 2:
        errors.append(f"--num_timestep_buckets must be at least 2 (got {args.num_timestep_buckets})")
    if args.weighting_scheme != "none":
        errors.append("LTX-2 uses no σ-dependent loss weight; remove --weighting_scheme")
    return errors


def _check_losses(args: argparse.Namespace) -> list[str]:
    errors = []
    for name in ("video_loss_weight", "audio_loss_weight", "audio_silence_regularizer_weight"):
        value = getattr(args, name)
        if not (math.isfinite(value) and value >= 0):
            errors.append(f"--{name} must be ≥ 0 (got {value:g})")
    if args.ltx2_mode == "av" and args.video_loss_weight == 0 == args.audio_loss_weight:
        errors.append("nothing to train: both loss weights are 0")
    if not args.huber_delta > 0:
        errors.append(f"--huber_delta must be above 0 (got {args.huber_delta})")
    prefix = "--audio_loss_balance"
    if args.audio_loss_balance_mode == "none":
        return errors
    if args.ltx2_mode != "av":
        errors.append(f"{prefix}_mode needs --ltx2_mode av")
    low, high, start = args.audio_loss_balance_min, args.audio_loss_balance_max, args.audio_loss_balance_ema_init
    if not (0 <= low <= high and high > 0):
        errors.append(f"{prefix}_min and _max must satisfy 0 <= min <= max, max above 0 (got {low} and {high})")
    if not 0 < args.audio_loss_balance_beta <= 1:
        errors.append(f"{prefix}_beta must be above 0 and at most 1 (got {args.audio_loss_balance_beta})")
    if not args.audio_loss_balance_eps > 0:
        errors.append(f"{prefix}_eps must be above 0 (got {args.audio_loss_balance_eps})")
    if not start > 0 or (args.audio_loss_balance_mode == "inv_freq" and start > 1):
        errors.append(f"{prefix}_ema_init must be above 0, and at most 1 for inv_freq (got {start})")
    if not args.audio_loss_balance_target_ratio >= 0:
        errors.append(f"{prefix}_target_ratio must be ≥ 0 (got {args.audio_loss_balance_target_ratio})")
    if not 0 < args.audio_loss_balance_ema_decay < 1:
        errors.append(f"{prefix}_ema_decay must lie between 0 and 1 (got {args.audio_loss_balance_ema_decay})")
    return errors


def _check_sound(args: argparse.Namespace) -> list[str]:
    errors = _shares(args, "audio_supervision_min_ratio", "audio_batch_probability")
    if args.ltx2_mode != "av":
        for name in ("audio_silence_regularizer", "audio_dop"):
            if getattr(args, name):
                errors.append(f"--{name} needs --ltx2_mode av")
        if args.audio_supervision_mode != "off":
            errors.append("--audio_supervision_mode needs --ltx2_mode av")
    if args.independent_audio_timestep and args.ltx2_mode == "video":
        errors.append("--independent_audio_timestep needs --ltx2_mode av")
    if args.audio_dop and args.audio_silence_regularizer:
        errors.append("--audio_dop and --audio_silence_regularizer exclude each other; drop one")
    for name, least in (("warmup_steps", 0), ("check_interval", 1)):
        value = getattr(args, f"audio_supervision_{name}")
        if value < least:
            errors.append(f"--audio_supervision_{name} must be at least {least} (got {value})")
    quota = args.min_audio_batches_per_accum
    if quota and args.audio_batch_probability is not None:
        errors.append("--min_audio_batches_per_accum and --audio_batch_probability exclude each other; drop one")
    if not 0 <= quota <= args.gradient_accumulation_steps:
        errors.append(
            f"--min_audio_batches_per_accum {quota} must lie between 0 and --gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps}"
        )
    resolution = args.audio_only_sequence_resolution
    if resolution != 0 and resolution < 32:
        errors.append(f"--audio_only_sequence_resolution must be 0 or at least 32 (got {resolution})")
    if args.audio_bucket_interval is not None and not args.audio_bucket_interval > 0:
        errors.append(f"--audio_bucket_interval must be above 0 (got {args.audio_bucket_interval})")
    if args.reference_downscale < 1 or (args.reference_frames is not None and args.reference_frames < 1):
        errors.append("--reference_downscale and --reference_frames must be at least 1")
    return errors


def _shares(args: argparse.Namespace, *names: str) -> list[str]:
    return [
        f"--{name} must lie between 0 and 1 (got {getattr(args, name):g})"
        for name in names
        if getattr(args, name) is not None and not 0 <= getattr(args, name) <= 1
    ]


def sampler_of(args: argparse.Namespace, version: str) -> SigmaSampler:
    """How noise levels are drawn, for a checkpoint of this version."""
    return SigmaSampler(
        sampling="uniform" if args.timestep_sampling == "uniform" else "shifted_logit_normal",
        mode=args.shifted_logit_mode or ("legacy" if version == "2.0" else "stretched"),
        std=args.logit_std,
        eps=args.shifted_logit_eps,
        uniform_prob=args.shifted_logit_uniform_prob,
        shift=args.shifted_logit_shift,
        minimum=(args.min_timestep or 0) / 1000,
        maximum=(1000 if args.max_timestep is None else args.max_timestep) / 1000,
        preserve_shape=args.preserve_distribution_shape
        and (args.min_timestep is not None or args.max_timestep is not None),
    )


def draw_options(args: argparse.Namespace, version: str) -> DrawOptions:
    """The random decisions of training."""
    first_frame = 0.0 if args.ltx2_mode == "audio" else args.ltx2_first_frame_conditioning_p
    return DrawOptions(sampler_of(args, version), first_frame, args.caption_dropout_rate)


def loss_options(args: argparse.Namespace) -> LossOptions:
    """Element loss, audio balance and the supervision monitor."""
    return LossOptions(
        kind=args.loss_type,
        huber_delta=args.huber_delta,
        balance=BalanceOptions(
            mode=args.audio_loss_balance_mode,
            beta=args.audio_loss_balance_beta,
            eps=args.audio_loss_balance_eps,
            minimum=args.audio_loss_balance_min,
            maximum=args.audio_loss_balance_max,
            ema_init=args.audio_loss_balance_ema_init,
            target_ratio=args.audio_loss_balance_target_ratio,
            ema_decay=args.audio_loss_balance_ema_decay,
        ),
        supervision=SupervisionOptions(
            mode=args.audio_supervision_mode,
            warmup=args.audio_supervision_warmup_steps,
            interval=args.audio_supervision_check_interval,
            min_ratio=args.audio_supervision_min_ratio,
        ),
    )


def training_notes(args: argparse.Namespace) -> list[str]:
    """Flags that have no effect as they stand, said once at the start."""
    notes = []
    if args.timestep_sampling == "sigma":
        notes.append("--timestep_sampling sigma is taken as shifted_logit_normal")
    if args.preserve_distribution_shape and args.min_timestep is None and args.max_timestep is None:
        notes.append("--preserve_distribution_shape has no effect without --min_timestep or --max_timestep")
    if args.preserve_distribution_shape and args.num_timestep_buckets:
        notes.append("--num_timestep_buckets has no effect with --preserve_distribution_shape")
    if args.huber_delta != 1.0 and args.loss_type not in ("huber", "smooth_l1"):
        notes.append(f"--huber_delta has no effect with --loss_type {args.loss_type}")
    if args.independent_audio_timestep and args.ltx2_mode == "audio":
        notes.append("--independent_audio_timestep changes nothing in audio mode")
    if (args.learning_rate or 0) > 3e-4 and args.optimizer_type.lower() in ("adamw", "adamw8bit"):
        notes.append(f"--learning_rate {args.learning_rate:g} is high for a LoRA; 1e-4 to 2e-4 is usual")
    if args.ltx2_first_frame_conditioning_p == 0 and args.ltx2_mode != "audio":
        notes.append("first-frame conditioning is off: the adapter learns text to video only")
    return notes
