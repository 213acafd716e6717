"""The seam between the training loop and what is added to its loss.

A regularizer is one class. For each micro-batch it may change the inputs, run extra passes, ask for hidden states of
the main forward, add to the loss before the backward pass or bring a loss with a backward pass of its own; and it owns
parameters and state. The loop goes through the same calls whatever is on; with nothing on they do nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ltx2_tuner import files
from ltx2_tuner.training.draws import TrainingDraws
from ltx2_tuner.training.modes import Prepared
from ltx2_tuner.training.objective import LossTerms
from ltx2_tuner.training.regularizers.passes import Passes, observing
from ltx2_tuner.training.saving import check_finite

logger = logging.getLogger(__name__)

TensorGroups = Mapping[str, Mapping[str, Tensor]]  # file stem -> tensors


@dataclass(frozen=True)
class Trained:
    """A module that is trained beside the network, in an optimizer group of its own (`name`)."""

    name: str
    module: nn.Module
    learning_rate: float


@dataclass
class Work:
    """One micro-batch as the regularizers see it.

    step: optimizer steps done. prepared: the inputs of the main forward. video, audio: its predictions of the target
    tokens (B, N, C). hidden: block -> its video output at the target tokens (B, N, D). task: the loss without
    regularizers.
    """

    prepared: Prepared
    batch: dict
    draws: TrainingDraws
    step: int
    video: Tensor | None = None
    audio: Tensor | None = None
    task: Tensor | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor | float] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent frames, height and width of the target tokens."""
        return tuple(self.batch["latents"]["latents"].shape[2:])


class Regularizer:
    """A technique; every method does nothing until a technique says otherwise.

    Attributes:
        metric: what its loss is logged as.
        cost: what it adds to a step, for the start-up log.
    """

    metric: str
    cost: str

    def prepare(self, work: Work) -> None:
        """Before the main forward: may replace `work.prepared` and run passes without gradients."""

    def blocks(self) -> Collection[int]:
        """Blocks whose outputs in the main forward are wanted, asked after `prepare`."""
        return ()

    def loss(self, work: Work) -> Tensor | None:
        """A scalar that joins the loss before the main backward; None when there is nothing to add."""

    def separate_loss(self, work: Work) -> Tensor | None:
        """After the main backward: a scalar of passes of its own, None when nothing runs."""

    def after_step(self) -> None:
        """The optimizer has stepped."""

    def trained(self) -> Sequence[Trained]:
        """Modules that the optimizer trains."""
        return ()

    def state(self) -> TensorGroups:
        """What a saved state has to hold, by file stem."""
        return {}

    def load_state(self, groups: TensorGroups, folder: Path) -> None:
        """Take up what a state in `folder` holds."""

    def output_files(self) -> TensorGroups:
        """What is written beside every checkpoint, by file stem."""
        return {}


class Regularizers:
    """All regularizers of a run, as the loop talks to them. `len` is their number."""

    def __init__(self, members: Sequence[Regularizer] = (), passes: Passes | None = None) -> None:
        self.members = tuple(members)
        self.passes = passes
        self.skipped: Counter[str] = Counter()  # losses that were not finite, by metric
        self._metrics: dict[str, Tensor | float] = {}

    def __len__(self) -> int:
        return len(self.members)

    def start(self, prepared: Prepared, batch: dict, draws: TrainingDraws, step: int) -> Work:
        """Begin a micro-batch; `work.prepared` is what the main forward has to run on."""
        work = Work(prepared, batch, draws, step, metrics=self._metrics)
        for member in self.members:
            member.prepare(work)
        return work

    @contextlib.contextmanager
    def watching(self, work: Work) -> Iterator[None]:
        """The main forward runs within the block; the hidden states that members ask for are kept.

        Where none is asked for the pass is left alone: an observed one cannot be replayed from a recording.
        """
        wanted = {block for member in self.members for block in member.blocks()}
        if not wanted:
            yield
            return
        task = work.prepared.video_task

        def keep(index: int, video: Tensor, _: Tensor | None) -> None:
            if index in wanted:
                work.hidden[index] = task.outputs(video)

        with observing(self.passes.model, keep):
            yield

    def add(self, work: Work, terms: LossTerms, video: Tensor | None, audio: Tensor | None) -> LossTerms:
        """The losses with what the members add to the total; a term that is not finite is left out."""
        if not self.members:
            return terms
        work.video, work.audio, work.task = video, audio, terms.total.detach()
        found = [(member.metric, loss) for member in self.members if (loss := member.loss(work)) is not None]
        work.hidden.clear()  # what the backward pass needs of it, the graph holds
        kept = self._finite(work, found)
        return dataclasses.replace(terms, total=sum(kept, terms.total))

    def finish(self, work: Work, backward: Callable[[Tensor], None]) -> None:
        """After the main backward: losses of separate passes, each with its own backward."""
        for member in self.members:
            loss = member.separate_loss(work)
            if loss is not None:
                for kept in self._finite(work, [(member.metric, loss)]):
                    backward(kept)

    def _finite(self, work: Work, found: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        """The losses that are finite; the others are counted and told. Waits for the device, once."""
        if not found:
            return []
        kept = []
        good = torch.stack([loss.detach().float() for _, loss in found]).isfinite().tolist()
        for (metric, loss), is_finite in zip(found, good):
            if is_finite:
                work.metrics[metric] = loss.detach()
                kept.append(loss)
            else:
                self.skipped[metric] += 1
                items = ", ".join(work.batch["item_keys"])
                logger.warning("%s is not finite and left out (%d so far): %s", metric, self.skipped[metric], items)
        return kept

    def metrics(self) -> dict[str, Tensor | float]:
        """What the members logged since the last call; of several micro-batches the last one's."""
        found = dict(self._metrics)
        self._metrics.clear()
        return found

    def after_step(self) -> None:
        """The optimizer has stepped."""
        for member in self.members:
            member.after_step()

    def trained(self) -> list[Trained]:
        """Modules that the optimizer trains beside the network."""
        return [trained for member in self.members for trained in member.trained()]

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of a saved state, by file stem, on the CPU."""
        found = [member.state() for member in self.members]
        return {stem: _on_host(tensors) for groups in found for stem, tensors in groups.items()}

    def load_state(self, groups: TensorGroups, folder: Path) -> None:
        """Take up what the state in `folder` holds."""
        for member in self.members:
            member.load_state(groups, folder)

    def write_files(self, folder: Path) -> None:
        """Write what is kept beside the checkpoints.

        Raises:
            UserError: a tensor holds NaN or infinity, or the disk is full.
        """
        for member in self.members:
            for stem, tensors in member.output_files().items():
                check_finite(tensors, stem)
                files.write_safetensors(folder / f"{stem}.safetensors", _on_host(tensors))


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
