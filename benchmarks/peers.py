"""Seconds and memory of the step of train_step.py by the official model, ltx-core, with PEFT's adapters.

So that both are measured on one card. ltx-core is run, not read; neither package is among our dependencies:
pip install --no-deps ltx-core==1.0.0 peft==0.21.2

python benchmarks/peers.py --recompute none --compile
python benchmarks/peers.py --layers 2 --width_divisor 32 --size 64 64 --frames 9 --device cpu   # a small one
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import train_step
from ltx2_tuner.cli.allocator import keep_memory_in_one_piece
from ltx2_tuner.compat import prepare_torchaudio
from ltx2_tuner.devices import exact
from ltx2_tuner.models.transformer import Modality

# Each of q, k, v and out of the six attentions of a block.
ADAPTED = r".*transformer_blocks\..*\.(to_q|to_k|to_v|to_out\.0)$"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recompute", choices=("none", "full"), default="none", help="activation checkpointing")
    parser.add_argument("--compile", action="store_true", help="each block by torch.compile")
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 768), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width_divisor", type=int, default=1, help="narrower heads, for machines without a big card")
    parser.add_argument("--device", default="cuda")
    parser.set_defaults(mode="av", levels=1)  # the model takes one noise level a token, whatever they are
    return parser.parse_args(argv)


def build(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """LTX-2.3's transformer by ltx-core with random weights, and PEFT's adapters, which lie in float32 by default."""
    prepare_torchaudio()
    from ltx_core.model.transformer import LTXModel
    from ltx_core.model.transformer.rope import LTXRopeType
    from peft import LoraConfig, get_peft_model

    config = train_step.configuration(args)
    with torch.device("meta"):
        model = LTXModel(
            num_layers=args.layers,
            attention_head_dim=config.head_dim,
            audio_attention_head_dim=config.audio_head_dim,
            cross_attention_dim=config.cross_attention_dim,
            audio_cross_attention_dim=config.audio_cross_attention_dim,
            positional_embedding_max_pos=list(config.rope_max_positions),
            audio_positional_embedding_max_pos=list(config.audio_rope_max_positions),
            av_ca_timestep_scale_multiplier=int(config.gate_timestep_scale),
            rope_type=LTXRopeType.SPLIT,
            double_precision_rope=True,
            apply_gated_attention=True,
            cross_attention_adaln=True,
            attention_type=attend,
        ).to(torch.bfloat16)
    model = model.to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for path, parameter in model.named_parameters():
        std = 1.0 if "norm" in path else parameter.shape[-1] ** -0.5
        parameter.data.normal_(0, std, generator=generator)
    model.set_gradient_checkpointing(args.recompute == "full")
    adapted = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=ADAPTED))
    for path, parameter in adapted.named_parameters():
        if "lora_B" in path:
            nn.init.normal_(parameter, std=0.01)
    if args.compile:
        for block in model.transformer_blocks:
            # Torch would compile each number anew, and give up after eight; only perturbations ask for it.
            block.idx = 0
            block.compile(dynamic=False)
    return adapted.train()


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """torch's attention of (B, T, H*D); torch's compiler stops at the enumeration that ltx-core selects it by."""
    parts = [tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (query, key, value)]
    return F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2).flatten(2)


class PeerStep(train_step.Step):
    """The step of train_step.py with the other model in it."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.model = build(args, device)
        self.begin(args, device, [parameter for parameter in self.model.parameters() if parameter.requires_grad])
        self.inputs = {name: _theirs(modality) for name, modality in self.inputs.items()}

    def velocities(self) -> tuple[Tensor, Tensor]:
        return self.model(self.inputs["video"], self.inputs["audio"], None)


def _theirs(modality: Modality) -> object:
    """Our record of a stream as ltx-core's, which wants one noise level a token."""
    from ltx_core.model.transformer import Modality as Theirs

    names = ("latent", "sigma", "positions", "context", "enabled", "context_mask", "attention_mask")
    timesteps = modality.timesteps.expand(-1, modality.latent.shape[1]).contiguous()
    return Theirs(**{name: getattr(modality, name) for name in names}, timesteps=timesteps)


def main(argv: list[str] | None = None) -> dict[str, object]:
    args = parse_arguments(argv)
    keep_memory_in_one_piece()
    device = exact(args.device)
    step = PeerStep(args, device)
    seconds = train_step.measure(step, device)
    line = {
        "implementation": f"ltx-core {version('ltx-core')}, peft {version('peft')}",
        "precision": "bf16",
        "recompute": args.recompute,
        "compiled": args.compile,
        "mode": args.mode,
        "frames": args.frames,
        "size": list(args.size),
        "tokens": {name: target.shape[1] for name, target in step.targets.items()},
        "rank": args.rank,
        "adapter_matrices": len(step.parameters),
        "lora_dtype": str(step.parameters[0].dtype).removeprefix("torch."),
        "layers": args.layers,
        "sec": round(seconds, 4),
        "peak_gib": train_step.peak_gib(device),
        "gpu": train_step.gpu_name(device),
        "torch": torch.__version__,
    }
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    main()
