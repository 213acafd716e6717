"""An IC-LoRA uses its reference: the target is the reference shifted in colour, and only the own reference helps."""

from __future__ import annotations

from pathlib import Path

import torch

from ltx2_tuner.checkpoint import Checkpoint, component_id
from ltx2_tuner.data.cache_files import write_latents
from ltx2_tuner.training.draws import ValidationDraws
from ltx2_tuner.training.objective import task_loss
from ltx2_tuner.training.options import LossOptions
from tests.training.tiny import Clip, make_trainer, write_workspace

ITEMS = 4
GRID = (1, 2, 2)


def write_references(root: Path, cache: Path, checkpoint: Path) -> None:
    """Make each cached target its reference plus one shift per channel, and all captions the same."""
    identity = component_id(Checkpoint.open(checkpoint), "video_encoder")
    generator = torch.Generator().manual_seed(1)
    shift = torch.randn(8, 1, 1, 1, generator=generator)
    texts = sorted(cache.glob("*_te.safetensors"))
    for path in texts[1:]:
        path.write_bytes(texts[0].read_bytes())
    for path in sorted(cache.glob("*_ltx2.safetensors")):
        reference = torch.randn(8, *GRID, generator=generator)
        facts = {"frame_count": 1, "target_fps": 25.0, "width": 64, "height": 64, "component_id": identity}
        write_latents(path, reference + shift, facts)
        (root / "references").mkdir(exist_ok=True)
        write_latents(root / "references" / path.name, reference, {**facts, "reference_downscale": "1"})


def losses(trainer) -> tuple[float, float]:
    """Mean loss with the own reference and with the next item's."""
    run = trainer.run
    batches = list(run.data)
    sums = [0.0, 0.0]
    with torch.no_grad():
        for index, batch in enumerate(batches):
            other = {**batch, "ref_latents": batches[(index + 1) % len(batches)]["ref_latents"]}
            for draw in range(4):
                for place, given in enumerate((batch, other)):
                    prepared = run.mode.prepare(given, ValidationDraws(f"probe {draw}", 0, run.draws.sampler))
                    terms = task_loss(prepared, *prepared.run(run.model), LossOptions())
                    sums[place] += terms.video.mean.item() / (4 * len(batches))
    return sums[0], sums[1]


def test_the_own_reference_lowers_the_loss(tmp_path, checkpoint):
    space = write_workspace(
        tmp_path,
        checkpoint,
        [Clip(grid=GRID)] * ITEMS,
        batch_size=1,
        options=f"reference_cache_directory = '{(tmp_path / 'references').as_posix()}'\n",
    )
    write_references(tmp_path, tmp_path / "datasets", checkpoint)
    flags = ["--lora_target_preset", "v2v", "--max_train_steps", 400, "--learning_rate", 1e-2, "--network_dim", 32]
    trainer = make_trainer(space.arguments(*flags, "--lr_scheduler", "cosine"))
    before, _ = losses(trainer)
    trainer.train()
    own, other = losses(trainer)
    assert own < 0.6 * before, "it learned"
    assert own < 0.7 * other, "and it reads the reference"
