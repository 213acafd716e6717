"""The sound pass: spans of sound tracks become sound latent files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ltx2_tuner.caching.decoding import CRASHED, Failed, NoTrack, SoundJob, decode_sound
from ltx2_tuner.caching.ledger import Ledger
from ltx2_tuner.caching.run import Tally
from ltx2_tuner.caching.workers import Workers
from ltx2_tuner.data.cache_files import NonFiniteError, write_audio
from ltx2_tuner.media.audio import is_silent
from ltx2_tuner.models.audio_vae import AudioEncoder, LogMel, encode_waveform

logger = logging.getLogger(__name__)

# A stretch outside these bounds changes how sound feels and usually means a wrong frame rate.
USUAL_STRETCH = (0.9, 1.1)


@dataclass(frozen=True)
class SoundTarget:
    """A sound latent file to be made of `span` seconds (None: all) of `source`.

    key names it in messages. metadata: without the duration, which is known after decoding.
    """

    key: str
    path: Path
    metadata: dict[str, str]
    source: Path
    span: tuple[float, float] | None = None
    stretch: float = 1.0
    peak_db: float | None = None


@dataclass
class SoundResult:
    """Which files are there and right at the end, and which targets have no sound to make one of."""

    good: set[Path] = field(default_factory=set)
    without: list[Path] = field(default_factory=list)


class SoundLatents:
    """One audio encoder with its front end."""

    def __init__(self, encoder: AudioEncoder) -> None:
        self.encoder = encoder
        self._log_mel = LogMel(encoder.config)

    def encode(self, samples: np.ndarray, rate: int) -> Tensor:
        """float32 (channels, S) at `rate` samples/s to latents (C, T, M) on the CPU."""
        return encode_waveform(self.encoder, torch.from_numpy(samples)[None], rate, self._log_mel)[0].cpu()

    def silence(self, seconds: float) -> Tensor:
        """Latents (C, T, M) of digital silence."""
        rate = self.encoder.config.sample_rate
        return self.encode(np.zeros((2, round(seconds * rate)), dtype=np.float32), rate)


def encode_sound(
    targets: Sequence[SoundTarget],
    *,
    workers: Workers,
    ledger: Ledger,
    load_encoder: Callable[[], SoundLatents],
    tally: Tally,
    track: str = "Audio",
) -> SoundResult:
    """Make the sound latent files that cannot be kept; failures are counted and the others go on.

    Args:
        load_encoder: called once something has to be encoded.
        track: part of the tally that counts.
    """
    result = SoundResult()
    result.good = {target.path for target in targets if ledger.keeps(target.path, target.metadata)}
    for _ in result.good:
        tally.add("skipped (existing)", track=track)
    missing = [target for target in targets if target.path not in result.good]
    jobs = _jobs(missing)
    encoder = None
    with tqdm(total=len(missing), unit="item", desc=track.lower(), disable=not missing) as progress:
        for job, piece in workers.stream(decode_sound, jobs, lambda job: Failed(CRASHED)):
            if isinstance(piece, Failed | NoTrack):
                ended = [target for group in jobs[job] for target in group]
            else:
                index, samples, rate = piece
                ended = jobs[job][index]
                jobs[job][index] = []
            progress.update(len(ended))
            if isinstance(piece, Failed):
                for target in ended:
                    tally.fail(target.key, piece.reason, track)
            elif isinstance(piece, NoTrack) or not samples.shape[1]:
                for target in ended:
                    tally.add("no audio", target.key, track)
                    result.without.append(target.path)
            else:
                encoder = encoder or load_encoder()
                result.good |= _write(ended, samples, rate, encoder, ledger, tally, track)
    return result


def _jobs(targets: Iterable[SoundTarget]) -> dict[SoundJob, list[list[SoundTarget]]]:
    """One job a track; for each of its spans the targets that want it."""
    tracks: dict[tuple, dict[tuple[float, float] | None, list[SoundTarget]]] = {}
    for target in targets:
        spans = tracks.setdefault((target.source, target.stretch, target.peak_db), {})
        spans.setdefault(target.span, []).append(target)
    jobs = {}
    for (source, stretch, peak_db), spans in tracks.items():
        jobs[SoundJob(source, tuple(spans), stretch, peak_db)] = list(spans.values())
        if stretch != 1.0:
            usual = USUAL_STRETCH[0] <= stretch <= USUAL_STRETCH[1]
            level = logging.INFO if usual else logging.WARNING
            logger.log(level, "%s: sound is stretched to %.3f of its length, with its pitch kept", source.name, stretch)
    return jobs


def _write(
    targets: Sequence[SoundTarget],
    samples: np.ndarray,
    rate: int,
    encoder: SoundLatents,
    ledger: Ledger,
    tally: Tally,
    track: str,
) -> set[Path]:
    """Encode one span and write it for every target that wants it; returns the paths written."""
    written: set[Path] = set()
    seconds = samples.shape[1] / rate
    latents = encoder.encode(samples, rate)
    for target in targets:
        try:
            write_audio(target.path, latents, target.metadata | {"duration_seconds": str(seconds)})
        except NonFiniteError as error:
            tally.fail(target.key, str(error), track)
            continue
        ledger.wrote(target.path)
        tally.add("encoded", track=track)
        if is_silent(samples):
            tally.add("silent", target.key, track)
        written.add(target.path)
    return written
