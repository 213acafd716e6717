"""The order of batches: pure functions of (seed, epoch), so that every worker and a resumed run agree."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch

from ltx2_tuner.data.inventory import CachedItem


def epoch_batches(
    items: Sequence[CachedItem], batch_size: int, repeats: int, seed: int, epoch: int
) -> list[tuple[int, ...]]:
    """Batches of item numbers, each from one bucket.

    Epoch 0 is the sorted order; from epoch 1 on the items of every bucket and the batches are shuffled.
    """
    buckets: dict[tuple, list[int]] = {}
    for number, item in enumerate(items):
        buckets.setdefault(item.bucket_key, []).extend([number] * repeats)
    keys = sorted(buckets)
    generator = random.Random(seed + epoch)
    if epoch > 0:
        for key in keys:
            generator.shuffle(buckets[key])
    batches = [
        tuple(buckets[key][start : start + batch_size])
        for key in keys
        for start in range(0, len(buckets[key]), batch_size)
    ]
    if epoch > 0:
        generator.shuffle(batches)
    return batches


def timestep_pool(sizes: Sequence[int], buckets: int, seed: int, epoch: int) -> list[list[float]]:
    """Stratified draws in [0, 1) for batches of the given sizes: equally many from each of `buckets` intervals."""
    generator = random.Random(f"{seed + epoch} timesteps")
    total = sum(sizes)
    each = -(-total // buckets)
    below_one = math.nextafter(1.0, 0.0)  # the division may round up
    pool = [min((bucket + generator.random()) / buckets, below_one) for bucket in range(buckets) for _ in range(each)]
    generator.shuffle(pool)
    draws = iter(pool[:total])
    return [[next(draws) for _ in range(size)] for size in sizes]


def shuffled_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` batches of all datasets together."""
    if epoch == 0:
        return list(range(count))
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


def audio_quota_order(has_audio: Sequence[bool], window: int, quota: int, seed: int, epoch: int) -> list[int]:
    """An order in which every window of `window` batches has `quota` with sound, as long as there are any.

    Args:
        has_audio: per batch, whether an item of it has sound.
        window: gradient accumulation steps.
    """
    generator, audio, other = _pools(has_audio, seed, epoch)
    order: list[int] = []
    while audio or other:
        size = min(window, len(audio) + len(other))
        taken = [audio.pop() for _ in range(min(quota, size, len(audio)))]
        while len(taken) < size:
            taken.append((other or audio).pop())
        generator.shuffle(taken)
        order += taken
    return order


def audio_probability_order(has_audio: Sequence[bool], probability: float, seed: int, epoch: int) -> list[int]:
    """An order in which the next batch has sound with `probability`, until one kind runs out."""
    generator, audio, other = _pools(has_audio, seed, epoch)
    order: list[int] = []
    while audio and other:
        order.append((audio if generator.random() < probability else other).pop())
    return order + (audio or other)[::-1]


def _pools(has_audio: Sequence[bool], seed: int, epoch: int) -> tuple[random.Random, list[int], list[int]]:
    """Shuffled batch numbers with and without sound."""
    generator = random.Random(seed + epoch)
    audio = [number for number, heard in enumerate(has_audio) if heard]
    other = [number for number, heard in enumerate(has_audio) if not heard]
    generator.shuffle(audio)
    generator.shuffle(other)
    return generator, audio, other


def rank_share(order: Sequence[int], rank: int, world_size: int) -> list[int]:
    """Every `world_size`-th batch; the order wraps around so that all ranks get equally many."""
    each = -(-len(order) // world_size)
    return [order[(rank + step * world_size) % len(order)] for step in range(each)] if order else []
