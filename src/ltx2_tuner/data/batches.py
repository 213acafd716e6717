"""Training and validation data: caches in, batches out, in an order that (seed, epoch) decides."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ltx2_tuner.data import order
from ltx2_tuner.data.collate import Batch, load_batch
from ltx2_tuner.data.config import DatasetConfig
from ltx2_tuner.data.inventory import CachedItem, Inventory, check_inventories, take_inventory
from ltx2_tuner.errors import UserError

logger = logging.getLogger(__name__)

_ENOUGH_AUDIO = 0.3  # share of batches with sound below which voices are learned slowly


@dataclass(frozen=True)
class BatchOptions:
    """What the command line says about batches.

    references, reference_audio: whether the training uses them; then items without one are left out.
    timestep_buckets: >= 2 gives every batch stratified draws. audio_quota: batches with sound per `accumulation`
    batches. audio_probability: chance that the next batch has sound. dino: read DINO features. video_width: width of
    the video text embedding. silence: items without sound are trained on silence.
    """

    references: bool = True
    reference_audio: bool = True
    timestep_buckets: int = 0
    audio_quota: int = 0
    accumulation: int = 1
    audio_probability: float | None = None
    dino: bool = False
    video_width: int | None = None
    silence: bool = False


class _Planned(NamedTuple):
    """One batch of an epoch: number of its dataset, numbers of its items there, stratified draws."""

    group: int
    items: tuple[int, ...]
    timesteps: list[float] | None


class TrainingData(Dataset):
    """The batches of all training datasets.

    A sample is a ready batch (see `collate.load_batch`), addressed by (epoch, number); epochs count from 1, and epoch
    0 is the sorted order. Nothing is carried from epoch to epoch, so workers need no shared state.

    Raises:
        UserError: nothing to train on, or no batch with sound where the options ask for some.
    """

    def __init__(self, config: DatasetConfig, seed: int, options: BatchOptions | None = None) -> None:
        self.seed = seed
        self.options = options or BatchOptions()
        self.inventories = take_inventories(config.datasets, config.mode, self.options)
        check_inventories(self.inventories, config.mode, silence=self.options.silence, source=config.path)
        self._groups = [(inventory.dataset, tuple(inventory.items)) for inventory in self.inventories]
        self._plan: tuple[int, list[_Planned]] | None = None
        self._count = len(self._batches(0))
        heard = sum(self.has_audio(0, number) for number in range(len(self)))
        self.audio_share = heard / len(self)
        if config.mode == "av":
            _tell_audio_share(heard, len(self))
        if not heard and (self.options.audio_quota > 0 or self.options.audio_probability is not None):
            raise UserError(
                "--min_audio_batches_per_accum and --audio_batch_probability need clips with sound, but no cached item "
                "has any; run ltx2_cache_latents.py --ltx2_mode av"
            )

    def __getstate__(self) -> dict:
        # Workers need neither the headers nor the plan of some epoch.
        return self.__dict__ | {"inventories": [], "_plan": None}

    def __len__(self) -> int:
        """Batches an epoch, the same in every epoch."""
        return self._count

    @property
    def items(self) -> list[CachedItem]:
        """All items, each once."""
        return [item for _, items in self._groups for item in items]

    def _batches(self, epoch: int) -> list[_Planned]:
        """Every batch of an epoch, dataset by dataset."""
        if self._plan is None or self._plan[0] != epoch:
            plan: list[_Planned] = []
            for group, (dataset, items) in enumerate(self._groups):
                batches = order.epoch_batches(items, dataset.batch_size, dataset.num_repeats, self.seed, epoch)
                draws: Sequence[list[float] | None] = [None] * len(batches)
                if self.options.timestep_buckets >= 2:
                    sizes = [len(batch) for batch in batches]
                    draws = order.timestep_pool(sizes, self.options.timestep_buckets, self.seed, epoch)
                plan += [_Planned(group, batch, draw) for batch, draw in zip(batches, draws)]
            self._plan = (epoch, plan)
        return self._plan[1]

    def batch_items(self, epoch: int, number: int) -> list[CachedItem]:
        """The items of a batch."""
        planned = self._batches(epoch)[number]
        return [self._groups[planned.group][1][item] for item in planned.items]

    def has_audio(self, epoch: int, number: int) -> bool:
        """Whether any item of a batch has sound."""
        return any(item.has_audio for item in self.batch_items(epoch, number))

    def order(self, epoch: int) -> list[int]:
        """Batch numbers of an epoch in training order (all ranks together)."""
        count, options = len(self), self.options
        if options.audio_quota > 0 or options.audio_probability is not None:
            heard = [self.has_audio(epoch, number) for number in range(count)]
            if options.audio_quota > 0:
                return order.audio_quota_order(heard, options.accumulation, options.audio_quota, self.seed, epoch)
            return order.audio_probability_order(heard, options.audio_probability, self.seed, epoch)
        return order.shuffled_order(count, self.seed, epoch)

    def __getitem__(self, position: tuple[int, int]) -> Batch:
        """The batch at (epoch, number)."""
        epoch, number = position
        planned = self._batches(epoch)[number]
        return load_batch(
            self._groups[planned.group][0],
            self.batch_items(epoch, number),
            timesteps=planned.timesteps,
            dino=self.options.dino,
            video_width=self.options.video_width,
        )

    def loader(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        persistent_workers: bool = False,
        pin_memory: bool = False,
    ) -> EpochLoader:
        """Batches of one rank, in training order, loaded by `workers` processes."""
        return EpochLoader(self, rank, world_size, workers, persistent_workers, pin_memory)


class EpochLoader:
    """Iterates over the batches of one rank; call `set_epoch` before each pass.

    `len` is the number of batches of a whole epoch, whatever is skipped.
    """

    def __init__(
        self,
        data: TrainingData,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        persistent_workers: bool = False,
        pin_memory: bool = False,
    ) -> None:
        self._sampler = _EpochSampler(data, rank, world_size)
        self._length = len(self._sampler)
        workers = min(workers, os.cpu_count() or 1, self._length)
        self._begun: tuple[tuple[int, int], Iterator[Batch]] | None = None
        self._loader = DataLoader(
            data,
            batch_size=None,
            sampler=self._sampler,
            num_workers=workers,
            collate_fn=_unchanged,
            persistent_workers=persistent_workers and workers > 0,
            multiprocessing_context="spawn" if workers else None,
            worker_init_fn=_leave_requests,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # a pass that begins draws a seed, which nothing here uses
        )

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the epoch (from 1) and how many of its batches to leave out, unread, at the start."""
        self._sampler.epoch, self._sampler.skip = epoch, skip

    def start(self) -> None:
        """Begin to load the chosen batches: the next pass over them finds its first ones there."""
        self._begun = (self._chosen, self._begin())

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        begun, self._begun = self._begun, None
        return begun[1] if begun is not None and begun[0] == self._chosen else self._begin()

    @property
    def _chosen(self) -> tuple[int, int]:
        return self._sampler.epoch, self._sampler.skip

    def _begin(self) -> Iterator[Batch]:
        with _requests_held():
            return iter(self._loader)


class _EpochSampler(Sampler):
    """Yields (epoch, batch number): with the epoch in the address, workers cannot be in another one."""

    def __init__(self, data: TrainingData, rank: int, world_size: int) -> None:
        self.data, self.rank, self.world_size = data, rank, world_size
        self.epoch, self.skip = 1, 0

    def __len__(self) -> int:
        return -(-len(self.data) // self.world_size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, skip = self.epoch, self.skip
        share = order.rank_share(self.data.order(epoch), self.rank, self.world_size)
        return iter([(epoch, number) for number in share[skip:]])


@contextlib.contextmanager
def _requests_held() -> Iterator[None]:
    """A request to stop (Ctrl-C, SIGTERM) within the block arrives after it; processes started in it never get one.

    A terminal, `timeout` or a job scheduler sends it to the loader's processes too, and without them the running step
    could not be finished.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows: `_leave_requests` alone
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_requests(_worker: int) -> None:
    """In a loader process: what the run's process group gets is not for it; only the run itself ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # forgets one that came meanwhile
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _unchanged(batch: Batch) -> Batch:
    return batch


class ValidationData(Dataset):
    """Validation batches: one item each, datasets in order, items sorted, nothing shuffled or repeated.

    Raises:
        UserError: no validation dataset, or one without items.
    """

    def __init__(self, config: DatasetConfig, options: BatchOptions | None = None) -> None:
        self.options = options or BatchOptions()
        if not config.validation:
            raise UserError(
                f"{config.path}: validation was asked for, but there is no [[validation_datasets]] entry; add one, or "
                "remove --validate_every_n_steps and --validate_every_n_epochs"
            )
        self.inventories = take_inventories(config.validation, config.mode, self.options)
        check_inventories(self.inventories, config.mode)
        self._entries = [(found.dataset, item) for found in self.inventories for item in found.items]

    @property
    def items(self) -> list[CachedItem]:
        return [item for _, item in self._entries]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, number: int) -> Batch:
        """The batch of one item."""
        dataset, item = self._entries[number]
        return load_batch(dataset, [item], dino=self.options.dino, video_width=self.options.video_width)

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(len(self)))


def _tell_audio_share(heard: int, batches: int) -> None:
    """How much of an epoch trains sound, and what raises it when it is little."""
    share = heard / batches
    logger.info("sound is trained in %d of %d batches of an epoch (%.0f %%)", heard, batches, 100 * share)
    if 0 < share < _ENOUGH_AUDIO:
        factor = math.ceil(_ENOUGH_AUDIO * (batches - heard) / ((1 - _ENOUGH_AUDIO) * heard))
        logger.warning(
            "sound learns slowly with so few batches; num_repeats times %d on the datasets with sound gives %.0f %%",
            factor,
            100 * factor * heard / (factor * heard + batches - heard),
        )


def take_inventories(datasets: Sequence, mode: str, options: BatchOptions) -> list[Inventory]:
    """The inventory of every dataset."""
    return [
        take_inventory(dataset, mode, references=options.references, reference_audio=options.reference_audio)
        for dataset in datasets
    ]
