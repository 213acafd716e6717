"""What lies between the two halves of a recomputed block: made anew in the backward pass, not kept.

A block's second half (`close_*`) reads what the first (`open_*`) made, so recomputing each half from its own inputs
keeps two hidden states of a stream where one would do. A checkpoint around the whole block would keep one, but compute
the last product of the feed-forward again for nothing. Here the first half alone is within a checkpoint, and the
second saves a recipe in place of what it read: asked for that in the backward pass, the recipe has the checkpoint
run the first half once more. The activations of that run then wait for the first half's own backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


class Opening:
    """Runs the first parts of one block in one pass: `opening(part, *arguments)` is the part's result.

    Args:
        recompute: whether the backward pass recomputes the block.
        inside: parts recompute by themselves all the same, as in code that is compiled as a whole.
        saved_inputs: makes the context in which the hidden state that a part starts from is saved.
    """

    def __init__(
        self, recompute: bool, inside: bool, saved_inputs: Callable[[], AbstractContextManager] = nullcontext
    ) -> None:
        self.recompute = recompute
        self.forgets = recompute and not inside and torch.is_grad_enabled()
        self.saved_inputs = saved_inputs
        self._recipes: dict[int, _Recipe] = {}

    def __call__(self, part: Callable[..., Tensor], hidden: Tensor, *arguments: object) -> Tensor:
        if not self.forgets:
            return part(hidden, *arguments, recompute=self.recompute)
        # The state of a generator cannot be read while a graph is recorded, and what draws is not recorded.
        draws = not (hidden.is_cuda and torch.cuda.is_current_stream_capturing())
        with self.saved_inputs():  # the checkpoint has hooks of its own for what the part would save
            opened = checkpoint(_run, part, hidden, *arguments, use_reentrant=False, preserve_rng_state=draws)
        if opened.requires_grad:
            self._recipes[opened.data_ptr()] = _Recipe(opened)
        return opened

    @property
    def parks(self) -> bool:
        """Whether the hidden states that the block starts from are saved elsewhere."""
        return self.forgets and self.saved_inputs is not nullcontext

    def makes_anew(self, opened: Tensor) -> bool:
        """Whether a result of a part is not kept: what needs no gradient is, for no graph leads back to it."""
        return opened.data_ptr() in self._recipes

    def closing(self) -> AbstractContextManager:
        """The context in which the last parts of the block run; results of the first must live as long as it."""
        recipes = self._recipes
        if not recipes:
            return nullcontext()

        def pack(tensor: Tensor) -> Tensor | _Recipe:
            recipe = recipes.get(tensor.data_ptr())
            if recipe is not None and recipe.layout == _layout(tensor):  # compiled parts save a view of what they get
                return recipe
            # Leaves as they are: a block store may put a layer's tensors elsewhere between forward and backward.
            return tensor if tensor.is_leaf else tensor.detach()

        return saved_tensors_hooks(pack, _made)


class _Opened(torch.autograd.Function):
    """Its input, which the checkpoint around it keeps nothing of and makes anew for whoever asks for what was saved."""

    @staticmethod
    def forward(ctx, opened: Tensor) -> Tensor:
        ctx.save_for_backward(opened)
        ctx.made = []  # saved tensors within a checkpoint can be asked for once a backward pass
        return opened

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        ctx.made.clear()  # all who read it have had their backward pass
        return grad


class _Recipe:
    """How to make the result of an opening part anew, on the CUDA stream on which it was made first."""

    def __init__(self, opened: Tensor) -> None:
        self.node, self.layout = opened.grad_fn, _layout(opened)
        self.stream = torch.cuda.current_stream(opened.device) if opened.is_cuda else None

    def make(self) -> Tensor:
        made = self.node.made
        if self.stream is None:
            if not made:
                made.append(self.node.saved_tensors[0])
            return made[0]
        if not made:
            with torch.cuda.stream(self.stream):
                made.append(self.node.saved_tensors[0])
                made.append(torch.cuda.Event())
                made[1].record()
        torch.cuda.current_stream(made[0].device).wait_event(made[1])
        return made[0]


def _run(part: Callable[..., Tensor], *arguments: object) -> Tensor:
    return _Opened.apply(part(*arguments))


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.shape, tensor.stride()


def _made(kept: Tensor | _Recipe) -> Tensor:
    return kept.make() if isinstance(kept, _Recipe) else kept
