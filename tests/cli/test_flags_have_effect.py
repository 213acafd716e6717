"""A flag that is accepted and changes nothing is a defect, unless its help says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ltx2_tuner
from ltx2_tuner.cli.flag_reference import parser_of
from ltx2_tuner.cli.parser import SCRIPTS

PACKAGE = Path(ltx2_tuner.__file__).parent
ADDED = re.compile(r"add(?:_argument)?\(\s*f?\"[^)]*?\)", re.DOTALL)
SOURCE = "\n".join(ADDED.sub("", path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py"))
# Read under a name that is put together, such as f"metadata_{name}".
FAMILIES = re.compile(r"metadata_|audio_loss_balance_|gemma_bnb_4bit_|.*_args$|save_|validate_|sample_vae_")
WITHOUT = ("accepted", "refused", "config_file")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_somewhere(script):
    unread = []
    for action in parser_of(script)._actions:
        name = action.dest
        if (
            name in ("help", "version", "config_file")
            or FAMILIES.match(name)
            or (action.help or "").startswith(WITHOUT)
        ):
            continue
        if not re.search(rf"args\.{name}\b|[\"']{name}[\"']", SOURCE):
            unread.append(name)
    assert not unread
