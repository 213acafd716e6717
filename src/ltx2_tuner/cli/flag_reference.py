"""Writes docs/flags/: one page a script, made from its parser, so that a flag is described in one place alone.

python -m ltx2_tuner.cli.flag_reference
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from ltx2_tuner.cli.parser import SCRIPTS, Parser, default_text
from ltx2_tuner.files import write_text

DOCS = Path(__file__).resolve().parents[3] / "docs" / "flags"


def page(parser: Parser) -> str:
    """The Markdown page of one script."""
    lines = [f"# {parser.prog}", "", parser.description or "", "", "Made from the parser; do not edit."]
    for group in parser._action_groups:
        rows = [_row(action) for action in group._group_actions if action.help != argparse.SUPPRESS]
        if rows:
            lines += ["", f"## {group.title}", "", "| flag | value | default | meaning |", "|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _row(action: argparse.Action) -> str:
    flags = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.dest}`"
    cells = (flags, _value(action), _default(action), (action.help or "").replace("%%", "%").replace("%(default)s", ""))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _value(action: argparse.Action) -> str:
    if action.choices:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    if action.nargs == 0:
        return ""
    if isinstance(action.metavar, str):
        return f"{action.metavar.lower()}, several" if action.nargs in ("*", "+") else action.metavar.lower()
    kinds = {int: "integer", float: "number", None: "text", str: "text", Path: "path"}
    kind = kinds.get(action.type, getattr(action.type, "__name__", "text").strip("_").replace("_", " "))
    return f"{kind}, several" if action.nargs in ("*", "+") else kind


def _default(action: argparse.Action) -> str:
    if action.required:
        return "required"
    default = default_text(action)
    if isinstance(action.default, bool) or not default:
        return "off" if action.default is False else default
    return f"`{default}`"


def parser_of(script: str) -> Parser:
    """The parser of a script of the suite."""
    return importlib.import_module(f"ltx2_tuner.cli.{script}").build_parser()


def main() -> int:
    for script in SCRIPTS:
        write_text(DOCS / f"{script}.md", page(parser_of(script)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
