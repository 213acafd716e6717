"""Which linear layers get an adapter: presets, patterns, and what runs in the chosen mode (06 section 6.2)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ltx2_tuner.errors import UserError

BLOCKS = "transformer_blocks"

_PROJECTION = r"(?:to_q|to_k|to_v|to_out\.0)$"
_AUDIO_FF = (r".*\.audio_ff\.net\.0\.proj$", r".*\.audio_ff\.net\.2$")
_AUDIO = (
    rf".*\.audio_attn1\.{_PROJECTION}",
    rf".*\.audio_attn2\.{_PROJECTION}",
    *_AUDIO_FF,
    rf".*\.video_to_audio_attn\.{_PROJECTION}",
)
# Preset -> include patterns; None takes every linear layer of the blocks, the gate projections of 2.3 too.
PRESETS: dict[str, tuple[str, ...] | None] = {
    "t2v": (rf".*\.{_PROJECTION}",),
    "v2v": (rf".*\.{_PROJECTION}", r".*\.ff\.net\.0\.proj$", r".*\.ff\.net\.2$", *_AUDIO_FF),
    "audio": _AUDIO,
    "audio_ref_only_ic": (*_AUDIO, rf".*\.audio_to_video_attn\.{_PROJECTION}"),
    "full": None,
}
STRATEGIES = ("auto", "none", "v2v", "audio_ref_only_ic")
ALWAYS_EXCLUDED = (r".*embeddings_connector\..*", r".*text_embedding_projection.*")

# First part of a layer's path inside its block -> group, in the order of the log.
GROUPS = {
    "attn1": "video attention",
    "attn2": "video attention",
    "ff": "video ffn",
    "audio_attn1": "audio attention",
    "audio_attn2": "audio attention",
    "audio_ff": "audio ffn",
    "audio_to_video_attn": "audio to video",
    "video_to_audio_attn": "video to audio",
}
_RUNS = {
    "video": {"video attention", "video ffn"},
    "audio": {"audio attention", "audio ffn"},
    "av": set(GROUPS.values()),
}


@dataclass(frozen=True)
class Targets:
    """What to select.

    Attributes:
        mode: video, av or audio; layers that do not run in it get no adapter.
        preset: a key of PRESETS; counts only while `include` is None.
        include: patterns in place of the preset's.
        exclude: patterns of layers to leave out unless an include pattern names them.
    """

    mode: str = "av"
    preset: str = "t2v"
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()


def is_linear(module: nn.Module) -> bool:
    """True for every layer an adapter can stand beside: torch's Linear, a quantised one, or an adapted one."""
    return isinstance(module, nn.Linear) or (
        hasattr(module, "in_features") and hasattr(module, "out_features") and hasattr(module, "bias")
    )


def linear_layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every linear layer, in the model's own order; an adapted one counts as one layer."""
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        if is_linear(child):
            yield path, child
        else:
            yield from linear_layers(child, f"{path}.")


def runs_in(group: str, mode: str) -> bool:
    """True when the layers of a group (a value of GROUPS) run in the mode."""
    return group in _RUNS[mode]


def group_of(path: str) -> str:
    """The group of a block's layer for logs and mode filtering, `other` for anything else."""
    parts = path.split(".")
    return GROUPS.get(parts[2], "other") if parts[0] == BLOCKS and len(parts) > 3 else "other"


def group_counts(paths: Iterable[str]) -> dict[str, int]:
    """Number of layers per group, groups without any included."""
    counts = Counter(group_of(path) for path in paths)
    return {group: counts[group] for group in dict.fromkeys([*GROUPS.values(), *counts])}


def default_preset(mode: str, strategy: str = "auto", typed: str | None = None) -> str:
    """The preset that holds when no patterns are given (06 section 3.8): typed, audio mode's, the strategy's, t2v."""
    if typed:
        return typed
    if mode == "audio":
        return "audio"
    return strategy if strategy in PRESETS else "t2v"


def resolve_strategy(strategy: str, preset: str, has_references: bool) -> str:
    """What `--ic_lora_strategy` comes to: `auto` follows the preset, v2v only where references are cached."""
    if strategy != "auto":
        return strategy
    if preset == "v2v":
        return "v2v" if has_references else "none"
    return preset if preset == "audio_ref_only_ic" else "none"


def compile_patterns(patterns: Sequence[str], option: str) -> list[re.Pattern]:
    """Compiled patterns.

    Raises:
        UserError: one does not compile; `option` says where it was typed.
    """
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise UserError(f"{option}: '{pattern}' is no regular expression ({error}); correct it") from error
    return compiled


def takes(path: str, include: Sequence[re.Pattern] | None, exclude: Sequence[re.Pattern]) -> bool:
    """True when the patterns take this layer: an explicit include wins over an exclude, fullmatch either way."""

    def any_match(patterns: Sequence[re.Pattern]) -> bool:
        return any(pattern.fullmatch("model." + path) or pattern.fullmatch(path) for pattern in patterns)

    included = include is not None and any_match(include)
    return included or (include is None and not any_match(exclude))


def adapts(targets: Targets) -> Callable[[str], bool]:
    """Whether a layer, by its path, gets an adapter; needs no model.

    Raises:
        UserError: a pattern does not compile.
    """
    patterns = PRESETS[targets.preset] if targets.include is None else targets.include
    include = None if patterns is None else compile_patterns(patterns, "--network_args include_patterns")
    exclude = compile_patterns(targets.exclude, "--network_args exclude_patterns")
    exclude += [re.compile(pattern) for pattern in ALWAYS_EXCLUDED]
    return lambda path: runs_in(group_of(path), targets.mode) and takes(path, include, exclude)


def select_layers(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """The layers of the blocks that get an adapter: path -> module, in the model's order.

    Raises:
        UserError: a pattern does not compile, or no layer matches.
    """
    chosen = adapts(targets)
    candidates = dict(linear_layers(model.get_submodule(BLOCKS), f"{BLOCKS}."))
    layers = {path: layer for path, layer in candidates.items() if chosen(path)}
    if not layers:
        tails = sorted({path.split(".", 2)[2] for path in candidates if runs_in(group_of(path), targets.mode)})
        source = "include_patterns and exclude_patterns" if targets.include is not None else f"preset {targets.preset}"
        raise UserError(
            f"no layer that runs in {targets.mode} mode matches the {source}; "
            f"the layers of each block are {', '.join(tails)}"
        )
    return layers


def describe(chosen: Mapping[str, object], parameters: int) -> str:
    """The start-up line: adapters per group and trainable parameters."""
    groups = ", ".join(f"{group} {count}" for group, count in group_counts(chosen).items() if count)
    return f"LoRA on {len(chosen)} layers ({groups}), {parameters / 1e6:.1f} M trainable parameters"
