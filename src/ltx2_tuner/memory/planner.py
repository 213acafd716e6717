"""Chooses between resident blocks, recomputation and streaming so that the largest bucket fits the device.

A plan is made before the weights are read: the bytes of blocks are known from the checkpoint's header, those of
activations from the shapes of the largest batch. A rehearsal of that batch proves it; where it fails, `Plan.tighter`
is what comes next. None of the choices changes what is trained.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ltx2_tuner.memory.options import MemoryOptions
from ltx2_tuner.memory.speed import Speed

_GIB = 2**30
# CUDA context, library workspaces, one expanded matrix, fragmentation; and what a recorded pass reserves on top.
_RESERVE, _RECORDED = 0.8 * _GIB, 0.6 * _GIB
_FRAGMENTED = 0.05  # of the activations: gaps between them
# What the backward pass of a recomputed block takes, in what a block keeps that is not: its activations, gradients of
# them, expanded weights. The full-size model took 1.2 to 1.9 (docs/benchmarks.md).
_WORKING = 1.6
_EXPANDED = 0.8  # share of its expanded matrices that a recomputed block holds at once
_CLEARLY_LESS = 0.97
_AGAIN = 0.7  # of a forward pass: what only the results of a block's parts need is not computed again
_RECOMPUTE_STEPS = 12  # recomputation is chosen in so many portions of the blocks
# Device buffers for streamed blocks: two let copies overlap with arithmetic, the third lets them run ahead of it. One
# block more in the ring and one more streamed take the same memory and the same copies.
_RINGS = (3, 2)
# What a choice has to save of a step before blocks are streamed that need not be, and before some blocks recompute and
# others do not: each kind is compiled by itself.
_STREAMING, _MIXTURE = 0.03, 0.05
SMALLER = "use fp8 or nf4 weights, --optimizer_type AdamW8bit, a smaller resolution or shorter clips"


def spare(needed: float) -> float:
    """Bytes that a recorded pass, which needs so many of its own, leaves free: others cannot use what it holds."""
    return min(float(_GIB), needed / 4)


@dataclass(frozen=True)
class Footprint:
    """What a run needs, in bytes.

    block: one block's frozen weights; rest: weights outside of blocks; trained: adapters and optimizer state;
    gradients: of the adapters; passing: the same as a pass finds them, before they are cast; gradients_wait: whether
    those of one pass are there while the next one runs; kept: activations of a block that is not recomputed; boundary:
    what stays of one that is; expanded: a block's stored matrices when they are dense; forward: the work of a forward
    pass, in bf16's floating point operations; apart: how many times as long it takes where blocks are streamed, because
    weights that come and go multiply by themselves; shards: processes that each keep a part of every block.
    """

    blocks: int
    block: int
    rest: int
    trained: int
    gradients: int = 0
    passing: int = 0
    gradients_wait: bool = False
    kept: int = 0
    boundary: int = 0
    expanded: int = 0
    forward: float = 0.0
    apart: float = 1.0
    shards: int = 1

    def activations(self, choice: Choice) -> float:
        """Bytes of the peak that are there during a pass only; without gradients that take their place."""
        # The blocks that come first recompute: when the backward pass reaches them, the others' activations are gone.
        # So what one block takes comes on top only where all recompute.
        working = _WORKING * self.kept + _EXPANDED * self.expanded if choice.recomputed == self.blocks else 0
        kept = self.kept * (self.blocks - choice.recomputed)
        # Of those on the host, the first block's stays (a leaf), and the backward pass has its own and the next one.
        boundaries = self.boundary * (min(choice.recomputed, 3) if choice.offload else choice.recomputed)
        # Gradients appear while activations go, and are cast when these are gone; those that wait are another set.
        return max(working + max(kept + boundaries, self.passing), self.passing + self.gradients)

    def reserve(self, choice: Choice) -> float:
        """Bytes that stay free: for CUDA itself, and what the recording of a pass has to leave to others."""
        activations = self.activations(choice)
        return _RESERVE + _RECORDED + _FRAGMENTED * activations + spare(activations)

    def parts(self, choice: Choice) -> dict[str, float]:
        """Where each byte of the peak goes."""
        ring, resident = choice.ring, self.blocks - choice.streamed
        name = f"{resident} of {self.blocks} blocks"
        parts = {
            name if self.shards == 1 else f"1/{self.shards} of {name}": resident * self.block / self.shards,
            "other weights": self.rest,
            "adapters and optimizer": self.trained,
        }
        if choice.streamed:
            parts["ring for streamed blocks"] = min(ring, choice.streamed) * self.block
        if self.shards > 1:
            parts["ring for whole blocks"] = ring * self.block
        if self.gradients_wait:
            parts["gradients"] = self.gradients
        parts["activations" if self.gradients_wait else "activations, then gradients"] = self.activations(choice)
        return parts

    def total(self, choice: Choice) -> float:
        """Peak bytes on the device."""
        return sum(self.parts(choice).values())

    def seconds(self, choice: Choice, speed: Speed) -> float:
        """Of a step: its two passes, each as long as its arithmetic or its copies, whichever lasts longer."""
        forward = self.forward / speed.operations * (self.apart if choice.streamed else 1.0)
        backward = forward * (1 + _AGAIN * choice.recomputed / self.blocks)  # gradients of the inputs, recomputation
        # What the ring holds at the end of a pass is what the next one begins with.
        copies = max(choice.streamed - choice.ring, 0) * self.block / speed.copies
        states = choice.recomputed * self.boundary / speed.copies if choice.offload else 0.0  # on their way back
        return max(forward, copies) + max(backward, copies + states)


@dataclass(frozen=True)
class Choice:
    """One way to arrange a run.

    offload: what recomputed blocks start from waits in host memory. ring: device buffers for streamed blocks.
    """

    streamed: int = 0
    recomputed: int = 0
    offload: bool = False
    ring: int = 2


@dataclass(frozen=True)
class Plan:
    """The chosen options, and the ones that need less, in the order in which they are tried.

    table: where the memory goes, for the log. predicted: peak bytes on the device.
    """

    options: MemoryOptions
    predicted: float
    table: str
    fits: bool
    footprint: Footprint
    budget: float
    speed: Speed | None
    rest: tuple[Choice, ...]

    @property
    def choice(self) -> Choice:
        """What the options say."""
        options = self.options
        return Choice(options.blocks_to_swap, options.recomputed_blocks, options.checkpoint_offload, options.ring)

    def tighter(self, by: float = 0.0) -> Plan | None:
        """The next plan that needs clearly less memory, else one that streams more; None when there is none.

        What is streamed or recomputed stays so, and no buffers are added.

        Args:
            by: bytes that it shall need less, if there is such a plan.
        """
        now = self.choice
        further = [
            (index, choice)
            for index, choice in enumerate(self.rest)
            if choice.streamed >= now.streamed
            and choice.recomputed >= now.recomputed
            and (choice.ring <= now.ring or not now.streamed)
        ]
        less = _CLEARLY_LESS * self.predicted
        much = (i for i, choice in further if self.footprint.total(choice) < min(less, self.predicted - by))
        clearly = (index for index, choice in further if self.footprint.total(choice) < less)
        # Where blocks are small, the estimate may not see what streaming saves.
        streams_more = (index for index, choice in further if choice.streamed > max(now.streamed, now.ring))
        offloads = (index for index, choice in further if choice.offload)
        index = next(itertools.chain(much, clearly, streams_more, offloads), None)
        if index is None:
            return None
        return _plan(self.options, self.rest[index], self.rest[index + 1 :], self.footprint, self.budget, self.speed)


def settle(
    options: MemoryOptions,
    footprint: Footprint,
    budget: float,
    speed: Speed | None = None,
    *,
    training: bool = True,
    host: float = math.inf,
) -> Plan:
    """Fill in what was not typed, so that the estimate stays within `budget` bytes.

    The fastest choice by the predicted seconds: streamed blocks whose copies hide behind arithmetic cost nothing, and
    their memory keeps activations that would be recomputed. Without a `speed`: everything resident; recomputation of
    ever more blocks; as few streamed blocks as it takes (none of a sharded base); the inputs of recomputed blocks in
    host memory. A typed flag is never overridden.

    Args:
        host: bytes that streamed blocks may take in host memory, unless nothing else fits.
    """
    choices = list(_choices(options, footprint.blocks, training))
    if speed is not None and footprint.forward and training:
        choices = _by_seconds(options, choices, footprint, speed, host)
    for index, choice in enumerate(choices):
        if footprint.total(choice) + footprint.reserve(choice) <= budget or index == len(choices) - 1:
            return _plan(options, choice, tuple(choices[index + 1 :]), footprint, budget, speed)
    raise AssertionError("there is always a choice")


def _choices(options: MemoryOptions, blocks: int, training: bool) -> Iterator[Choice]:
    recomputed, streamed, rings = _open(options, blocks, training)
    offload = options.checkpoint_offload
    for count in recomputed:
        yield Choice(streamed[0], count, offload, rings[0 if streamed[0] else -1])
    for count in streamed[1:]:
        yield Choice(count, recomputed[-1], offload, rings[0])
    for ring in rings[1:]:
        yield Choice(streamed[-1], recomputed[-1], offload, ring)
    if recomputed[-1] and not offload:
        yield Choice(streamed[-1], recomputed[-1], True, rings[-1])


def _by_seconds(
    options: MemoryOptions, choices: list[Choice], footprint: Footprint, speed: Speed, host: float
) -> list[Choice]:
    """Every combination that takes no more of the host than it may, the fastest first; then what takes more."""
    recomputed, streamed, rings = _open(options, footprint.blocks, training=True)
    least = streamed[0]

    def cost(choice: Choice) -> tuple[float, int, int, int]:
        some = 0 < choice.recomputed < footprint.blocks
        factor = 1 + _STREAMING * (choice.streamed > least) + _MIXTURE * some
        return footprint.seconds(choice, speed) * factor, -choice.ring, choice.streamed, choice.recomputed

    grid = [
        Choice(count, portion, options.checkpoint_offload, ring)
        for count in streamed
        for portion in recomputed
        for ring in (rings if count else rings[-1:])
    ]
    modest = [choice for choice in grid if choice.streamed == least or choice.streamed * footprint.block <= host]
    taken = set(modest)
    return sorted(modest, key=cost) + [choice for choice in choices if choice not in taken]


def _open(options: MemoryOptions, blocks: int, training: bool) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """How many blocks may be recomputed, how many streamed, and through how many buffers, given what was typed."""
    portions = sorted({blocks * part // _RECOMPUTE_STEPS for part in range(_RECOMPUTE_STEPS + 1)})
    recomputed = portions if options.checkpointing is None else [blocks if options.checkpointing else 0]
    streamed = range(blocks) if options.blocks_to_swap is None else [options.blocks_to_swap]
    rings = _RINGS[-1:] if options.shard_base else _RINGS
    if options.ring_size is not None:
        rings = (options.ring_size,)
    return recomputed if training else [0], [0] if options.shard_base else streamed, rings


def _plan(
    options: MemoryOptions,
    choice: Choice,
    rest: tuple[Choice, ...],
    footprint: Footprint,
    budget: float,
    speed: Speed | None,
) -> Plan:
    parts = footprint.parts(choice)
    return Plan(
        options=replace(
            options,
            blocks_to_swap=choice.streamed,
            checkpointing=choice.recomputed > 0,
            recomputed_blocks=choice.recomputed,
            checkpoint_offload=choice.offload,
            ring_size=choice.ring,
        ),
        predicted=sum(parts.values()),
        table=_table(choice, parts, footprint, budget, speed),
        fits=_fits(parts, budget),
        footprint=footprint,
        budget=budget,
        speed=speed,
        rest=rest,
    )


def _fits(parts: Mapping[str, float], budget: float) -> bool:
    """Whether a pass fits, recorded or not."""
    return sum(parts.values()) + _RESERVE <= budget


def _table(
    choice: Choice,
    parts: Mapping[str, float],
    footprint: Footprint,
    budget: float,
    speed: Speed | None,
) -> str:
    rows = {**parts, "CUDA, workspaces, spare": footprint.reserve(choice)}
    rows["sum"] = sum(rows.values())
    rows["budget"] = budget
    blocks = footprint.blocks
    lines = [
        (
            f"memory plan: {choice.streamed} of {blocks} blocks streamed"
            if footprint.shards == 1
            else f"memory plan: {blocks} blocks sharded over {footprint.shards} processes"
        )
        + f", {choice.recomputed} recomputed"
        + (", their inputs in host memory" if choice.offload else "")
    ]
    lines += [f"  {name:<32}{size / _GIB:8.2f} GiB" for name, size in rows.items()]
    if choice.streamed:
        lines.append(f"  {'on the host':<32}{choice.streamed * footprint.block / _GIB:8.2f} GiB")
    # How fast the cards read each other is not measured.
    if speed is not None and footprint.forward and footprint.shards == 1:
        lines.append(f"  {'predicted':<32}{footprint.seconds(choice, speed):8.2f} s/step")
    if not _fits(parts, budget):
        lines.append(f"  this does not fit: {SMALLER}")
    elif rows["sum"] > budget:
        lines.append(f"  passes may have no room to be recorded, and take several times as long: {SMALLER}")
    return "\n".join(lines)
