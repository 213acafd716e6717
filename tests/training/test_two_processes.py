"""Two processes against one with the same global batch, samples and noise (R3)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ltx2_tuner.side_by_side import empty
from tests.training.ranks import run_ranks
from tests.training.tiny import Clip, make_trainer, write_workspace

CLIPS = (Clip(sound=17), Clip(), Clip(sound=12), Clip(sound=17))


class Fixed:
    """Draws that depend on the item alone, whichever process it is in."""

    def __init__(self, number: int) -> None:
        self._generator = torch.Generator().manual_seed(number)

    def caption_dropout(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.bool)

    first_frame = caption_dropout

    def sigma(self, tokens: torch.Tensor, buckets: torch.Tensor | None = None) -> torch.Tensor:
        return torch.rand(len(tokens), generator=self._generator)

    def noise(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)


def gradients(
    arguments: list[str], numbers: list[int], joined: bool = False
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What one window of these items leaves after all processes met, and its three norms.

    joined: the gradients lie side by side, as a recorded pass leaves them.
    """
    trainer = make_trainer([*arguments, "--gradient_accumulation_steps", str(len(numbers))])
    run = trainer.run
    for _, adapter in run.network.adapters():
        torch.nn.init.normal_(adapter.lora_up.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    data = run.data._sampler.data
    for number in numbers:
        trainer._learn(data[0, number], Fixed(number))
    if joined:
        parameters = run.gradients.parameters
        for parameter, place in zip(parameters, empty([p.shape for p in parameters], torch.float32, "cpu")):
            parameter.grad = place.zero_() if parameter.grad is None else place.copy_(parameter.grad)
    run.gradients.gather(torch.zeros(1), torch.zeros(1))
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in run.network.named_parameters()
    }
    return found, run.gradients.norms()


def test_two_processes_have_the_gradients_of_one(tmp_path, checkpoint):
    """Clips with and without sound, so that the two reach different adapters."""
    space = write_workspace(tmp_path, checkpoint, CLIPS)
    arguments = space.arguments("--ltx2_mode", "av")
    expected, norms = gradients(arguments, [0, 1, 2, 3])
    for done in run_ranks(["-m", "tests.training.test_two_processes", tmp_path, *arguments]):
        assert done.returncode == 0, done.stderr
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    for name, gradient in expected.items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        difference = (ranks[0][name] - gradient).norm()
        assert difference <= 1e-6 * max(gradient.norm(), 1e-3 * norms[0]), name
    assert torch.allclose(ranks[0]["norms"], norms, rtol=1e-6)


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    tensors, norms = gradients(sys.argv[2:], [rank, rank + 2], joined=rank == 0)
    save_file({**tensors, "norms": norms}, Path(sys.argv[1]) / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()
