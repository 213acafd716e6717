"""The picture pass: windows of clips, stills and references become latent files."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ltx2_tuner.caching.batching import lay_out
from ltx2_tuner.caching.decoding import CRASHED, Failed, PictureJob, decode_pictures
from ltx2_tuner.caching.encoders import VideoLatents
from ltx2_tuner.caching.ledger import Ledger
from ltx2_tuner.caching.run import Tally
from ltx2_tuner.caching.workers import Workers, ahead
from ltx2_tuner.data.cache_files import NonFiniteError, write_latents
from ltx2_tuner.data.frame_rate import FrameRate

logger = logging.getLogger(__name__)

# 8-bit level below which a whole clip counts as black.
BLACK_LEVEL = 16
# Decoded clips that wait while one is encoded, beside those that the workers hold.
WAITING_CLIPS = 2


@dataclass(frozen=True)
class PictureTarget:
    """A latent file to be made of `count` output frames of `source` from `start` on.

    key names it in messages. form: image, video or frames. size: pixels (width, height). hold_last: a source that
    ends early is held on its last frame (references).
    """

    key: str
    path: Path
    metadata: dict[str, str]
    source: Path
    form: str
    size: tuple[int, int]
    rate: FrameRate
    start: int
    count: int
    hold_last: bool = False


def encode_pictures(
    targets: Sequence[PictureTarget],
    batch_size: int,
    *,
    workers: Workers,
    ledger: Ledger,
    load_encoder: Callable[[], VideoLatents],
    tally: Tally,
    track: str | None = None,
) -> set[Path]:
    """Make the latent files that cannot be kept; failures are counted and the others go on.

    While a batch is encoded, the next one is fetched and the last one is written.

    Args:
        load_encoder: called once something has to be encoded.
        track: part of the tally that counts (None: the items themselves).

    Returns:
        Paths of the files that are there and right at the end.
    """
    good = {target.path for target in targets if ledger.keeps(target.path, target.metadata)}
    batches = lay_out(targets, batch_size, key=lambda target: (target.size, target.count))
    # A batch that misses one file is encoded whole, so that its numbers do not depend on what was there.
    batches = [batch for batch in batches if any(target.path not in good for target in batch)]
    for target in targets:
        if target.path in good:
            tally.add("skipped (existing)", track=track)
    if not batches:
        return good
    encoder = load_encoder()
    progress = tqdm(total=sum(len(batch) for batch in batches), unit="item", desc=track or "pictures", smoothing=0)
    complete = _complete_batches(batches, targets, workers, tally, track)
    writing: _Writing | None = None

    def settle() -> None:
        if writing is not None:
            good.update(_settle(writing, ledger, tally, track))
            progress.update(writing.size)

    with progress, ThreadPoolExecutor(1) as writer, contextlib.closing(complete):
        for batch, clips in complete:
            present = [target for target in batch if target.path in clips]
            latents = encoder.encode([clips[target.path] for target in present]) if present else []
            settle()
            rows = [
                (target, encoder.with_tiles_used(target.metadata), clips[target.path], latent)
                for target, latent in zip(present, latents)
                if target.path not in good
            ]
            writing = _Writing(len(batch), [(row[0], writer.submit(_write, *row)) for row in rows])
        settle()
    return good


@dataclass(frozen=True)
class _Writing:
    """The files of a batch of `size` targets that are being written."""

    size: int
    files: Sequence[tuple[PictureTarget, Future]]


def _write(target: PictureTarget, metadata: dict[str, str], clip: np.ndarray, latent: Tensor) -> bool:
    """Write a latent file; whether its picture is blank."""
    write_latents(target.path, latent, metadata)
    return _is_blank(clip)


def _settle(writing: _Writing, ledger: Ledger, tally: Tally, track: str | None) -> set[Path]:
    """Wait for the files of a batch and count them; returns the paths written."""
    written: set[Path] = set()
    for target, file in writing.files:
        try:
            blank = file.result()
        except NonFiniteError as error:
            tally.fail(target.key, str(error), track)
            continue
        ledger.wrote(target.path)
        tally.add("encoded", track=track)
        if blank:
            tally.add("blank picture", target.key, track)
        written.add(target.path)
    return written


def _is_blank(clip: np.ndarray) -> bool:
    """Whether a clip (N, H, W, 3) is black or of one colour throughout, which nobody means to train on."""
    sample = clip[:, ::4, ::4]
    return bool(sample.max() < BLACK_LEVEL or (sample == sample[0, 0, 0]).all())


def _complete_batches(
    batches: Sequence[Sequence[PictureTarget]],
    targets: Iterable[PictureTarget],
    workers: Workers,
    tally: Tally,
    track: str | None,
) -> Generator[tuple[Sequence[PictureTarget], dict[Path, np.ndarray]], None, None]:
    """Each batch as soon as its last member is decoded, with the clips (N, H, W, 3) of those that could be."""
    batch_of = {target.path: number for number, batch in enumerate(batches) for target in batch}
    waiting = [len(batch) for batch in batches]
    clips: dict[Path, np.ndarray] = {}
    decoded = ahead(decode_targets([target for target in targets if target.path in batch_of], workers), WAITING_CLIPS)
    with contextlib.closing(decoded):
        for target, clip in decoded:
            if isinstance(clip, Failed):
                tally.fail(target.key, clip.reason, track)
            else:
                clips[target.path] = clip
            number = batch_of[target.path]
            waiting[number] -= 1
            if not waiting[number]:
                batch = batches[number]
                yield batch, {each.path: clips.pop(each.path) for each in batch if each.path in clips}


def decode_targets(
    targets: Iterable[PictureTarget], workers: Workers
) -> Generator[tuple[PictureTarget, np.ndarray | Failed], None, None]:
    """Every target once, with its clip or what went wrong; a source with several windows is decoded once."""
    jobs: dict[PictureJob, list[PictureTarget]] = {}
    for _, group in itertools.groupby(targets, lambda each: (each.source, each.size, each.rate, each.hold_last)):
        members = list(group)
        first = members[0]
        windows = tuple((each.start, each.count) for each in members)
        jobs[PictureJob(first.source, first.form, first.size, first.rate, windows, first.hold_last)] = members
    for job, piece in workers.stream(decode_pictures, jobs, lambda job: Failed(CRASHED)):
        if isinstance(piece, Failed):
            yield from ((target, piece) for target in jobs[job] if target is not None)
            continue
        index, clip = piece
        target, jobs[job][index] = jobs[job][index], None
        yield target, clip
