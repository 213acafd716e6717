"""`--config_file`: a TOML file of flags. Sections have no meaning; the command line wins."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Sequence
from pathlib import Path

from ltx2_tuner import files
from ltx2_tuner.cli.parser import Parser
from ltx2_tuner.errors import UserError, did_you_mean

_SECRETS = ("huggingface_token", "wandb_api_key")


def parse_with_config(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, with the values of `--config_file` in place of the parser's defaults.

    Raises:
        UserError: no such file, no valid TOML, an unknown or repeated key, or a value of the wrong kind.
    """
    # A parser of its own finds the file: flags that are required elsewhere may stand in it.
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config_file")
    found, _ = finder.parse_known_args(argv)
    if found.config_file is None:
        return parser.parse_args(argv)
    path = resolve_path(found.config_file)
    tokens = to_arguments(parser, read_config(path), path)
    typed = list(argv) if argv is not None else None
    if typed is None:
        import sys

        typed = sys.argv[1:]
    # Later values win, so the command line comes last.
    return parser.parse_args([*tokens, *typed])


def resolve_path(name: str) -> Path:
    """The config file; `.toml` may be left out.

    Raises:
        UserError: there is none.
    """
    for path in (Path(name), Path(f"{name}.toml")):
        if path.is_file():
            return path
    raise UserError(f"--config_file {name}: there is no such file (nor {name}.toml)")


def read_config(path: Path) -> dict[str, object]:
    """Keys of the top level and of one level of tables, merged.

    Raises:
        UserError: damaged, nested deeper, or a key that stands twice.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no valid TOML ({error}); correct it") from error
    merged: dict[str, object] = {}
    for name, value in document.items():
        entries = value.items() if isinstance(value, dict) else [(name, value)]
        for key, item in entries:
            if isinstance(item, dict):
                raise UserError(f"{path}: [{name}.{key}] is a table inside a table; put its keys one level up")
            if key in merged:
                raise UserError(f"{path}: {key} stands in two sections; keep one")
            merged[key] = item
    return merged


def to_arguments(parser: Parser, config: dict[str, object], path: Path) -> list[str]:
    """The file's values as command-line tokens, so that types and choices are checked like typed ones.

    Raises:
        UserError: a key that is no flag, or a value of the wrong kind.
    """
    actions = {flag.removeprefix("--"): action for action in parser._actions for flag in action.option_strings}
    tokens: list[str] = []
    for key, value in config.items():
        if key in ("config_file", "help", "version"):
            raise UserError(f"{path}: {key} has no place in a config file; remove it")
        if key not in actions:
            raise UserError(f"{path}: unknown key {key}{did_you_mean(key, actions)}")
        tokens += _tokens(key, value, actions[key], path)
    return tokens


def _tokens(key: str, value: object, action: argparse.Action, path: Path) -> list[str]:
    if isinstance(action, argparse.BooleanOptionalAction):
        return [_switch(key, _boolean(key, value, path))]
    if action.nargs == 0:
        return [f"--{key}"] if _boolean(key, value, path) else []
    if isinstance(value, bool) and action.type is not None:
        raise UserError(f"{path}: {key} = {str(value).lower()} is a switch's value, but --{key} takes a value")
    if action.nargs in ("*", "+"):
        items = value if isinstance(value, list) else [value]
        return [f"--{key}", *(_text(item) for item in items)]
    if isinstance(value, list):
        raise UserError(f"{path}: {key} is a list, but --{key} takes one value")
    return [f"--{key}={_text(value)}"]


def _switch(key: str, on: bool) -> str:
    negated = key.startswith("no-")
    name = key.removeprefix("no-")
    return f"--{name}" if on != negated else f"--no-{name}"


def _boolean(key: str, value: object, path: Path) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{path}: {key} is a switch; write {key} = true or false, not {value!r}")
    return value


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "True" if value else "False"
    return str(value)


def write_effective(args: argparse.Namespace, path: Path) -> None:
    """Write the run's flags as a config file, without keys and without those that were left at None."""
    lines = []
    for key, value in sorted(vars(args).items()):
        if value is None or key in _SECRETS or key == "config_file" or value == []:
            continue
        lines.append(f"{key} = {_toml(value)}")
    files.write_text(path, "\n".join(lines) + "\n")


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    escaped = str(value).removeprefix("torch.").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
