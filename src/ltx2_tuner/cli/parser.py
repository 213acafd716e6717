"""The parser every script uses, and the frame around its main function.

A script's module holds `build_parser() -> Parser` and `main(argv=None) -> int`; `main` is decorated with
`entry_point`, which maps `UserError` to one printed sentence and the exit codes of the suite:
0 success, 1 user, configuration or data error, 2 argument parsing error, 130 interrupted.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections.abc import Callable, Sequence

from ltx2_tuner import __version__
from ltx2_tuner.cli.allocator import keep_memory_in_one_piece
from ltx2_tuner.errors import UserError, nearest

# Flags of related tools and of upstream's other models, with what to type here instead.
COUNTERPARTS = {
    "--rank": "--network_dim",
    "--lora_alpha": "--network_alpha",
    "--train_steps": "--max_train_steps",
    "--caption_dropout_p": "--caption_dropout_rate",
    "--pretrained_model_name_or_path": "--ltx2_checkpoint",
    "--data_root": "--dataset_config",
    "--t5": "--gemma_root",
    "--text_encoder1": "--gemma_root",
    "--text_encoder2": "--gemma_root",
    "--vae_tiling": "--vae_spatial_tile_size",
    "--vae_spatial_tile_sample_min_size": "--vae_spatial_tile_size",
    "--vae_cache_cpu": "--vae_chunk_size",
    "--fp8_llm": "--gemma_safetensors with an fp8 file",
    "--text_encoder_dtype": "--mixed_precision",
}

# What the operating system refuses for reasons of the user's, in words; other failures of it are bugs.
_FILE_ERRORS = {
    PermissionError: "no permission to read or write it; check its owner and rights, or give another path",
    FileNotFoundError: "no such file or folder; check the path",
    NotADirectoryError: "a file stands where a folder is needed; give another path",
    IsADirectoryError: "is a folder where a file is needed; give a file",
    FileExistsError: "a file of that name is in the way; remove it or give another path",
}

# The scripts of the suite; a flag that belongs to another one is named with it.
SCRIPTS = (
    "ltx2_cache_latents",
    "ltx2_cache_text_encoder_outputs",
    "ltx2_cache_dino_features",
    "ltx2_train_network",
    "ltx2_train_slider",
    "ltx2_generate_video",
    "ltx2_merge_lora",
    "ltx2_convert_lora",
    "ltx2_merge_lora_to_model",
    "lora_post_hoc_ema",
    "ltx2_quantize_model",
)


def default_text(action: argparse.Action) -> str:
    """A flag's default as it would be typed; empty where it is off, absent or not worth a word."""
    value = action.default
    if value is argparse.SUPPRESS or value is None or value is False or value in ((), [], ""):
        return ""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "on" if value is True else str(value).removeprefix("torch.")


class HelpFormatter(argparse.HelpFormatter):
    """Short usage, short placeholders, and a flag's default where there is one that the text does not tell."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", default_text(action)
        told = not default or (action.nargs == 0 and default != "on") or "default" in text or f"({default}" in text
        return text if told else f"{text} (default: {default.replace('%', '%%')})"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        names = {int: "N", float: "X", str: "TEXT", None: "TEXT"}
        return names.get(action.type) or getattr(action.type, "__name__", "value").strip("_").upper()

    def _format_usage(self, usage, actions, groups, prefix) -> str:
        """The flags that must be given, not the hundred that may: those are listed below it."""
        if usage is None:
            required = [action for action in actions if action.required or not action.option_strings]
            others = "" if len(required) == len(actions) else " [flags]"
            actions, usage = required, None
            return super()._format_usage(usage, actions, groups, prefix).rstrip() + f"{others}\n\n"
        return super()._format_usage(usage, actions, groups, prefix)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors name the closest flag or the script that has it."""

    def __init__(self, script: str, description: str, **kwargs) -> None:
        super().__init__(
            prog=f"{script}.py",
            description=description,
            allow_abbrev=False,
            formatter_class=HelpFormatter,
            **kwargs,
        )
        self.script = script
        self.add_argument("--version", action="version", version=f"ltx2-tuner {__version__}")

    def flags(self) -> list[str]:
        """Every long flag this parser knows."""
        return [flag for flag in self._option_string_actions if flag.startswith("--")]

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown_message(unknown))
        return parsed

    def error(self, message: str):
        """One line instead of the usage of a hundred flags."""
        self.exit(2, f"error: {message}; python {self.prog} --help lists the flags\n")

    def _unknown_message(self, unknown: list[str]) -> str:
        flags = [token.split("=", 1)[0] for token in unknown if token.startswith("--")]
        if not flags:
            return f"unexpected argument: {' '.join(unknown)}"
        return "; ".join(f"unknown flag {flag}{self._hint(flag)}" for flag in flags)

    def _hint(self, flag: str) -> str:
        if flag in COUNTERPARTS:
            return f": here it is {COUNTERPARTS[flag]}"
        for script in SCRIPTS:
            if script != self.script and flag in _flags_of(script):
                return f": it belongs to {script}.py"
        match = nearest(flag, self.flags())
        return f" (did you mean {match}?)" if match else ""


@functools.cache
def _flags_of(script: str) -> frozenset[str]:
    import importlib

    try:
        module = importlib.import_module(f"ltx2_tuner.cli.{script}")
    except ModuleNotFoundError:
        return frozenset()
    return frozenset(module.build_parser().flags())


def entry_point(function: Callable[[Sequence[str] | None], int | None]) -> Callable[..., int]:
    """Wrap a script's `main(argv)`: logging, allocator settings, and user errors as one sentence with exit status 1."""

    @functools.wraps(function)
    def main(argv: Sequence[str] | None = None) -> int:
        _use_utf8()
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
        keep_memory_in_one_piece()
        try:
            return function(argv) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except OSError as error:
            if error.filename is None or type(error) not in _FILE_ERRORS:
                raise
            print(f"error: {error.filename}: {_FILE_ERRORS[type(error)]}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return main


def _use_utf8() -> None:
    """Names and captions may hold any character; a Windows console would otherwise stop at the first of them."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
