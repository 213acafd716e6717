"""A small model with a network on it, and one training step on random batches, for tests of the regularizers."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch

from ltx2_tuner.lora import Dropouts, LoRANetwork, Targets, select_layers
from ltx2_tuner.models.transformer import LTXTransformer, TransformerConfig
from ltx2_tuner.training.modes import Mode
from ltx2_tuner.training.objective import LossTerms, task_loss
from ltx2_tuner.training.options import LossOptions
from ltx2_tuner.training.regularizers import Regularizer, Regularizers, Work
from ltx2_tuner.training.regularizers.passes import Passes
from ltx2_tuner.training.regularizers.prompts import Prompt
from tests.training.test_modes import make_draws

WIDTH = 64


def make_model(layers: int = 4, seed: int = 0) -> LTXTransformer:
    """A frozen random transformer of both streams."""
    torch.manual_seed(seed)
    config = TransformerConfig(
        num_layers=layers,
        num_heads=4,
        head_dim=16,
        audio_head_dim=8,
        in_channels=8,
        out_channels=8,
        audio_in_channels=32,
        audio_out_channels=32,
        cross_attention_dim=WIDTH,
        audio_cross_attention_dim=32,
        cross_attention_adaln=True,
        apply_gated_attention=True,
        caption_proj_before_connector=True,
    )
    model = LTXTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


def make_network(model: LTXTransformer, mode: str = "av", *, trained: bool = True, dropout: float = 0.0) -> LoRANetwork:
    """An attached LoRA; `trained` gives it an effect."""
    layers = select_layers(model, Targets(mode, "audio" if mode == "audio" else "t2v"))
    network = LoRANetwork(layers, 4, dropouts=Dropouts(dropout))
    if trained:
        generator = torch.Generator().manual_seed(1)
        for _, adapter in network.adapters():
            with torch.no_grad():
                adapter.lora_up.weight.normal_(0, 0.1, generator=generator)
    return network.attach(model).train()


def make_prompt(seed: int = 9, *, sound: bool = True) -> Prompt:
    """A random prompt of 16 tokens, the last 3 of them padding."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(16, dtype=torch.int64)
    mask[13:] = 0
    audio = torch.randn(16, 32, generator=generator)
    return Prompt(torch.randn(16, WIDTH, generator=generator), audio if sound else None, mask)


@dataclass
class Bench:
    """A model, its network and a mode; runs micro-batches as the training loop does."""

    mode: Mode
    layers: int = 4
    trained: bool = True
    dropout: float = 0.0
    model: LTXTransformer = field(init=False)
    network: LoRANetwork = field(init=False)

    def __post_init__(self) -> None:
        self.model = make_model(self.layers)
        kind = "av" if "av" in self.mode.name else "audio" if self.mode.name == "audio" else "video"
        self.network = make_network(self.model, kind, trained=self.trained, dropout=self.dropout)
        self.passes = Passes(self.model, self.network, contextlib.nullcontext)

    def regularizers(self, *members: Regularizer) -> Regularizers:
        return Regularizers(members, self.passes)

    def step(
        self, regularizers: Regularizers, batch: dict, *, index: int = 0, step: int = 0, share: float = 1.0, **draws
    ) -> tuple[Work, LossTerms]:
        """Forward and backward of a micro-batch; gradients add up in the network."""
        draws = make_draws(index, **draws)
        work = regularizers.start(self.mode.prepare(batch, draws), batch, draws, step)
        with regularizers.watching(work):
            video, audio = work.prepared.run(self.model)
        terms = task_loss(work.prepared, video, audio, LossOptions())
        terms = regularizers.add(work, terms, video, audio)
        (terms.total * share).backward()
        regularizers.finish(work, lambda loss: (loss * share).backward())
        return work, terms

    def gradients(self) -> torch.Tensor:
        """All gradients of the network as one vector, 0 where there is none."""
        parameters = list(self.network.parameters())
        return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])


def halves(batch: dict) -> list[dict]:
    """A batch of two items as two batches of one."""
    return [_cut(batch, slice(index, index + 1)) for index in range(2)]


def _cut(value, rows: slice):
    if isinstance(value, dict):
        return {key: _cut(item, rows) for key, item in value.items()}
    return value[rows] if isinstance(value, torch.Tensor | list) else value


def count_calls(model: LTXTransformer) -> list[bool]:
    """Grows by one entry a forward: whether it made a graph."""
    calls: list[bool] = []
    model.register_forward_hook(
        lambda _module, _inputs, outputs: calls.append(any(o is not None and o.requires_grad for o in outputs))
    )
    return calls
