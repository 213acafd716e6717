"""Seconds and memory of one training step at full size with each regularizer, random weights made on the device.

One JSON line a regularizer: the median of 3 steps after those that compile and record. A step is everything that the
training loop does with a batch: draws, passes, losses, backward, clipping, AdamW. Flags as of train_step.py.

python benchmarks/regularizers.py --precision fp8 --blocks_to_swap 40 --recompute full
python benchmarks/regularizers.py --layers 4 --width_divisor 32 --size 64 64 --frames 17 --device cpu   # a small one
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch

from benchmarks import train_step
from ltx2_tuner.cli.allocator import keep_memory_in_one_piece
from ltx2_tuner.memory.prepare import host_blocks, prepare_model
from ltx2_tuner.models.transformer.tokens import audio_latent_length
from ltx2_tuner.training.draws import TrainingDraws
from ltx2_tuner.training.modes import MODES, Compute, ModeOptions
from ltx2_tuner.training.objective import task_loss
from ltx2_tuner.training.options import LossOptions
from ltx2_tuner.training.random import DrawKey
from ltx2_tuner.training.regularizers import CrepaOptions, PreservationOptions, RegularizerOptions, SelfFlowOptions
from ltx2_tuner.training.regularizers.build import Setting, make_regularizers
from ltx2_tuner.training.regularizers.prompts import PreservationPrompts, Prompt
from ltx2_tuner.training.sigmas import SigmaSampler

MEASURED = 3


def choices(depth: int) -> list[tuple[str, RegularizerOptions, str, bool]]:
    """What is measured: name, options, mode, whether the batch has sound."""
    nothing = RegularizerOptions()
    dop = PreservationOptions(dop=1.0)
    crepa = CrepaOptions(student_block_idx=depth // 3, teacher_block_idx=2 * depth // 3)
    self_flow = SelfFlowOptions(student_block_ratio=0.3, teacher_block_ratio=0.7)
    return [
        ("none", nothing, "av", True),
        ("none, no sound", nothing, "av", False),
        ("none, video", nothing, "video", False),
        ("dop", RegularizerOptions(dop), "av", True),
        ("prior_divergence", RegularizerOptions(PreservationOptions(prior_divergence=0.1)), "av", True),
        ("audio_dop", RegularizerOptions(PreservationOptions(audio_dop=0.5)), "av", False),
        ("crepa", RegularizerOptions(crepa=crepa), "av", True),
        ("crepa dop", RegularizerOptions(dop, crepa=crepa), "av", True),
        ("self_flow", RegularizerOptions(self_flow=self_flow), "video", False),
    ]


class Bench:
    """A model with its network, and random batches for it."""

    def __init__(self, args, device: torch.device) -> None:
        self.args, self.device = args, device
        memory = train_step.memory_options(args, device)
        hosts = host_blocks(args.layers, memory, device)
        self.model, self.network = train_step.build(args, device, hosts)
        compilation = train_step.compile_options(args)
        self.plan = prepare_model(self.model, memory, compilation, device, hosts=hosts)
        train_step.accelerated(args, self.model, self.network, self.plan)
        self.grid = ((args.frames - 1) // 8 + 1, args.size[0] // 32, args.size[1] // 32)
        self.autocast = (
            contextlib.nullcontext if device.type == "cpu" else lambda: torch.autocast(device.type, torch.bfloat16)
        )

    def batch(self, sound: bool) -> dict:
        """One random item."""
        config = self.model.config
        text = {f"{name}_prompt_embeds": self._text(name)[None] for name in ("video", "audio")}
        mask = torch.ones(1, train_step.TEXT_TOKENS, dtype=torch.int64)
        batch = {
            "latents": {"latents": torch.randn(1, config.in_channels, *self.grid)},
            "conditions": {**text, "prompt_attention_mask": mask},
            "item_keys": ["random"],
        }
        if sound:
            steps = audio_latent_length(self.args.frames / train_step.FPS)
            batch["audio_latents"] = {"latents": torch.randn(1, config.audio_in_channels // 16, steps, 16)}
            batch["audio_lengths"] = torch.tensor([steps], dtype=torch.int32)
        return batch

    def _text(self, stream: str) -> torch.Tensor:
        return torch.randn(train_step.TEXT_TOKENS, self.model.config.context_width(stream), dtype=torch.bfloat16)

    def measure(self, options: RegularizerOptions, mode: str, sound: bool) -> tuple[float, float | None]:
        """Median seconds of a step, and peak GiB."""
        mode = MODES[mode, "none"](ModeOptions(), Compute(self.device, torch.bfloat16))
        prompt = Prompt(self._text("video"), self._text("audio"), torch.ones(train_step.TEXT_TOKENS))
        with tempfile.TemporaryDirectory() as folder:
            setting = Setting(
                self.model, self.network, mode, self.device, self.autocast, 0, 100, 1e-4, Path(folder), Path(folder)
            )
            regularizers = make_regularizers(options, setting, PreservationPrompts(prompt, prompt))
        parameters = list(self.network.parameters())
        parameters += [p for extra in regularizers.trained() for p in extra.module.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=self.device.type == "cuda")
        batch = self.batch(sound)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        times = []
        warm_up = train_step.WARM_UP if self.plan.compiled else 1
        for number in range(warm_up + MEASURED):
            train_step._synchronize(self.device)
            start = time.perf_counter()
            key, sampler = DrawKey(0, 0, number), SigmaSampler(mode="stretched")
            draws = TrainingDraws(key, sampler, self.device, first_frame_p=0.1 if self.args.levels == 2 else 0.0)
            work = regularizers.start(mode.prepare(batch, draws), batch, draws, number + 1)
            with self.autocast(), regularizers.watching(work):
                video, audio = work.prepared.run(self.model)
            terms = regularizers.add(work, task_loss(work.prepared, video, audio, LossOptions()), video, audio)
            terms.total.backward()
            regularizers.finish(work, torch.Tensor.backward)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            train_step._synchronize(self.device)
            if number >= warm_up:
                times.append(time.perf_counter() - start)
        return statistics.median(times), train_step.peak_gib(self.device)


def main(argv: list[str] | None = None) -> None:
    args = train_step.parse_arguments(argv)
    if args.profile:
        raise SystemExit("--profile: of train_step.py alone")
    keep_memory_in_one_piece()  # as the trainer does
    device = torch.device(args.device)
    bench = Bench(args, device)
    about = {"precision": args.precision, "blocks_to_swap": args.blocks_to_swap, "recompute": args.recompute}
    about |= {"frames": args.frames, "size": list(args.size), "rank": args.rank, "compiled": bench.plan.compiled}
    about["gpu"] = train_step.gpu_name(device)
    for name, options, mode, sound in choices(args.layers):
        seconds, peak = bench.measure(options, mode, sound)
        line = {"regularizers": name, "mode": mode, "sec": round(seconds, 4), "peak_gib": peak}
        print(json.dumps(line | about), flush=True)


if __name__ == "__main__":
    main()
