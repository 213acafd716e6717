"""Generate pictures and sound with a checkpoint and LoRAs."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ltx2_tuner.checkpoint import Checkpoint, check_version
from ltx2_tuner.checkpoint.modules import check_present
from ltx2_tuner.cli import values
from ltx2_tuner.cli.arguments_gemma import add_gemma_arguments, check_gemma, gemma_options
from ltx2_tuner.cli.arguments_network import strategy_name
from ltx2_tuner.cli.arguments_sampling import add_sampling_arguments, check_sampling, sampling_options
from ltx2_tuner.cli.generation_model import add_model_arguments, check_model, load_model
from ltx2_tuner.cli.media_encoders import encode_conditionings
from ltx2_tuner.cli.parser import Parser, entry_point
from ltx2_tuner.cli.references import lora_references
from ltx2_tuner.errors import UserError
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.lora.targets import STRATEGIES
from ltx2_tuner.media.write import write_image
from ltx2_tuner.models.transformer import LTXTransformer
from ltx2_tuner.sampling.conditioning import Conditioning, read_latent_cache
from ltx2_tuner.sampling.contexts import PromptContext, encode_contexts, read_prompt_cache
from ltx2_tuner.sampling.options import Request, SamplingOptions, settle
from ltx2_tuner.sampling.preview import beside_reference, release_memory, write_sample
from ltx2_tuner.sampling.prompts import SamplePrompt, parse_line, read_prompts
from ltx2_tuner.sampling.sampler import Latents, Sampler

logger = logging.getLogger(__name__)
SCRIPT = "ltx2_generate_video"
STEPS = {"2.0": 40, "2.3": 30}
VARIANTS = {"video": "video", "av": "av", "audio": "audio"}
TRAINING_ONLY = ("loftq_init", "loftq_iters", "awq_calibration", "awq_alpha", "awq_num_batches", "network_dim")


def build_parser() -> Parser:
    """The parser of the script."""
    parser = Parser(SCRIPT, __doc__)
    add_gemma_arguments(parser)
    group = parser.add_argument_group("model")
    group.add_argument("--ltx2_mode", "--ltx_mode", type=values.mode, default="video", help="video, av or audio")
    group.add_argument("--ltx_version", choices=("2.0", "2.3"), help="what the checkpoint says when absent")
    group.add_argument("--device", help="cuda where there is one, else cpu")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="bf16", help="compute dtype")
    group.add_argument("--vae", metavar="FILE", help="other file for the video autoencoder")
    group.add_argument("--vae_dtype", type=values.dtype, default=torch.bfloat16, help="dtype of the autoencoder")
    group.add_argument("--vae_chunk_size", type=int, help="frames a temporal chunk of the autoencoder's convolutions")
    _add_request_arguments(parser)
    add_model_arguments(parser)
    for name in TRAINING_ONLY:
        parser.add_argument(f"--{name}", nargs="?", const=True, help=argparse.SUPPRESS)
    add_sampling_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", default="output", help="folder for the results")
    output.add_argument("--output_name", default="ltx2_gen", help="start of the file names")
    output.add_argument("--save_path", help="a file or a folder, instead of --output_dir")
    output.add_argument(
        "--output_type",
        choices=("video", "images", "latent", "both", "latent_images"),
        default="video",
        help="what is written; both is video and latent",
    )
    output.add_argument("--latent_path", nargs="*", default=(), help="decode these saved latents and make nothing new")
    output.add_argument("--no_metadata", action="store_true", help="write files without the request that made them")
    return parser


def _add_request_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("what to make")
    group.add_argument("--prompt", help="one prompt")
    group.add_argument("--negative_prompt", help="what to stay away from")
    group.add_argument("--sample_prompts", "--from_file", metavar="FILE", help="prompt file (.txt, .toml or .json)")
    group.add_argument("--interactive", action="store_true", help="read prompts from standard input, a line each")
    group.add_argument("--height", type=int, help="height in pixels, floored to 32 (default 512)")
    group.add_argument("--width", type=int, help="width in pixels, floored to 32 (default 768)")
    group.add_argument("--video_size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="both at once")
    group.add_argument(
        "--frame_count", "--sample_num_frames", "--video_length", type=int, default=45, help="frames, floored to 8n+1"
    )
    group.add_argument("--frame_rate", "--fps", type=float, default=25.0, help="frames per second")
    group.add_argument("--sample_steps", "--infer_steps", type=int, help="steps: 40 for 2.0, 30 for 2.3")
    group.add_argument("--guidance_scale", type=float, help="weight of the prompt (3.0; 1.0 for distilled checkpoints)")
    group.add_argument("--cfg_scale", type=float, help="the same, wins over --guidance_scale")
    group.add_argument("--flow_shift", type=float, help="accepted without effect: LTX-2's schedule has its own")
    group.add_argument("--seed", type=int, help="random when absent, printed")
    group.add_argument("--cpu_noise", action="store_true", help="accepted: noise is always drawn on the CPU")
    group.add_argument("--image_path", help="first-frame image")
    group.add_argument("--reference_video", "--reference_image", dest="reference_video", help="V2V reference")
    group.add_argument("--reference_audio", help="audio reference (modes av and audio)")
    group.add_argument(
        "--ic_lora_strategy",
        type=strategy_name,
        choices=STRATEGIES,
        default="auto",
        help="which references count; auto: what the LoRA says",
    )
    group.add_argument("--reference_downscale", type=int, help="how many times smaller the reference is (LoRA's, or 1)")
    group.add_argument("--reference_frames", type=int, default=1, help="frames of the reference")
    flag = {"action": "store_true"}
    group.add_argument("--audio_ref_use_negative_positions", **flag, help="reference sound before time 0 (or LoRA's)")
    for name in ("audio_ref_mask_cross_attention_to_reference", "audio_ref_mask_reference_from_text_attention"):
        group.add_argument(f"--{name}", **flag, help="accepted: counts in training alone")
    group.add_argument("--audio_ref_identity_guidance_scale", type=float, default=0.0, help="cfg of referenced sound")


def check(args: argparse.Namespace) -> list[str]:
    """Everything wrong with the flags, before a file is opened."""
    errors = check_sampling(args, args.ltx2_mode) + check_model(args)
    sources = [bool(args.prompt), bool(args.sample_prompts), args.interactive, bool(args.latent_path)]
    if sum(sources) != 1:
        errors.append("give one of --prompt, --sample_prompts, --interactive and --latent_path")
    if not args.ltx2_checkpoint:
        errors.append("--ltx2_checkpoint is needed")
    if args.video_size and (args.height or args.width):
        errors.append("--video_size sets both sizes; drop --height and --width")
    errors += [f"--{name} is for training only; drop it" for name in TRAINING_ONLY if getattr(args, name) is not None]
    if not args.latent_path and not args.use_precached_sample_prompts:
        errors += check_gemma(args)
        if not (args.gemma_root or args.gemma_safetensors):
            errors.append("--gemma_root or --gemma_safetensors is needed to encode the prompts")
    for name in ("reference_downscale", "reference_frames"):
        value = getattr(args, name)
        if value is not None and value < 1:
            errors.append(f"--{name} must be at least 1 (got {value})")
    return errors


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.height, args.width = args.video_size or (args.height or 512, args.width or 768)
    args.sample_num_frames = args.frame_count
    if errors := check(args):
        raise UserError("; ".join(errors))
    device = values.device(args.device)
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision]
    checkpoint = Checkpoint.open(args.ltx2_checkpoint)
    version = check_version(checkpoint, args.ltx_version, "warn")
    options = _options(args, version)
    sampler = Sampler(
        checkpoint,
        options,
        device=device,
        dtype=dtype,
        vae_dtype=args.vae_dtype,
        vae_checkpoint=Checkpoint.open(args.vae) if args.vae else None,
    )
    if args.latent_path:
        return _decode_saved(args, sampler)
    generator = _Generator(args, checkpoint, sampler, device, dtype)
    if args.interactive:
        for number, prompt in enumerate(_typed_prompts()):
            generator.make([settle(number, prompt, options, num_blocks=generator.num_blocks)])
        return 0
    prompts = read_prompts(args.sample_prompts) if args.sample_prompts else [_typed(args)]
    requests = [settle(i, prompt, options, num_blocks=generator.num_blocks) for i, prompt in enumerate(prompts)]
    return generator.make(requests)


def _options(args: argparse.Namespace, version: str) -> SamplingOptions:
    if args.cfg_scale is not None:
        args.guidance_scale = args.cfg_scale
    seed = args.seed
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
        logger.info("seed %d", seed)
    trained = lora_references(args.lora_weight)
    args.reference_downscale = args.reference_downscale or trained.downscale
    args.audio_ref_use_negative_positions |= trained.negative_positions
    options = sampling_options(
        args,
        mode=args.ltx2_mode,
        version=version,
        checkpoint=args.ltx2_checkpoint,
        loras=args.lora_weight,
        strategy=trained.strategy if args.ic_lora_strategy == "auto" else args.ic_lora_strategy,
    )
    steps = args.sample_steps or (None if args.sample_sampling_preset else STEPS[version])
    return dataclasses.replace(options, frame_rate=args.frame_rate, steps=steps, seed=seed)


def _typed(args: argparse.Namespace) -> SamplePrompt:
    return SamplePrompt(
        prompt=args.prompt,
        negative_prompt=args.negative_prompt or "",
        image_path=args.image_path,
        v2v_ref_path=args.reference_video,
        ref_audio_path=args.reference_audio,
    )


def _typed_prompts() -> Iterator[SamplePrompt]:
    print("a prompt a line, with options such as --w 768; an empty line ends", flush=True)
    for line in sys.stdin:
        if not line.strip():
            return
        yield parse_line(line.strip(), "standard input")


class _Generator:
    """Encodes prompts, then loads the transformer once, then makes every request."""

    def __init__(
        self,
        args: argparse.Namespace,
        checkpoint: Checkpoint,
        sampler: Sampler,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._args, self._checkpoint, self._sampler = args, checkpoint, sampler
        self._device, self._dtype = device, dtype
        self._transformer = None
        check_present(checkpoint, "transformer")
        self.num_blocks = checkpoint.config["transformer"]["num_layers"]

    def make(self, requests: list[Request]) -> int:
        """Make what can be made; the exit status is 1 where a request was left out."""
        contexts = self._contexts(requests)
        conditionings = self._conditionings(requests)
        if all(conditioning.failed for conditioning in conditionings):
            return 1
        transformer = self._load_transformer(requests)
        sampler, offload = self._sampler, self._sampler.options.offload
        for request, context, conditioning in zip(requests, contexts, conditionings):
            if conditioning.failed:
                continue
            if offload:
                transformer.to(self._device)
            with tqdm(total=sampler.step_count(request), desc=f"sample {request.index}", unit="step") as bar:
                latents = sampler.denoise(transformer, request, context, conditioning, lambda _, bar=bar: bar.update())
            if offload:
                transformer.to("cpu")
                release_memory()
            for path in _write(self._args, sampler, latents, request):
                print(path, flush=True)
        return int(any(conditioning.failed for conditioning in conditionings))

    def _contexts(self, requests: list[Request]) -> list[PromptContext]:
        args, mode = self._args, self._args.ltx2_mode
        if args.use_precached_sample_prompts:
            if not args.sample_prompts_cache:
                raise UserError("--use_precached_sample_prompts needs --sample_prompts_cache FILE here")
            return read_prompt_cache(args.sample_prompts_cache, requests, mode, self._context_widths())
        from ltx2_tuner.text_encoding import load_text_encoder

        source = Checkpoint.open(args.ltx2_text_encoder_checkpoint) if args.ltx2_text_encoder_checkpoint else None
        encoder = load_text_encoder(
            gemma_options(args), source or self._checkpoint, mode, device=self._device, dtype=self._dtype
        )
        try:
            return encode_contexts(encoder, requests)
        finally:
            encoder.close()

    def _context_widths(self) -> tuple[int, int]:
        from ltx2_tuner.models.transformer import TransformerConfig

        config = TransformerConfig.from_dict(self._checkpoint.config["transformer"])
        return config.context_width("video"), config.context_width("audio")

    def _conditionings(self, requests: list[Request]) -> list[Conditioning]:
        args = self._args
        if args.use_precached_sample_latents:
            if not args.sample_latents_cache:
                raise UserError("--use_precached_sample_latents needs --sample_latents_cache FILE here")
            return read_latent_cache(args.sample_latents_cache, requests, self._sampler.options)
        return encode_conditionings(
            requests,
            self._sampler.options,
            self._checkpoint,
            vae=args.vae,
            device=self._device,
            vae_dtype=args.vae_dtype,
        )

    def _load_transformer(self, requests: list[Request]) -> LTXTransformer:
        if self._transformer is None:
            variant = VARIANTS[self._args.ltx2_mode]
            if self._sampler.options.audio_only:
                variant = "audio"
            tokens = max(r.frames * r.width * r.height for r in requests) // (8 * 32 * 32)
            self._transformer = load_model(self._args, self._checkpoint, variant, self._device, self._dtype, tokens)
        return self._transformer


def _stem(args: argparse.Namespace, request: Request) -> Path:
    if args.save_path:
        path = Path(args.save_path)
        if path.suffix.lower() in {".mp4", ".png", ".wav", ".safetensors"}:
            name = path.stem if request.index == 0 else f"{path.stem}_{request.index:02d}"
            return path.with_name(name)
        folder = path
    else:
        folder = Path(args.output_dir)
    return folder / f"{args.output_name}_{request.index:02d}_{time.strftime('%Y%m%d%H%M%S')}_{request.seed}"


def _write(args: argparse.Namespace, sampler: Sampler, latents: Latents, request: Request) -> list[Path]:
    """Write what --output_type asks for and return the paths."""
    stem, kind = _stem(args, request), args.output_type
    written = []
    if kind in ("latent", "both", "latent_images"):
        written.append(_write_latents(args, latents, request, stem))
    if kind == "latent":
        return written
    sample = sampler.decode(latents, request)
    if sampler.options.include_reference:
        sample = beside_reference(sample, request, sampler.options)
    if kind in ("images", "latent_images") and sample.frames is not None:
        folder = stem.with_name(stem.name + "_frames")
        for number, frame in enumerate(sample.frames.numpy()):
            written.append(folder / f"{number:05d}.png")
            write_image(written[-1], frame)
        sample = dataclasses.replace(sample, frames=None)
    merge = sampler.options.merge_audio
    return written + write_sample(sample, request, stem, merge_audio=merge, settings=not args.no_metadata)


def _write_latents(args: argparse.Namespace, latents: Latents, request: Request, stem: Path) -> Path:
    path = stem.with_name(stem.name + "_latent.safetensors")
    tensors = {name: value for name, value in (("video", latents.video), ("audio", latents.audio)) if value is not None}
    metadata = {"frames": str(request.frames), "frame_rate": repr(request.frame_rate), "seed": str(request.seed)}
    if not args.no_metadata:
        metadata["prompt"] = request.prompt.prompt
    write_safetensors(path, tensors, metadata)
    return path


def _decode_saved(args: argparse.Namespace, sampler: Sampler) -> int:
    from ltx2_tuner.checkpoint import SafetensorsFile

    for index, name in enumerate(args.latent_path):
        file = SafetensorsFile(name)
        if not {"video", "audio"} & file.tensors.keys() or "frames" not in file.metadata:
            raise UserError(f"--latent_path {name}: is no file that --output_type latent wrote")
        tensors = {key: file.read(key) for key in ("video", "audio") if key in file.tensors}
        rate, frames = float(file.metadata["frame_rate"]), int(file.metadata["frames"])
        prompt = SamplePrompt(frame_count=frames, frame_rate=rate, seed=int(file.metadata["seed"]))
        request = settle(index, prompt, sampler.options)
        sample = sampler.decode(Latents(tensors.get("video"), tensors.get("audio")), request)
        for path in write_sample(sample, request, _stem(args, request), merge_audio=sampler.options.merge_audio):
            print(path, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
