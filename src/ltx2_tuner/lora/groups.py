"""Learning-rate groups of the adapters (06 section 6.4)."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from ltx2_tuner.errors import UserError
from ltx2_tuner.lora.layer import LoRAAdapter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearningRates:
    """Learning rates by module name.

    Attributes:
        base: for every module that nothing else names.
        audio: for modules whose name contains `audio_` (both cross-modal attentions included), None for `base`.
        patterns: (regular expression, rate) pairs searched in the module's kohya name; the longest match wins.
        plus_ratio: the up matrices learn this many times as fast (LoRA+), None for off.
    """

    base: float
    audio: float | None = None
    patterns: tuple[tuple[str, float], ...] = ()
    plus_ratio: float | None = None

    def of(self, name: str) -> tuple[float, str]:
        """Rate and label (`video`, `audio` or the pattern) of the module with this kohya name."""
        best: tuple[int, float, str] | None = None
        for pattern, rate in self.patterns:
            match = re.search(pattern, name)
            if match and (best is None or len(match.group()) > best[0]):
                best = (len(match.group()), rate, pattern)
        if best is not None:
            return best[1], best[2]
        is_audio = "audio_" in name
        return (self.audio if is_audio and self.audio is not None else self.base), "audio" if is_audio else "video"


def parse_lr_args(tokens: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """`pattern=lr` tokens, split at the last `=`.

    Raises:
        UserError: a token is malformed, its pattern does not compile, or its rate is no number of at least 0.
    """
    pairs = []
    for token in tokens:
        pattern, equals, text = token.rpartition("=")
        try:
            rate = float(text)
            valid = bool(equals and pattern) and 0 <= rate < float("inf")
        except ValueError:
            valid = False
        if not valid:
            raise UserError(f"--lr_args {token}: expected pattern=lr, such as audio_attn=1e-5")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"--lr_args {token}: '{pattern}' is no regular expression ({error}); correct it") from error
        pairs.append((pattern, rate))
    return tuple(pairs)


def parameter_groups(
    adapters: Iterable[tuple[str, LoRAAdapter]], rates: LearningRates
) -> tuple[list[dict[str, object]], list[str]]:
    """Optimizer groups (`params`, `lr`) and their names for the logs.

    Groups of equal rate and kind are merged; modules of rate 0 are frozen and in no group.

    Args:
        adapters: kohya name and adapter of every module.
    """
    adapters = list(adapters)
    _warn_unmatched([name for name, _ in adapters], rates)
    plain = rates.audio is None and not rates.patterns
    groups: dict[tuple[float, bool], tuple[list[nn.Parameter], list[str]]] = {}
    for name, adapter in adapters:
        rate, label = rates.of(name)
        halves = [(adapter.lora_down.weight, rate, False), (adapter.lora_up.weight, rate, False)]
        if rates.plus_ratio is not None:
            halves[1] = (adapter.lora_up.weight, rate * rates.plus_ratio, True)
        for parameter, half_rate, plus in halves:
            parameter.requires_grad_(half_rate != 0)
            if half_rate == 0:
                continue
            parameters, labels = groups.setdefault((half_rate, plus), ([], []))
            parameters.append(parameter)
            group_name = "unet" if plain else f"unet_{label}"
            if group_name not in labels:
                labels.append(group_name)
    listed = [{"params": parameters, "lr": rate} for (rate, _), (parameters, _) in groups.items()]
    names = ["+".join(labels) + (" plus" if plus else "") for (_, plus), (_, labels) in groups.items()]
    return listed, names


def _warn_unmatched(names: Sequence[str], rates: LearningRates) -> None:
    for pattern, _ in rates.patterns:
        if not any(re.search(pattern, name) for name in names):
            tails = sorted({re.sub(r"^.*?_blocks_\d+_", "", name) for name in names})
            near = difflib.get_close_matches(pattern, tails, n=3, cutoff=0.3) or tails[:3]
            logger.warning("--lr_args %s matches no adapter; near names: %s", pattern, ", ".join(near))
