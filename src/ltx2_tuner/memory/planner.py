"""Chooses between resident blocks, recomputation and streaming so that the largest bucket fits the device.

An estimate, made before the weights are read: bytes of the blocks are known from the checkpoint's header, activations
are counted in units of one stream's hidden state (tokens x width x bytes).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ltx2_tuner.memory.options import MemoryOptions

_GIB = 2**30
# Saved activations of one block in units of its hidden state, measured on the full-size model.
_KEPT_UNITS = 21.0
_RESERVE = 1.0 * _GIB  # CUDA context, workspaces, fragmentation


@dataclass(frozen=True)
class Footprint:
    """What a run needs, in bytes. block: one block's frozen weights; rest: weights outside of blocks; trained:
    adapters with gradients and optimizer state; hidden: the hidden states of the largest batch, both streams."""

    blocks: int
    block: int
    rest: int
    trained: int
    hidden: int

    def total(self, streamed: int, ring: int, checkpointing: bool) -> float:
        """Peak bytes on the device."""
        resident = self.blocks - streamed + (min(ring, streamed) if streamed else 0)
        if checkpointing:
            # One hidden state per block, and one block's activations at a time.
            activations = self.hidden * (self.blocks + _KEPT_UNITS)
        else:
            activations = self.hidden * _KEPT_UNITS * self.blocks
        return self.rest + self.trained + resident * self.block + activations + _RESERVE


def settle(options: MemoryOptions, footprint: Footprint, budget: float) -> tuple[MemoryOptions, str]:
    """Fill in what was not typed, so that the estimate stays within `budget` bytes.

    Tried in this order: everything resident; recomputation; then as few streamed blocks as it takes. A typed flag is
    never overridden.

    Returns:
        The options and one line that says what was chosen and why.
    """
    typed = options.blocks_to_swap
    counts = range(footprint.blocks) if typed is None else [typed]
    modes = [False, True] if options.checkpointing is None else [options.checkpointing]
    choices = [(streamed, mode) for streamed in counts for mode in modes]
    # Recomputation costs less than streaming, so it comes before the first streamed block.
    chosen = next(
        (choice for choice in choices if footprint.total(choice[0], options.ring_size, choice[1]) <= budget),
        choices[-1],
    )
    streamed, checkpointing = chosen
    need = footprint.total(streamed, options.ring_size, checkpointing)
    verdict = "" if need <= budget else ", which does not fit: use a smaller resolution, fp8 or nf4 weights"
    line = (
        f"memory: about {need / _GIB:.1f} GiB of {budget / _GIB:.1f} GiB with "
        f"{streamed} streamed blocks and recomputation {'on' if checkpointing else 'off'}{verdict}"
    )
    return replace(options, blocks_to_swap=streamed, checkpointing=checkpointing), line
