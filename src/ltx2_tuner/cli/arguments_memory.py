"""Flags of precision, memory, attention and compilation, and the options they make (training and slider)."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

import torch

from ltx2_tuner.checkpoint.precision import PrecisionOptions
from ltx2_tuner.errors import UserError
from ltx2_tuner.lora.options import BUILT_IN
from ltx2_tuner.memory.options import DYNAMIC, CompileOptions, MemoryOptions
from ltx2_tuner.models.transformer.model import ATTENTION_TARGETS, FEED_FORWARD_TARGETS
from ltx2_tuner.quantization.formats import WeightFormat

_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_BACKENDS = ("sdpa", "flash_attn", "flash3", "xformers")


def add_precision_arguments(parser: argparse.ArgumentParser) -> None:
    """Autocast, how the frozen weights are stored, and what adapters start from."""
    group = parser.add_argument_group("precision")
    flag = {"action": "store_true"}
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="autocast dtype (accelerate's own)")
    add_weight_arguments(group)
    group.add_argument("--loftq_init", **flag, help="start the adapter from the quantisation error (needs --nf4_base)")
    group.add_argument("--loftq_iters", type=int, default=2, help="LoftQ rounds")
    group.add_argument("--awq_calibration", **flag, help="experimental channel scales before NF4")
    group.add_argument("--awq_alpha", type=float, default=0.25, help="strength of the channel scales, 0 to 1")
    group.add_argument("--awq_num_batches", type=int, default=8, help="synthetic calibration batches")


def add_weight_arguments(group: argparse._ArgumentGroup) -> None:
    """How the frozen weights are stored and multiplied."""
    flag = {"action": "store_true"}
    group.add_argument("--fp8_base", "--fp8", **flag, help="keep the frozen weights in fp8")
    group.add_argument("--fp8_scaled", **flag, help="quantise a bf16 checkpoint to fp8 with scales")
    group.add_argument("--fp8_scale_mode", choices=("block", "row"), help="block; row with --fp8_compute")
    group.add_argument("--fp8_compute", **flag, help="multiply in fp8 where the GPU can (faster, less exact)")
    group.add_argument("--nf4_base", **flag, help="keep the frozen weights in NF4 (4 bit)")
    group.add_argument("--nf4_block_size", type=int, default=32, help="weights that share a scale")
    group.add_argument("--quantize_device", choices=("cpu", "cuda", "gpu"), help="where weights are quantised (cuda)")


def add_memory_arguments(parser: argparse.ArgumentParser, *, training: bool = True) -> None:
    """What trades memory for time. None of it changes the numbers beyond kernel rounding.

    Args:
        training: with what matters to the backward pass alone.
    """
    group = parser.add_argument_group("memory")
    flag, either = {"action": "store_true"}, {"action": argparse.BooleanOptionalAction}
    group.add_argument("--vram_budget", default="auto", help="auto (what is free) or GB for the planner to stay within")
    group.add_argument("--blocks_to_swap", type=int, help="transformer blocks that live in host memory (0)")
    group.add_argument(
        "--use_pinned_memory_for_block_swap", **either, help="page-locked host memory (on where pinning works)"
    )
    group.add_argument("--block_swap_h2d_only", **flag, help="accepted: frozen weights never travel back anyway")
    group.add_argument("--block_swap_ring_size", type=int, help="device buffers for streamed blocks (3, or 2)")
    if training:
        group.add_argument(
            "--shard_base", **either, help="spread the frozen blocks over this machine's processes (FSDP2's default)"
        )
        group.add_argument("--gradient_checkpointing", **either, help="recompute blocks in the backward pass (off)")
        group.add_argument(
            "--gradient_checkpointing_cpu_offload", **flag, help="keep the inputs of recomputed blocks in host memory"
        )
    else:
        parser.set_defaults(gradient_checkpointing=False, gradient_checkpointing_cpu_offload=False, shard_base=False)
    group.add_argument("--ffn_chunk_target", choices=tuple(FEED_FORWARD_TARGETS), help="feed-forwards run in chunks")
    group.add_argument("--ffn_chunk_size", type=int, default=0, help="tokens of a chunk; 0 is off")
    group.add_argument("--split_attn_target", choices=tuple(ATTENTION_TARGETS), help="attentions run in parts")
    group.add_argument("--split_attn_mode", choices=("batch", "query"), help="one call per sample, or query groups")
    group.add_argument("--split_attn_chunk_size", type=int, default=0, help="queries of a group; 0 is 1024")
    group.add_argument("--split_attn", **flag, help="short for --split_attn_target all --split_attn_mode batch")
    group.add_argument("--img_in_txt_in_offloading", **flag, help="accepted without effect")


def add_attention_arguments(parser: argparse.ArgumentParser) -> None:
    """Attention back end and torch.compile."""
    group = parser.add_argument_group("attention and compilation")
    flag = {"action": "store_true"}
    group.add_argument("--sdpa", **flag, help="torch attention (the default)")
    group.add_argument("--flash_attn", **flag, help="FlashAttention 2 (package flash-attn)")
    group.add_argument("--flash3", **flag, help="FlashAttention 3 (Hopper and newer)")
    group.add_argument("--xformers", **flag, help="xFormers attention")
    group.add_argument("--sage_attn", **flag, help="refused: it has no backward pass")
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile per block (on for CUDA where it works)"
    )
    group.add_argument("--compile_backend", default="inductor", help="torch.compile backend")
    group.add_argument("--compile_mode", choices=_MODES, default="default", help="torch.compile mode")
    group.add_argument(
        "--compile_dynamic",
        choices=tuple(DYNAMIC),
        help="code is made for any number of tokens, for each shape anew, or for any from the second shape on "
        "(default: false, true for more than 3 batch shapes)",
    )
    group.add_argument("--compile_fullgraph", **flag, help="refuse graph breaks")
    group.add_argument("--compile_cache_size_limit", type=int, help="shapes kept compiled")
    group.add_argument("--dynamo_backend", default="NO", help="accelerate's own switch; use --compile")
    group.add_argument("--dynamo_mode", choices=_MODES[:3], help="as --compile_mode")
    group.add_argument("--dynamo_fullgraph", **flag, help="as --compile_fullgraph")
    group.add_argument("--dynamo_dynamic", **flag, help="as --compile_dynamic true")
    group.add_argument("--cuda_allow_tf32", **flag, help="TF32 for float32 products")
    group.add_argument("--cuda_cudnn_benchmark", **flag, help="let cuDNN try its kernels")


def check_memory(args: argparse.Namespace) -> list[str]:
    """Sentences about flags of the three groups that do not go together."""
    errors = []
    if args.fp8_base and args.nf4_base:
        errors.append("choose one of --fp8_base and --nf4_base")
    for flag, needed in (
        ("fp8_scaled", "fp8_base"),
        ("fp8_compute", "fp8_base"),
        ("loftq_init", "nf4_base"),
        ("awq_calibration", "nf4_base"),
    ):
        if getattr(args, flag, False) and not getattr(args, needed):
            errors.append(f"--{flag} needs --{needed}")
    errors += _precision_errors(args)
    if args.fp8_scale_mode and not args.fp8_scaled:
        errors.append("--fp8_scale_mode needs --fp8_scaled")
    if args.gradient_checkpointing_cpu_offload and not args.gradient_checkpointing:
        errors.append("--gradient_checkpointing_cpu_offload needs --gradient_checkpointing")
    if args.blocks_to_swap is not None and args.blocks_to_swap < 0:
        errors.append(f"--blocks_to_swap must be at least 0 (got {args.blocks_to_swap})")
    errors += _sharding_errors(args)
    if args.block_swap_ring_size is not None and args.block_swap_ring_size < 1:
        errors.append(f"--block_swap_ring_size must be at least 1 (got {args.block_swap_ring_size})")
    if args.ffn_chunk_size < 0 or args.split_attn_chunk_size < 0:
        errors.append("--ffn_chunk_size and --split_attn_chunk_size must be at least 0")
    if parse_budget(args.vram_budget) == 0:
        errors.append(f"--vram_budget {args.vram_budget}: give auto or a number of GB above 0")
    backends = [f"--{name}" for name in _BACKENDS if getattr(args, name)]
    if len(backends) > 1:
        errors.append(f"{' and '.join(backends)} exclude each other; keep one attention back end")
    if args.sage_attn:
        errors.append("--sage_attn has no backward pass and breaks training; drop it")
    return errors


def shards_base(args: argparse.Namespace) -> bool:
    """Whether the frozen blocks are sharded: as typed, else where accelerate was told to use FSDP."""
    from accelerate.utils import parse_flag_from_env

    return parse_flag_from_env("ACCELERATE_USE_FSDP") if args.shard_base is None else args.shard_base


def _sharding_errors(args: argparse.Namespace) -> list[str]:
    if not shards_base(args):
        return []
    errors = []
    version = os.environ.get("FSDP_VERSION", "1")
    if args.shard_base is None and version != "2":
        errors.append(
            f"accelerate was told to use FSDP version {version}; add --fsdp_version 2 after accelerate launch"
        )
    if args.blocks_to_swap:
        errors.append(
            "--blocks_to_swap keeps blocks in host memory, a sharded base (--shard_base, --use_fsdp) keeps them on the "
            "GPUs; drop one of the two"
        )
    if args.network_module != BUILT_IN:
        errors.append(
            f"--shard_base: {args.network_module} may read base weights that are not there yet; use {BUILT_IN}"
        )
    return errors


def _precision_errors(args: argparse.Namespace) -> list[str]:
    errors = []
    size = args.nf4_block_size
    if size < 16 or size & (size - 1):
        errors.append(f"--nf4_block_size must be 16, 32, 64, 128 ... (got {size})")
    if getattr(args, "loftq_iters", None) is None:  # not a training script
        return errors
    if args.loftq_init and args.network_module != BUILT_IN:
        errors.append(
            f"--loftq_init: LoftQ start values exist for the built-in LoRA only, not for {args.network_module}; drop it"
        )
    if args.loftq_iters < 1:
        errors.append(f"--loftq_iters must be at least 1 (got {args.loftq_iters})")
    if not 0 <= args.awq_alpha <= 1:
        errors.append(f"--awq_alpha must be between 0 and 1 (got {args.awq_alpha:g})")
    if args.awq_num_batches < 1:
        errors.append(f"--awq_num_batches must be at least 1 (got {args.awq_num_batches})")
    return errors


def memory_warnings(args: argparse.Namespace) -> list[str]:
    """Flags that have no effect as they stand."""
    warnings = _unused(args)
    chunked = args.ffn_chunk_target not in (None, "none")
    if chunked != bool(args.ffn_chunk_size):
        warnings.append("--ffn_chunk_target and --ffn_chunk_size work together only; neither has an effect alone")
    if args.split_attn_target in (None, "none") and not args.split_attn:
        warnings += [
            f"--{flag} has no effect without --split_attn_target"
            for flag in ("split_attn_mode", "split_attn_chunk_size")
            if getattr(args, flag)
        ]
    elif args.split_attn_chunk_size and (args.split_attn or args.split_attn_mode == "batch"):
        warnings.append("--split_attn_chunk_size has an effect with --split_attn_mode query only")
    if args.block_swap_h2d_only:
        warnings.append("--block_swap_h2d_only is what always happens: frozen weights are never copied back")
    if args.img_in_txt_in_offloading:
        warnings.append("--img_in_txt_in_offloading has no effect on LTX-2")
    return warnings


def _unused(args: argparse.Namespace) -> list[str]:
    """Settings that were typed of something that is off."""
    pinned = args.use_pinned_memory_for_block_swap and args.blocks_to_swap == 0
    settings = [
        ("nf4_block_size", args.nf4_block_size != 32, "nf4_base", args.nf4_base),
        ("quantize_device", args.quantize_device, "nf4_base or --fp8_scaled", args.nf4_base or args.fp8_scaled),
        ("use_pinned_memory_for_block_swap", pinned, "blocks_to_swap above 0", False),
        ("compile_backend", args.compile_backend != "inductor", "compile", args.compile is not False),
        ("compile_mode", args.compile_mode != "default", "compile", args.compile is not False),
        ("compile_fullgraph", args.compile_fullgraph, "compile", args.compile is not False),
        ("compile_dynamic", args.compile_dynamic, "compile", args.compile is not False),
        ("compile_cache_size_limit", args.compile_cache_size_limit, "compile", args.compile is not False),
    ]
    if hasattr(args, "loftq_iters"):  # a training script
        settings += [
            ("loftq_iters", args.loftq_iters != 2, "loftq_init", args.loftq_init),
            ("awq_alpha", args.awq_alpha != 0.25, "awq_calibration", args.awq_calibration),
            ("awq_num_batches", args.awq_num_batches != 8, "awq_calibration", args.awq_calibration),
        ]
    return [
        f"--{flag} has no effect without --{needed}" for flag, typed, needed, is_on in settings if typed and not is_on
    ]


def parse_budget(text: str) -> float | None:
    """GB of --vram_budget; None for auto, 0 for what is no budget."""
    if text == "auto":
        return None
    try:
        budget = float(text)
    except ValueError:
        return 0.0
    return budget if 0 < budget < float("inf") else 0.0


def weight_format(args: argparse.Namespace) -> WeightFormat:
    """How the frozen matrices are stored. Without --fp8_scaled a bf16 checkpoint is cast to fp8 plainly."""
    scales = (args.fp8_scale_mode or ("row" if args.fp8_compute else "block")) if args.fp8_scaled else "none"
    return WeightFormat(
        kind="fp8" if args.fp8_base else "nf4" if args.nf4_base else "dense",
        fp8_scales=scales,
        fp8_compute=args.fp8_compute,
        keep_transposed=args.fp8_compute,
        nf4_block_size=args.nf4_block_size,
    )


def precision_options(args: argparse.Namespace, rank: int = 0) -> PrecisionOptions:
    """How the frozen weights are made.

    Args:
        rank: of the adapters, for LoftQ; without the training flags it does not matter.

    Raises:
        UserError: weights are to be quantised on a device that is not there.
    """
    options = PrecisionOptions(weight_format(args), _quantize_device(args))
    if getattr(args, "loftq_iters", None) is None:  # not a training script
        return options
    return replace(
        options,
        loftq_rank=rank if args.loftq_init else 0,
        loftq_iterations=args.loftq_iters,
        awq_alpha=args.awq_alpha if args.awq_calibration else None,
        awq_batches=args.awq_num_batches,
    )


def _quantize_device(args: argparse.Namespace) -> str | None:
    """Where weights are quantised: the flag, else the environment, else a GPU where there is one."""
    chosen, source = args.quantize_device, "--quantize_device"
    if chosen is None:
        source = "LTX2_FP8_CALC_DEVICE" if args.fp8_base else "LTX2_NF4_CALC_DEVICE"
        chosen = os.environ.get(source) if args.fp8_base or args.nf4_base else None
    chosen = {"gpu": "cuda", "": None}.get(chosen, chosen)
    if chosen not in (None, "cpu", "cuda"):
        raise UserError(f"the environment variable {source} is {chosen}; set it to cpu or cuda, or remove it")
    if chosen == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{source} is cuda, but this torch sees no CUDA device; use --quantize_device cpu")
    return chosen


def memory_options(args: argparse.Namespace) -> MemoryOptions:
    """What the memory room and the model are told."""
    chunked = args.ffn_chunk_target if args.ffn_chunk_size else None
    target = "all" if args.split_attn and args.split_attn_target is None else args.split_attn_target
    return MemoryOptions(
        budget_gb=parse_budget(args.vram_budget),
        blocks_to_swap=args.blocks_to_swap,
        pinned=args.use_pinned_memory_for_block_swap,
        ring_size=args.block_swap_ring_size,
        shard_base=shards_base(args),
        checkpointing=args.gradient_checkpointing,
        checkpoint_offload=args.gradient_checkpointing_cpu_offload,
        ffn_chunk_target=chunked or "none",
        ffn_chunk_size=args.ffn_chunk_size if chunked else 0,
        split_attention=target or "none",
        split_mode="batch" if args.split_attn else args.split_attn_mode,
        split_chunk=args.split_attn_chunk_size,
        attention=next((name for name in _BACKENDS if getattr(args, name)), "sdpa"),
    )


def compile_options(args: argparse.Namespace) -> CompileOptions:
    """How blocks are compiled."""
    dynamic = DYNAMIC[args.compile_dynamic or "false"]
    typed = args.compile
    if typed is None and args.dynamo_backend.upper() != "NO":
        typed = True
    return CompileOptions(
        enabled=typed,
        backend=args.compile_backend if args.dynamo_backend.upper() == "NO" else args.dynamo_backend.lower(),
        mode=args.dynamo_mode or args.compile_mode,
        dynamic=True if args.dynamo_dynamic else dynamic,
        dynamic_typed=args.dynamo_dynamic or args.compile_dynamic is not None,
        fullgraph=args.compile_fullgraph or args.dynamo_fullgraph,
        cache_size_limit=args.compile_cache_size_limit,
    )
