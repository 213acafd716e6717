"""Do the caches belong to the checkpoint, the Gemma and the mode of this run?

Caches of another checkpoint train without a word and ruin the result, so the trainer refuses them by default.
Fingerprints are 16 hex digits over the weights of one component; a cache without them counts as unknown.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ltx2_tuner.data.cache_files import CacheHeader
from ltx2_tuner.data.inventory import CachedItem, Inventory
from ltx2_tuner.errors import UserError

logger = logging.getLogger(__name__)

_LATENTS_SCRIPT = "ltx2_cache_latents.py"
_TEXT_SCRIPT = "ltx2_cache_text_encoder_outputs.py"
_LISTED = 10


@dataclass(frozen=True)
class ExpectedCaches:
    """What the caches must have been made with. None: this run does not know or need it.

    mode: video, av or audio. video_encoder, audio_encoder, text: component ids. gemma: its id. video_width,
    audio_width: text context widths the transformer takes. latent_channels: channels of the video latent.
    reference_downscale: divisor of reference sizes. preprocess: settings of the caching run that this run knows.
    """

    mode: str
    video_encoder: str | None = None
    audio_encoder: str | None = None
    text: str | None = None
    gemma: str | None = None
    video_width: int | None = None
    audio_width: int | None = None
    latent_channels: int | None = 128
    reference_downscale: int | None = None
    preprocess: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Mismatch:
    """One cache file that does not fit, why, and the script that makes it again."""

    path: Path
    reason: str
    script: str


def check_caches(inventories: Sequence[Inventory], expected: ExpectedCaches, policy: str = "error") -> None:
    """Compare every cache file of the datasets with what this run expects.

    Args:
        policy: error, warn or off (--cache_check_mode) for fingerprints and settings. Tensors that the model cannot
            take are an error whatever the policy.

    Raises:
        UserError: naming files, the difference and the command that mends it.
    """
    unfit = [found for inventory in inventories for found in _unfit(inventory, expected)]
    if unfit:
        raise UserError(_message(unfit, expected.mode))
    if policy == "off":
        return
    stale = [found for inventory in inventories for found in _stale(inventory, expected)]
    if not stale:
        return
    message = _message(stale, expected.mode)
    if policy == "error":
        raise UserError(f"{message} (--cache_check_mode warn or off trains on them as they are)")
    logger.warning("%s", message)


def _message(found: Sequence[Mismatch], mode: str) -> str:
    names = ", ".join(mismatch.path.name for mismatch in found[:_LISTED]) + (", ..." if len(found) > _LISTED else "")
    reasons = "; ".join(dict.fromkeys(mismatch.reason for mismatch in found))
    scripts = " and ".join(f"{script} --ltx2_mode {mode}" for script in dict.fromkeys(item.script for item in found))
    return (
        f"{len(found)} cache files do not fit this run: {reasons} ({names}); run {scripts} again "
        "with the checkpoint and Gemma of this training"
    )


def _unfit(inventory: Inventory, expected: ExpectedCaches) -> Iterator[Mismatch]:
    """Files whose tensors the model cannot take."""
    seen: set[Path] = set()
    for item in inventory.items:
        reason = _latent_problem(inventory.headers[item.latent_path], expected)
        if reason:
            yield Mismatch(item.latent_path, reason, _LATENTS_SCRIPT)
        if item.text_path in seen:
            continue
        seen.add(item.text_path)
        reason = _text_problem(inventory.headers[item.text_path], expected)
        if reason:
            yield Mismatch(item.text_path, reason, _TEXT_SCRIPT)


def _latent_problem(header: CacheHeader, expected: ExpectedCaches) -> str | None:
    """Why the model cannot take a latent."""
    if expected.mode == "audio":  # a placeholder, of which only the virtual geometry is used
        return (
            None if "ltx2_virtual_num_frames" in header.shapes else "no virtual geometry, which --ltx2_mode audio needs"
        )
    channels = header.shape[0]
    if expected.latent_channels is None or channels == expected.latent_channels:
        return None
    return f"latents have {channels} channels, the model takes {expected.latent_channels}"


def _text_problem(header: CacheHeader, expected: ExpectedCaches) -> str | None:
    """Why the model cannot take the text embeddings of a file."""
    wanted = {"video": expected.video_width, "audio": expected.audio_width}
    if "video_prompt_embeds" in header.shapes:
        widths = {name: header.shapes.get(f"{name}_prompt_embeds", (0, 0))[-1] for name in wanted}
    else:
        widths = _joined_widths(header.shape[-1], expected)
    if expected.mode in ("av", "audio") and not widths["audio"]:
        return f"no audio text embeddings, which --ltx2_mode {expected.mode} needs"
    needed = {"video": ("video",), "av": ("video", "audio"), "audio": ("audio",)}[expected.mode]
    for name in needed:
        if wanted[name] is not None and widths[name] != wanted[name]:
            return f"{name} text embeddings are {widths[name]} wide, the model takes {wanted[name]}"
    return None


def _joined_widths(width: int, expected: ExpectedCaches) -> dict[str, int]:
    """Widths of the parts of a joined embedding, which older caches hold alone."""
    video = min(expected.video_width or width, width)
    return {"video": video, "audio": width - video}


def _stale(inventory: Inventory, expected: ExpectedCaches) -> Iterator[Mismatch]:
    """Files made with other weights, for another mode or with other settings."""
    unknown = 0
    seen: set[Path] = set()
    for item in inventory.items:
        for path, wanted, settings, script in _rows(item, expected):
            if path is None or path in seen:
                continue
            seen.add(path)
            metadata = inventory.headers[path].metadata
            unknown += "component_id" not in metadata
            reason = _difference(metadata, wanted, settings, expected.mode, script)
            if reason:
                yield Mismatch(path, reason, script)
    if unknown:
        logger.warning(
            "%s: %d cache files carry no fingerprint (made by another tool); taken as fitting",
            inventory.dataset.label,
            unknown,
        )


def _rows(
    item: CachedItem, expected: ExpectedCaches
) -> Iterator[tuple[Path | None, dict[str, str | None], Mapping[str, object], str]]:
    """(file, wanted ids, wanted settings, script) of everything an item is trained on."""
    sound = {"component_id": expected.audio_encoder}
    # The latent of a sound item is a placeholder: no encoder made it.
    picture = {"component_id": None if expected.mode == "audio" else expected.video_encoder}
    yield item.latent_path, picture, expected.preprocess, _LATENTS_SCRIPT
    yield item.audio_path, sound, expected.preprocess, _LATENTS_SCRIPT
    downscale = None if expected.reference_downscale is None else str(expected.reference_downscale)
    yield item.reference_path, {**picture, "reference_downscale": downscale}, {}, _LATENTS_SCRIPT
    yield item.reference_audio_path, sound, {}, _LATENTS_SCRIPT
    yield item.text_path, {"component_id": expected.text, "gemma_id": expected.gemma}, {}, _TEXT_SCRIPT


def _difference(
    metadata: Mapping[str, str],
    wanted: Mapping[str, str | None],
    settings: Mapping[str, object],
    mode: str,
    script: str,
) -> str | None:
    """Why a file does not fit, or None."""
    for key, value in wanted.items():
        found = metadata.get(key, value)
        if value is None or found == value:
            continue
        if key == "reference_downscale":
            return f"the caches hold references at 1/{found}, this run says --reference_downscale {value}"
        return "made with another Gemma" if key == "gemma_id" else "made with another checkpoint"
    made = _settings(metadata)
    made_for = metadata.get("ltx_mode") or made.get("ltx_mode") or mode
    # Text of mode av holds all that the other modes read; pictures are encoded alike in modes video and av.
    alike = {made_for, mode} <= {"video", "av"} if script == _LATENTS_SCRIPT else made_for == "av"
    if made_for != mode and not alike:
        return f"made with --ltx2_mode {made_for}"
    for name, value in settings.items():
        if name in made and made[name] != value:
            return f"made with {name} {made[name]}, this run has {value}"
    return None


def _settings(metadata: Mapping[str, str]) -> dict:
    try:
        values = json.loads(metadata.get("preprocess", "{}"))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
