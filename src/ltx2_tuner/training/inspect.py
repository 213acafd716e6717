"""Looking at a run without training: the noise levels, the batches, and a rehearsal of one batch per bucket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ltx2_tuner.data.batches import TrainingData
from ltx2_tuner.media.write import write_image
from ltx2_tuner.training.draws import TrainingDraws
from ltx2_tuner.training.objective import task_loss
from ltx2_tuner.training.random import DrawKey
from ltx2_tuner.training.sigmas import SigmaSampler, describe, histogram_picture, histogram_text

if TYPE_CHECKING:
    from ltx2_tuner.training.loop import Trainer
    from ltx2_tuner.training.sources import Sources, TrainingConfig


def show_timesteps(sampler: SigmaSampler, data: TrainingData, config: TrainingConfig, form: str) -> str:
    """100 000 noise levels for the first bucket's token count, as text or as a picture in the output folder.

    Returns:
        What to print.
    """
    channels_first = data.items[0].latent_shape
    tokens = channels_first[1] * channels_first[2] * channels_first[3]
    sigmas = describe(sampler, tokens, config.loop.seed)
    title = f"{len(sigmas)} noise levels for {tokens} tokens: mean {sigmas.mean():.3f}"
    if form == "console":
        return f"{title}\n{histogram_text(sigmas)}"
    path = Path(config.save.output_dir) / f"{config.save.output_name}_timesteps.png"
    write_image(path, histogram_picture(sigmas).numpy())
    return f"{title}: {path}"


def dataset_lines(data: TrainingData) -> Iterator[str]:
    """One line per batch of the first epoch, in training order."""
    for place, number in enumerate(data.order(1)):
        batch = data[1, number]
        latents = batch["latents"]["latents"]
        sound = batch.get("audio_lengths")
        heard = "" if sound is None else f" | sound {sound.tolist()} steps"
        yield f"batch {place}: latents {tuple(latents.shape)}{heard} | {', '.join(batch['item_keys'])}"


def preflight(trainer: Trainer, sources: Sources) -> Iterator[str]:
    """Forward and backward of one batch of every bucket, with the device memory each takes; nothing is stepped."""
    run = trainer.run
    yield f"{len(run.data)} batches an epoch, {trainer.max_steps} steps, {trainer.epochs} epochs"
    seen = set()
    for number in range(len(sources.training)):
        bucket = sources.training.batch_items(0, number)[0].bucket_key
        if bucket in seen:
            continue
        seen.add(bucket)
        yield _rehearse(trainer, sources.training[0, number], bucket)


def _rehearse(trainer: Trainer, batch: dict, bucket: tuple) -> str:
    run = trainer.run
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    draws = TrainingDraws(DrawKey(run.loop.seed, run.rank, 0), run.draws.sampler, run.device)
    work = run.regularizers.start(run.mode.prepare(batch, draws), batch, draws, trainer.max_steps // 2)
    with run.autocast(), run.regularizers.watching(work):
        video, audio = work.prepared.run(run.model)
    loss = run.regularizers.add(work, task_loss(work.prepared, video, audio, run.loss), video, audio).total
    if loss.requires_grad:  # not where no adapter runs
        loss.backward()
        run.regularizers.finish(work, torch.Tensor.backward)
    run.optimizer.zero_grad(set_to_none=True)
    memory = ""
    if run.device.type == "cuda":
        memory = f", peak {torch.cuda.max_memory_allocated(run.device) / 2**30:.1f} GiB"
    return f"bucket {bucket}: batch of {len(batch['item_keys'])}, loss {loss.item():.4f}{memory}"
