"""Flags of validation, saving, resuming, uploading and logging, and the options they make."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

from ltx2_tuner.training.options import LogOptions, SaveOptions, ValidationOptions
from ltx2_tuner.training.saving import PRECISIONS
from ltx2_tuner.training.upload import REPO_TYPES, UploadOptions

DEFAULT_NAME = "ltx2_lora"
_FLAG = {"action": "store_true"}
_MODELSPEC = ("title", "author", "description", "license", "tags", "reso", "arch")
_NEEDS_REPOSITORY = (
    "huggingface_repo_type",
    "huggingface_path_in_repo",
    "huggingface_repo_visibility",
    "save_state_to_huggingface",
    "async_upload",
)


def add_saving_arguments(parser: argparse.ArgumentParser) -> None:
    """Validation, checkpoints, states and their metadata."""
    group = parser.add_argument_group("validation, saving and resuming")
    number = {"type": int, "metavar": "N"}
    group.add_argument("--validate_every_n_steps", **number, help="measure val_loss after every N steps")
    group.add_argument("--validate_every_n_epochs", **number, help="measure val_loss after every N epochs")
    group.add_argument("--output_dir", metavar="FOLDER", help="where checkpoints, samples and states go")
    group.add_argument("--output_name", help=f"file name without suffix ({DEFAULT_NAME})")
    group.add_argument("--save_every_n_epochs", **number, help="save after every N epochs")
    group.add_argument("--save_every_n_steps", **number, help="save after every N steps")
    group.add_argument("--save_last_n_epochs", **number, help="remove epoch checkpoints older than N saves")
    group.add_argument("--save_last_n_steps", **number, help="remove step checkpoints older than N steps")
    group.add_argument("--save_last_n_epochs_state", **number, help="the same for states")
    group.add_argument("--save_last_n_steps_state", **number, help="the same for states")
    group.add_argument("--save_state", **_FLAG, help="with each checkpoint save all that a resumed run needs")
    group.add_argument("--save_state_on_train_end", **_FLAG, help="save that at the end only")
    group.add_argument("--resume", metavar="FOLDER", help="a ...-state directory to go on from")
    group.add_argument("--autoresume", **_FLAG, help="go on from the newest complete state in --output_dir")
    group.add_argument("--save_precision", choices=tuple(PRECISIONS), help="dtype of saved adapters (fp32)")
    group.add_argument("--no_convert_to_comfy", **_FLAG, help="write no ComfyUI copy")
    group.add_argument("--no_save_original_lora", **_FLAG, help="write the ComfyUI copy only")
    group.add_argument("--save_checkpoint_metadata", **_FLAG, help="write a .json beside each checkpoint")
    for name in _MODELSPEC:
        group.add_argument(f"--metadata_{name}", help=f"modelspec {name} of saved files")


def add_logging_arguments(parser: argparse.ArgumentParser) -> None:
    """Trackers and uploads."""
    group = parser.add_argument_group("logging and upload")
    group.add_argument("--logging_dir", metavar="FOLDER", help="TensorBoard logs")
    group.add_argument("--log_with", choices=("tensorboard", "wandb", "all"), help="tensorboard with --logging_dir")
    group.add_argument("--log_prefix", help="prefix of the log folder's name")
    group.add_argument("--log_tracker_name", help="run name in the tracker (network_train)")
    group.add_argument("--log_tracker_config", metavar="TOML", help="settings of the tracker")
    group.add_argument("--wandb_run_name", help="run name in wandb")
    group.add_argument("--wandb_api_key", help="wandb key; never logged or stored")
    group.add_argument("--log_config", **_FLAG, help="log the flags too, without keys and paths")
    group.add_argument("--no_report", **_FLAG, help="write no <output_name>.report.html at the end")
    group.add_argument(
        "--log_timestep_distribution_interval", type=int, default=100, help="steps between histograms; 0 is off"
    )
    group.add_argument("--huggingface_repo_id", metavar="USER/NAME", help="upload saved adapters to this repository")
    group.add_argument("--huggingface_repo_type", choices=REPO_TYPES, help="kind of the repository (model)")
    group.add_argument("--huggingface_path_in_repo", metavar="FOLDER", help="folder of the files in the repository")
    group.add_argument("--huggingface_token", help="access token; never logged or stored")
    group.add_argument(
        "--huggingface_repo_visibility", choices=("private", "public"), help="of a repository made here (private)"
    )
    group.add_argument("--save_state_to_huggingface", **_FLAG, help="upload states too")
    group.add_argument("--resume_from_huggingface", **_FLAG, help="--resume is user/repository/path[:revision[:type]]")
    group.add_argument("--async_upload", **_FLAG, help="upload beside training")


def check_output(args: argparse.Namespace) -> list[str]:
    """Sentences about flags of this module that do not go together."""
    errors = []
    if not args.output_dir:
        errors.append("--output_dir is needed")
    elif Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        errors.append(f"--output_dir {args.output_dir} is a file; give a folder")
    if args.output_name and set(args.output_name) & set('/\\:*?"<>|\0'):
        errors.append(f"--output_name {args.output_name!r} holds characters that file names cannot have; change it")
    if args.no_save_original_lora and args.no_convert_to_comfy:
        errors.append("--no_save_original_lora and --no_convert_to_comfy leave nothing to save; drop one")
    for unit in ("steps", "epochs"):
        for name in (f"save_every_n_{unit}", f"validate_every_n_{unit}"):
            value = getattr(args, name)
            if value is not None and value < 1:
                errors.append(f"--{name} must be at least 1 (got {value})")
        for name in (f"save_last_n_{unit}", f"save_last_n_{unit}_state"):
            value = getattr(args, name)
            if value is None:
                continue
            if value < 0:
                errors.append(f"--{name} must be at least 0 (got {value})")
            if not getattr(args, f"save_every_n_{unit}"):
                errors.append(f"--{name} needs --save_every_n_{unit}")
    if args.log_with in ("tensorboard", "all") and not args.logging_dir:
        errors.append(f"--log_with {args.log_with} needs --logging_dir")
    errors += [
        f"--{name} needs --huggingface_repo_id"
        for name in _NEEDS_REPOSITORY
        if getattr(args, name) and not args.huggingface_repo_id
    ]
    if args.log_tracker_config:
        errors += _check_tracker_config(args.log_tracker_config)
    if args.save_state_to_huggingface and not (args.save_state or args.save_state_on_train_end):
        errors.append("--save_state_to_huggingface needs --save_state or --save_state_on_train_end")
    if args.resume_from_huggingface and not args.resume:
        errors.append("--resume_from_huggingface needs --resume user/repository/path")
    if args.log_timestep_distribution_interval < 0:
        errors.append("--log_timestep_distribution_interval must be at least 0")
    return errors


def output_notes(args: argparse.Namespace) -> list[str]:
    """What a user should know before the run."""
    notes = []
    if not args.output_name:
        notes.append(f"--output_name is not given: files are called {DEFAULT_NAME}")
    if args.no_save_original_lora and (args.save_state or args.resume or args.autoresume):
        notes.append("--no_save_original_lora: states still hold the adapter in its original form")
    notes += _log_notes(args)
    if args.huggingface_token and not (args.huggingface_repo_id or args.resume_from_huggingface):
        notes.append("--huggingface_token: no effect without --huggingface_repo_id or --resume_from_huggingface")
    if args.autoresume and args.resume:
        notes.append("--autoresume is ignored: --resume names the state")
    if not (args.save_every_n_steps or args.save_every_n_epochs) and (args.max_train_steps or 0) > 1000:
        notes.append("nothing is saved before the end; --save_every_n_steps 250 would keep checkpoints on the way")
    return notes


def save_options(args: argparse.Namespace) -> SaveOptions:
    """What is written, and when."""
    low = "fp16" if args.full_fp16 else "bf16" if args.full_bf16 else "fp32"
    return SaveOptions(
        output_dir=Path(args.output_dir).expanduser(),
        output_name=args.output_name or DEFAULT_NAME,
        every_steps=args.save_every_n_steps,
        every_epochs=args.save_every_n_epochs,
        last_steps=args.save_last_n_steps,
        last_epochs=args.save_last_n_epochs,
        state=args.save_state,
        state_on_train_end=args.save_state_on_train_end,
        last_steps_state=args.save_last_n_steps_state,
        last_epochs_state=args.save_last_n_epochs_state,
        precision=args.save_precision or low,
        comfy=not args.no_convert_to_comfy,
        original=not args.no_save_original_lora,
        sidecar=args.save_checkpoint_metadata,
    )


def validation_options(args: argparse.Namespace) -> ValidationOptions:
    """When the validation loss is measured."""
    return ValidationOptions(args.validate_every_n_steps, args.validate_every_n_epochs)


def _log_notes(args: argparse.Namespace) -> list[str]:
    """Flags of trackers that nothing is tracked with."""
    wandb = [name for name in ("log_tracker_config", "wandb_run_name", "wandb_api_key") if getattr(args, name)]
    others = [name for name in ("log_prefix", "log_tracker_name", "log_config") if getattr(args, name)]
    notes = []
    if wandb and args.log_with not in ("wandb", "all"):
        notes.append(f"{_flags(wandb)}: no effect without --log_with wandb")
    if others and not (args.log_with or args.logging_dir):
        notes.append(f"{_flags(others)}: no effect without --logging_dir or --log_with wandb")
    return notes


def _flags(names: list[str]) -> str:
    return ", ".join(f"--{name}" for name in names)


def _check_tracker_config(path: str) -> list[str]:
    try:
        tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"--log_tracker_config {path}: cannot be read as TOML ({error}); correct it"]
    return []


def log_options(args: argparse.Namespace) -> LogOptions:
    """Where the numbers go."""
    trackers = {"all": ("tensorboard", "wandb"), None: ("tensorboard",) if args.logging_dir else ()}
    return LogOptions(
        directory=None if args.logging_dir is None else Path(args.logging_dir).expanduser(),
        trackers=trackers.get(args.log_with, (args.log_with,)),
        prefix=args.log_prefix or "",
        name=args.log_tracker_name or "network_train",
        tracker_config=None if args.log_tracker_config is None else Path(args.log_tracker_config).expanduser(),
        wandb_run_name=args.wandb_run_name,
        histogram_interval=args.log_timestep_distribution_interval,
    )


def upload_options(args: argparse.Namespace) -> UploadOptions | None:
    """Where saved files are uploaded, None for nowhere."""
    if not args.huggingface_repo_id:
        return None
    return UploadOptions(
        args.huggingface_repo_id,
        kind=args.huggingface_repo_type or "model",
        folder=args.huggingface_path_in_repo or "",
        token=args.huggingface_token,
        public=args.huggingface_repo_visibility == "public",
        states=args.save_state_to_huggingface,
        beside=args.async_upload,
    )


def modelspec(args: argparse.Namespace) -> dict[str, str]:
    """The typed --metadata_* values by field name."""
    return {name: getattr(args, f"metadata_{name}") for name in _MODELSPEC if getattr(args, f"metadata_{name}")}
