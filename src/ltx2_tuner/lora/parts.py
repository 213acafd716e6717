"""The picture, the sound and the cross-modal part of a LoRA, scaled or dropped one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from ltx2_tuner.lora.formats import LoRAMatrices
from ltx2_tuner.lora.targets import GROUPS

PARTS = ("video", "audio", "cross")


def part_of(path: str) -> str:
    """Which part a layer belongs to: `cross` for attention between picture and sound, else `audio` or `video`."""
    pieces = path.split(".")
    inside = pieces[2] if pieces[0] == "transformer_blocks" and len(pieces) > 2 else pieces[0]
    group = GROUPS.get(inside, "")
    if group.endswith((" to video", " to audio")):
        return "cross"
    return "audio" if group.startswith("audio") or "audio" in inside else "video"


def scale_parts(
    modules: Mapping[str, LoRAMatrices], scales: Mapping[str, float]
) -> tuple[dict[str, LoRAMatrices], Counter]:
    """The adapters with each part's strength multiplied; a part scaled by 0 is left out.

    Returns:
        The adapters, and how many of each part were left out.
    """
    kept, dropped = {}, Counter()
    for path, module in modules.items():
        part = part_of(path)
        scale = scales.get(part, 1.0)
        if scale == 0:
            dropped[part] += 1
        else:
            kept[path] = module if scale == 1 else replace(module, alpha=module.alpha * scale)
    return kept, dropped
