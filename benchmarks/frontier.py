"""Seconds of a training step against a budget of device memory, at full size, with the planner choosing.

A process for each precision, which goes through the budgets from the largest down, under the allocator's limit; one
JSON line each. Then `--draw` makes the picture.

python benchmarks/frontier.py --budgets 8 12 16 24 32 48 80 140 --precisions bf16 fp8 nf4 > frontier.jsonl
python benchmarks/frontier.py --draw frontier.jsonl docs/frontier.png
python benchmarks/frontier.py --budgets 24 --precisions fp8 -- --lora_dtype bfloat16
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch

from benchmarks import train_step
from ltx2_tuner.cli.allocator import keep_memory_in_one_piece
from ltx2_tuner.devices import exact
from ltx2_tuner.memory.graphs import TrainingGraphs
from ltx2_tuner.memory.options import MemoryOptions
from ltx2_tuner.memory.planner import Plan, settle
from ltx2_tuner.memory.prepare import rearrange
from ltx2_tuner.memory.speed import measure_speed
from ltx2_tuner.training.footprint import spare_host_memory
from ltx2_tuner.training.rehearsal import MORE_ROOM, PASSES, crowded

logger = logging.getLogger(__name__)

GB = 1e9
GIB = 2**30
CONTEXT = 0.5e9  # bytes that CUDA itself takes, outside of the allocator's limit
NO_ROOM = "it leaves no room for recorded passes"
COLOURS = {"bf16": (31, 119, 180), "fp8": (214, 90, 20), "fp8_compute": (140, 30, 120), "nf4": (30, 130, 60)}


class PlannedStep(train_step.Step):
    """A step arranged by a plan."""

    def __init__(self, args: argparse.Namespace, device: torch.device, plan: Plan) -> None:
        self.args, self.device = args, device
        super().__init__(args, device, plan.options)

    def can_follow(self, plan: Plan) -> bool:
        """Whether a plan needs no more memory than the one in use: a model in use goes that way only."""
        now = self.options
        return plan.choice.streamed >= now.blocks_to_swap and plan.choice.recomputed >= now.recomputed_blocks

    def follow(self, plan: Plan) -> None:
        """Another plan that needs less memory, as the trainer takes it."""
        self.network.zero_grad(set_to_none=True)
        if plan.options == self.options:
            return
        if self.graphs is not None:
            self.graphs.remove()
        self.options = plan.options
        self.plan = rearrange(self.model, self.plan, plan.options, self.device)
        self.accelerate(self.args)

    def drop_recordings(self) -> None:
        """Free what recorded passes hold; they are recorded anew when passes are run again."""
        if self.graphs is not None:
            self.graphs.release()


class Frontier:
    """The budgets of one precision, from the largest down, with one model."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, exact(args.device)
        self.footprint = train_step.footprint(args)
        self.speed = measure_speed(self.device)
        self.step: PlannedStep | None = None
        self.loose = 0  # bytes between tensors before the first pass: recorded passes cannot use them
        self.last: tuple[MemoryOptions, dict[str, object]] | None = None  # what was measured last

    def measure(self, budget_gb: float) -> dict[str, object]:
        """One point; `sec` is None where nothing fits the budget."""
        _clear(self.device)
        limit = math.inf
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            limit = min(total, max(budget_gb * GB - CONTEXT, 0))
            torch.cuda.set_per_process_memory_fraction(limit / total, self.device)
        plan = settle(MemoryOptions(), self.footprint, budget_gb * GB, self.speed, host=spare_host_memory())
        failures = 0
        while plan is not None:
            if self.last and self.last[0] == plan.options and self.last[1]["reserved_gib"] * GIB <= limit:
                line = {**self.last[1], "budget_gb": budget_gb, "stepped_down": failures}
                logger.info("%s", _kept(budget_gb, plan, line))
                return line
            result = self._attempt(plan)
            if isinstance(result, float):
                line = _line(self.args, budget_gb, plan, result, failures, self.step.graphs, self.loose)
                self.last = (plan.options, line) if self.device.type == "cuda" else None
                logger.info("%s", _kept(budget_gb, plan, line))
                return line
            logger.info("%g GB: gave up %s: %s", budget_gb, _named(plan), result)
            failures += 1
            self._forget()
            plan = plan.tighter(MORE_ROOM if result == NO_ROOM else 0.0)
        return _line(self.args, budget_gb, None, None, failures)

    def _attempt(self, plan: Plan) -> float | str:
        """Seconds of a step, or why the plan is given up. The error would keep alive all that the pass had made."""
        try:
            self._arrange(plan)
            passes = PASSES if self.step.graphs is not None else 0
            for _ in range(passes):
                self.step()
            # As in the trainer's rehearsal, a pass that there was no room to record does not count as fitting.
            if crowded(self.step.graphs, plan):
                return NO_ROOM
            return train_step.measure(self.step, self.device, passes)
        except torch.OutOfMemoryError as error:
            return str(error).partition("\n")[0]

    def _arrange(self, plan: Plan) -> None:
        """Have a step that follows a plan. Where the memory is too small even for that, none is left."""
        if self.step is not None and not self.step.can_follow(plan):
            self.step.drop_recordings()
            self.step = None
            _clear(self.device)
        step, self.step = self.step, None
        if step is None:
            step = PlannedStep(self.args, self.device, plan)
        else:
            step.follow(plan)
        self.step = step
        _clear(self.device)
        if self.device.type == "cuda":
            self.loose = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def _forget(self) -> None:
        """Free what the passes of a plan left that was given up."""
        if self.step is not None:
            self.step.drop_recordings()
            self.step.network.zero_grad(set_to_none=True)
        _clear(self.device)


def _clear(device: torch.device) -> None:
    """Free what the last pass left, and forget its peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _named(plan: Plan) -> str:
    choice = plan.choice
    return f"{choice.streamed} streamed, {choice.recomputed} recomputed, ring {choice.ring if choice.streamed else 0}"


def _kept(budget_gb: float, plan: Plan, line: dict[str, object]) -> str:
    peak = "" if line["peak_gib"] is None else f", peak {line['peak_gib']}"
    return f"{budget_gb:g} GB: kept {_named(plan)}: predicted {line['predicted_gib']} GiB{peak}"


def _line(
    args: argparse.Namespace,
    budget_gb: float,
    plan: Plan | None,
    seconds: float | None,
    failures: int,
    graphs: TrainingGraphs | None = None,
    loose: int = 0,
) -> dict[str, object]:
    device = exact(args.device)
    on_cuda = device.type == "cuda"
    return {
        "budget_gb": budget_gb,
        "precision": args.precision,
        "mode": args.mode,
        "frames": args.frames,
        "size": list(args.size),
        "levels": args.levels,
        "rank": args.rank,
        "lora_dtype": args.lora_dtype,
        "streamed": plan and plan.options.blocks_to_swap,
        "recomputed": plan and plan.options.recomputed_blocks,
        "ring": plan.options.ring if plan and plan.choice.streamed else 0,
        "offload": plan and plan.choice.offload,
        "graphs": graphs is not None and bool(graphs.recordings),
        "sec": seconds and round(seconds, 4),
        "predicted_sec": round(plan.footprint.seconds(plan.choice, plan.speed), 4) if plan and plan.speed else None,
        "peak_gib": train_step.peak_gib(device),
        "reserved_gib": round(torch.cuda.max_memory_reserved(device) / GIB, 2) if on_cuda else None,
        "pool_gib": graphs and round(graphs.held / GIB, 2),  # what recorded passes reserve for themselves
        "loose_gib": round(loose / GIB, 2),
        "predicted_gib": plan and round(plan.predicted / GIB, 2),
        "stepped_down": failures,
        "gpu": train_step.gpu_name(device),
        "torch": torch.__version__,
    }


def draw(lines: list[dict[str, object]], path: Path) -> None:
    """Both axes logarithmic; a line per precision."""
    from PIL import Image, ImageDraw, ImageFont

    points = [line for line in lines if line["sec"]]
    width, height, left, top, right, bottom = 900, 560, 80, 40, 140, 60
    picture = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    budgets, seconds = [p["budget_gb"] for p in points], [p["sec"] for p in points]

    def place(value: float, values: list[float], start: int, end: int) -> float:
        low, high = math.log(min(values) * 0.9), math.log(max(values) * 1.1)
        return start + (math.log(value) - low) / (high - low) * (end - start)

    def at(budget: float, second: float) -> tuple[float, float]:
        return place(budget, budgets, left, width - right), place(second, seconds, height - bottom, top)

    for budget in sorted(set(budgets)):
        x = at(budget, seconds[0])[0]
        pen.line([(x, top), (x, height - bottom)], (225, 225, 225))
        pen.text((x, height - bottom + 8), f"{budget:g}", "black", font, anchor="ma")
    for second in (0.05, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 1, 1.5, 2, 3, 5):
        if min(seconds) * 0.9 <= second <= max(seconds) * 1.1:
            y = at(budgets[0], second)[1]
            pen.line([(left, y), (width - right, y)], (225, 225, 225))
            pen.text((left - 8, y), f"{second:g}", "black", font, anchor="rm")
    for number, precision in enumerate(dict.fromkeys(p["precision"] for p in points)):
        colour = COLOURS.get(precision, (60, 60, 60))
        own = sorted((p["budget_gb"], p["sec"]) for p in points if p["precision"] == precision)
        places = [at(*pair) for pair in own]
        pen.line(places, colour, 3)
        for x, y in places:
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
        pen.text((width - right + 15, top + 22 * number), precision, colour, font)
    pen.text((left, 12), "seconds of a training step against device memory (GB)", "black", font)
    picture.quantize(32).save(path, optimize=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=[8, 12, 16, 24, 32, 48, 80, 140], help="GB")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp8", "nf4"])
    parser.add_argument("--draw", nargs=2, metavar=("LINES", "PICTURE"))
    parser.add_argument("--here", action="store_true", help="in this process")
    parser.add_argument("more", nargs="*", help="flags of train_step.py, after --")
    args = parser.parse_args(argv)
    if args.draw:
        text = Path(args.draw[0]).read_text(encoding="utf-8")
        draw([json.loads(line) for line in text.splitlines() if line.startswith("{")], Path(args.draw[1]))
        return 0
    keep_memory_in_one_piece()  # as the trainer does
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # why a pass was not recorded, for one
    for precision in args.precisions:
        if not args.here:
            budgets = ["--budgets", *map(str, args.budgets)]
            place = ["--here", *budgets, "--precisions", precision, "--", *args.more]
            subprocess.run([sys.executable, __file__, *place], check=False)
            continue
        frontier = Frontier(train_step.parse_arguments(["--precision", precision, *args.more]))
        for budget in sorted(args.budgets, reverse=True):
            print(json.dumps(frontier.measure(budget)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
