"""Seconds and memory of one LoRA training step at full size, with random weights made on the device.

One JSON line: the median of 6 steps after 4. A step is forward, backward, clipping and AdamW.

python benchmarks/train_step.py --mode av --frames 49 --recompute none
python benchmarks/train_step.py --precision nf4 --blocks_to_swap 47 --recompute full --lora_dtype bfloat16
python benchmarks/train_step.py --layers 2 --width_divisor 32 --size 64 64 --frames 9 --device cpu   # a small one
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from torch import nn

from ltx2_tuner.cli.allocator import keep_memory_in_one_piece
from ltx2_tuner.devices import exact
from ltx2_tuner.lora import LoRANetwork, Targets, select_layers
from ltx2_tuner.memory.activations import BatchShape
from ltx2_tuner.memory.graphs import TrainingGraphs
from ltx2_tuner.memory.host_blocks import HostBlocks
from ltx2_tuner.memory.options import DYNAMIC, CompileOptions, MemoryOptions
from ltx2_tuner.memory.planner import Footprint, settle
from ltx2_tuner.memory.prepare import MemoryPlan, host_blocks, prepare_model
from ltx2_tuner.memory.sharding import BlockShards
from ltx2_tuner.models.transformer import LTXTransformer, Modality, TransformerConfig
from ltx2_tuner.models.transformer.tokens import audio_latent_length, audio_positions, video_positions
from ltx2_tuner.quantization import is_quantisable
from ltx2_tuner.quantization.formats import WeightFormat, freeze
from ltx2_tuner.training.acceleration import accelerate
from ltx2_tuner.training.footprint import footprint_of

WARM_UP, MEASURED = 4, 6
TEXT_TOKENS = 1024
FPS = 25.0
PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12, "5090": 210e12}  # dense, FLOP/s
PRECISIONS = {
    "bf16": WeightFormat(),
    "fp8": WeightFormat("fp8"),
    "fp8_compute": WeightFormat("fp8", "row", fp8_compute=True, keep_transposed=True),
    "nf4": WeightFormat("nf4"),
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("video", "av", "audio"), default="av")
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 768), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument(
        "--levels",
        type=int,
        choices=(1, 2),
        default=2,
        help="noise levels of the picture; 2: its first frame is clean, which training has for some of the samples",
    )
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="bf16", help="of the blocks' matrices")
    parser.add_argument(
        "--recompute", choices=("none", "cheap", "full", "auto"), default="none", help="cheap keeps products"
    )
    parser.add_argument("--vram_budget", type=float, metavar="GB", help="what auto plans for; default: the device")
    parser.add_argument("--blocks_to_swap", type=int, default=0)
    parser.add_argument("--ring", type=int, default=3, help="device buffers for streamed blocks")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width_divisor", type=int, default=1, help="narrower heads, for machines without a big card")
    parser.add_argument("--lora_dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=None, help="default: where it works"
    )
    parser.add_argument(
        "--dynamic",
        choices=tuple(DYNAMIC),
        default="false",
        help="compile code that serves all shapes; auto: from the second one on",
    )
    parser.add_argument("--joint", action=argparse.BooleanOptionalAction, default=True, help="join layers of one input")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="CUDA graphs")
    parser.add_argument("--streams", type=int, choices=(1, 2), default=2, help="CUDA streams of a graph")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", metavar="FILE", help="write the top kernels of one step as text")
    return parser.parse_args(argv)


def configuration(args: argparse.Namespace) -> TransformerConfig:
    """LTX-2.3's, with as many layers and as wide heads as asked for."""
    head_dim = 128 // args.width_divisor
    return TransformerConfig(
        num_layers=args.layers,
        head_dim=head_dim,
        audio_head_dim=head_dim // 2,
        cross_attention_dim=32 * head_dim,
        audio_cross_attention_dim=16 * head_dim,
        cross_attention_adaln=True,
        apply_gated_attention=True,
        caption_proj_before_connector=True,
    )


def build(
    args: argparse.Namespace, device: torch.device, keeper: HostBlocks | BlockShards | None = None
) -> tuple[LTXTransformer, LoRANetwork]:
    """The transformer with random weights, and a LoRA on all its attentions.

    Args:
        keeper: takes each block as soon as it has its weights, as it does while a checkpoint is loaded.
    """
    with torch.device("meta"):
        model = LTXTransformer(configuration(args), args.mode)
    generator = torch.Generator(device).manual_seed(0)
    for path, module in list(model.named_modules()):
        if not path.startswith("transformer_blocks."):
            fill(model, path, module, PRECISIONS[args.precision], generator)
    for index, block in enumerate(model.transformer_blocks):
        for path, module in list(block.named_modules(prefix=f"transformer_blocks.{index}")):
            fill(model, path, module, PRECISIONS[args.precision], generator)
        if keeper is not None:
            keeper.take(index, block)
    layers = select_layers(model, Targets(args.mode, "audio" if args.mode == "audio" else "t2v"))
    network = LoRANetwork(layers, args.rank).to(device, getattr(torch, args.lora_dtype))
    network.set_compute_dtype(torch.bfloat16)
    for _, adapter in network.adapters():
        torch.nn.init.normal_(adapter.lora_up.weight, std=0.01)
    network.attach(model)
    return model.train(), network.train()


def fill(
    model: LTXTransformer,
    path: str,
    module: nn.Module,
    form: WeightFormat,
    generator: torch.Generator,
) -> None:
    """Give a module's own parameters random values, and the big matrices the form that the checkpoint's would have."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        std = 1.0 if "norm" in path else parameter.shape[-1] ** -0.5
        values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=generator.device)
        values.normal_(0, std, generator=generator)
        module.register_parameter(name, nn.Parameter(values, requires_grad=False))
    if isinstance(module, nn.Linear) and is_quantisable(f"{path}.weight", module.weight.shape):
        bias = None if module.bias is None else module.bias.data
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, freeze(path, module.weight.data, bias, form, torch.bfloat16))


def inputs(args: argparse.Namespace, config: TransformerConfig, device: torch.device) -> dict[str, Modality | None]:
    """One sample of random latents at one noise level, but for a clean first frame."""
    sigma = torch.tensor([0.7], device=device)

    def modality(tokens: int, channels: int, positions: torch.Tensor, stream: str) -> Modality:
        return Modality(
            latent=torch.randn(1, tokens, channels, device=device, dtype=torch.bfloat16),
            sigma=sigma,
            timesteps=sigma[:, None],
            positions=positions.to(device),
            context=torch.randn(1, TEXT_TOKENS, config.context_width(stream), device=device, dtype=torch.bfloat16),
        )

    grid = ((args.frames - 1) // 8 + 1, args.size[0] // 32, args.size[1] // 32)
    length = audio_latent_length(args.frames / FPS)
    video = modality(grid[0] * grid[1] * grid[2], config.in_channels, video_positions(*grid, FPS), "video")
    audio = modality(length, config.audio_in_channels, audio_positions(length), "audio")
    if args.levels == 2:
        clean = (torch.arange(video.latent.shape[1], device=device) < grid[1] * grid[2]).long()
        levels = torch.stack([sigma, torch.zeros_like(sigma)], dim=1)
        video = replace(video, timesteps=levels, timestep_index=clean[None])
    return {"video": None if args.mode == "audio" else video, "audio": None if args.mode == "video" else audio}


def flops(config: TransformerConfig, video_tokens: int, audio_tokens: int) -> float:
    """Floating point operations of one forward pass (documentation of the cost model: multiply-add counts 2)."""
    d, a, s = config.video_width, config.audio_width, TEXT_TOKENS
    v, t = video_tokens, audio_tokens
    total = 0
    for width, tokens in ((d, v), (a, t)):
        if tokens:
            total += 4 * width**2 * tokens + 2 * tokens**2 * width  # self
            total += 2 * width**2 * (tokens + s) + 2 * tokens * s * width  # text
            total += 8 * width**2 * tokens
    if v and t:
        total += 2 * (2 * d * a * v + 2 * a**2 * t + 2 * v * t * a)
    return 2.0 * total * config.num_layers


def footprint(args: argparse.Namespace) -> Footprint:
    """What the step needs, for the planner."""
    config = configuration(args)
    with torch.device("meta"):
        model = LTXTransformer(config, args.mode)
    layers = select_layers(model, Targets(args.mode, "audio" if args.mode == "audio" else "t2v"))
    values = sum(args.rank * (layer.in_features + layer.out_features) for layer in layers.values())
    given = inputs(args, config, torch.device("cpu"))
    tokens = {name: 0 if modality is None else modality.latent.shape[1] for name, modality in given.items()}
    shape = BatchShape(tokens["video"], tokens["audio"], TEXT_TOKENS)
    adapters = getattr(torch, args.lora_dtype)
    return footprint_of(model, PRECISIONS[args.precision], torch.bfloat16, values, adapters, "AdamW", shape, 1)


def memory_options(args: argparse.Namespace, device: torch.device) -> MemoryOptions:
    """What the flags say; "auto" has the planner decide how many blocks are recomputed."""
    options = MemoryOptions(
        blocks_to_swap=args.blocks_to_swap, ring_size=args.ring, checkpointing=args.recompute == "full"
    )
    if args.recompute != "auto":
        return options
    budget = args.vram_budget * 1e9 if args.vram_budget else float("inf")
    if args.vram_budget is None and device.type == "cuda":
        budget = torch.cuda.get_device_properties(device).total_memory
    return settle(replace(options, checkpointing=None), footprint(args), budget).options


def compile_options(args: argparse.Namespace) -> CompileOptions:
    """What the flags say."""
    return CompileOptions(enabled=args.compile, dynamic=DYNAMIC[args.dynamic])


def accelerated(
    args: argparse.Namespace, model: LTXTransformer, network: LoRANetwork, plan: MemoryPlan
) -> TrainingGraphs | None:
    """The model with joint products and recorded passes, as the trainer has them, where the flags leave them."""
    if not args.joint:
        return None
    return accelerate(model, network, plan, torch.bfloat16, graphs=args.graphs, streams=args.streams)


class Step:
    """One training step on fixed inputs.

    shards: keeps this process's part of a sharded base.
    """

    shards: BlockShards | None = None

    def __init__(self, args: argparse.Namespace, device: torch.device, options: MemoryOptions | None = None) -> None:
        self.options = options or memory_options(args, device)
        self.hosts = host_blocks(args.layers, self.options, device)
        self.model, self.network = build(args, device, self.shards or self.hosts)
        self.begin(args, device, list(self.network.parameters()))
        self.prepare(args, device)

    def begin(self, args: argparse.Namespace, device: torch.device, parameters: list[nn.Parameter]) -> None:
        """Inputs, targets, and the optimizer of what is trained."""
        self.take(args, device)
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda")

    def take(self, args: argparse.Namespace, device: torch.device) -> None:
        """Other inputs, and their targets: of the size that the flags say."""
        self.inputs = inputs(args, configuration(args), device)
        self.targets = {
            name: torch.randn_like(modality.latent, dtype=torch.float32)
            for name, modality in self.inputs.items()
            if modality is not None
        }

    def prepare(self, args: argparse.Namespace, device: torch.device) -> None:
        """Recomputation, streaming, compilation and recording."""
        self.model.enable_gradient_checkpointing(args.recompute == "cheap", keep_products=True)
        compilation = compile_options(args)
        self.plan = prepare_model(self.model, self.options, compilation, device, self.shards, self.hosts)
        self.accelerate(args)

    def accelerate(self, args: argparse.Namespace) -> None:
        """Joint products and recorded passes."""
        self.graphs = accelerated(args, self.model, self.network, self.plan)

    def average(self) -> None:
        """Between backward and clipping; nothing in one process."""

    def velocities(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The model's."""
        return self.model(self.inputs["video"], self.inputs["audio"])

    def loss(self) -> torch.Tensor:
        """Of a forward pass."""
        velocities = dict(zip(("video", "audio"), self.velocities()))
        return sum((velocities[name].float() - target).square().mean() for name, target in self.targets.items())

    def __call__(self) -> torch.Tensor:
        loss = self.loss()
        loss.backward()
        self.average()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def measure(step: Step, device: torch.device, done: int = 0) -> float:
    """Median seconds of a step.

    Args:
        done: steps that have been made already; they warm up as well.
    """
    times = []
    for number in range(min(done, WARM_UP), WARM_UP + MEASURED):
        _synchronize(device)
        start = time.perf_counter()
        step()
        _synchronize(device)
        if number >= WARM_UP:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def host_peak_gib() -> float | None:
    """The most host memory this process has had, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def peak_gib(device: torch.device) -> float | None:
    """The most device memory that tensors have taken, on a GPU."""
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if device.type == "cuda" else None


def gpu_name(device: torch.device) -> str:
    """What a line says it was measured on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(step: Step, path: str) -> None:
    """The kernels of one step by the time they take, and their number."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    busy = sum(event.device_time_total for event in kernels) / 1e3
    table = profiler.key_averages().table(sort_by="self_device_time_total", row_limit=45, max_name_column_width=90)
    Path(path).write_text(f"{len(kernels)} kernels, {busy:.1f} ms busy\n{table}\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> dict[str, object]:
    args = parse_arguments(argv)
    keep_memory_in_one_piece()  # as the trainer does
    device = exact(args.device)
    step = Step(args, device)
    seconds = measure(step, device)
    config = step.model.config
    tokens = {name: target.shape[1] for name, target in step.targets.items()}
    recomputed = 0
    if step.options.checkpointing:
        recomputed = args.layers if step.options.recomputed_blocks is None else step.options.recomputed_blocks
    work = flops(config, tokens.get("video", 0), tokens.get("audio", 0)) * (2 + recomputed / args.layers)
    name = gpu_name(device)
    peak = next((value for key, value in PEAK_BF16.items() if key in name), None)
    line = {
        "precision": args.precision,
        "recompute": args.recompute,
        "recomputed_blocks": recomputed,
        "blocks_to_swap": args.blocks_to_swap,
        "ring": step.options.ring if args.blocks_to_swap else 0,
        "mode": args.mode,
        "frames": args.frames,
        "size": list(args.size),
        "tokens": tokens,
        "levels": args.levels,
        "rank": args.rank,
        "lora_dtype": args.lora_dtype,
        "layers": args.layers,
        "compiled": step.plan.compiled,
        "dynamic": args.dynamic,
        "joint": args.joint,
        "graphs": bool(step.graphs and step.graphs.recordings),
        "streams": args.streams,
        "sec": round(seconds, 4),
        "peak_gib": peak_gib(device),
        "host_peak_gib": host_peak_gib(),
        "tflops": round(work / seconds / 1e12, 1),
        "mfu": round(work / seconds / peak, 3) if peak else None,
        "gpu": name,
        "torch": torch.__version__,
    }
    print(json.dumps(line), flush=True)
    if args.profile:
        profile(step, args.profile)
    return line


if __name__ == "__main__":
    main()
