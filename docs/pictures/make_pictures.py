"""Makes the pictures of docs/ic-lora.md and docs/audio-reference.md: what goes in, and what the trained LoRA gives.

A tiny random model is trained for one or two minutes on made items whose targets follow from their references, then
samples from pure noise. Latents are drawn as they are: of pictures the first three channels as red, green and blue, of
sound the 32 values of each step from top to bottom.

    python docs/pictures/make_pictures.py    (with the package installed, or PYTHONPATH=src:.)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from ltx2_tuner.checkpoint import Checkpoint, component_id, load_transformer, write_tiny_checkpoint
from ltx2_tuner.cli.ltx2_train_network import main as train_network
from ltx2_tuner.data.cache_files import write_audio, write_latents, write_text
from ltx2_tuner.lora import LoRANetwork, load_lora, table_of
from ltx2_tuner.models.transformer import TransformerConfig
from ltx2_tuner.sampling.conditioning import Conditioning
from ltx2_tuner.sampling.contexts import PromptContext
from ltx2_tuner.sampling.options import SamplingOptions, settle
from ltx2_tuner.sampling.prompts import SamplePrompt
from ltx2_tuner.sampling.sampler import Sampler

HERE = Path(__file__).parent
SIDE = 8  # latent cells of a picture
STEPS = 16  # latent steps of a sound
CELL = 96  # pixels of a drawn panel
TRAINING = 1200  # optimizer steps
RATE = 25.0


def shapes() -> list[torch.Tensor]:
    """References (8, 1, SIDE, SIDE): four shapes in colours of their own on dark ground."""
    rows, columns = torch.meshgrid(torch.arange(SIDE) - 3.5, torch.arange(SIDE) - 3.5, indexing="ij")
    masks = (
        rows.square() + columns.square() < 9,
        (rows.abs() < 3) & (columns.abs() < 3),
        (rows.abs() < 1) | (columns.abs() < 1),
        rows.abs() + columns.abs() < 4,
    )
    colours = ((1.5, -1.0, -1.0), (-1.0, 1.5, -1.0), (-1.0, -1.0, 1.5), (1.5, 1.2, -1.0))
    found = []
    for mask, colour in zip(masks, colours):
        latent = torch.full((8, 1, SIDE, SIDE), -1.0)
        latent[3:] = 0
        for channel, value in enumerate(colour):
            latent[channel, 0][mask] = value
        found.append(latent)
    return found


def recoloured(reference: torch.Tensor) -> torch.Tensor:
    """The target of a picture: red becomes green, green blue, blue red."""
    return torch.cat([reference[:3].roll(1, 0), reference[3:]])


def voices() -> list[torch.Tensor]:
    """References (2, STEPS, 16): four timbres, the same in every step."""
    generator = torch.Generator().manual_seed(3)
    return [1.5 * torch.randn(2, 1, 16, generator=generator).expand(2, STEPS, 16).contiguous() for _ in range(4)]


def spoken(reference: torch.Tensor) -> torch.Tensor:
    """The target of a sound: the reference's timbre, from silence to loud."""
    return reference * torch.linspace(0, 1.3, STEPS)[:, None]


class Project:
    """A tiny checkpoint with caches of items whose captions are all the same."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.folder, self.mode = folder, mode
        write_tiny_checkpoint(folder / "tiny.safetensors", seed=0, heads=8, audio_head_dim=16)
        self.checkpoint = Checkpoint.open(folder / "tiny.safetensors")
        config = TransformerConfig.from_dict(self.checkpoint.config["transformer"])
        generator = torch.Generator().manual_seed(0)
        self.texts = [torch.randn(16, config.context_width(name), generator=generator) for name in ("video", "audio")]

    def add(self, index: int, reference: torch.Tensor, target: torch.Tensor) -> None:
        """Write the caches of one item."""
        cache, references = self.folder / "cache", self.folder / "references"
        cache.mkdir(exist_ok=True)
        references.mkdir(exist_ok=True)
        names = ("video_encoder", "audio_encoder", "text")
        picture, sound, text = ({"component_id": component_id(self.checkpoint, name)} for name in names)
        mask = torch.ones(16, dtype=torch.int64)
        write_text(cache / f"item{index}_ltx2_te.safetensors", *self.texts, mask, {**text, "ltx_mode": "av"})
        if self.mode == "video":
            name = f"item{index}_00000-001_{SIDE * 32:04d}x{SIDE * 32:04d}_ltx2.safetensors"
            write_latents(cache / name, target, {"frame_count": 1, "target_fps": RATE, **picture})
            write_latents(references / name, reference, {"reference_downscale": "1", **picture})
            return
        stem = f"item{index}_0064x0064_ltx2"
        write_latents(cache / f"{stem}.safetensors", torch.zeros(8, 1, 1, 1), {}, virtual=(STEPS, 2, 2))
        write_audio(cache / f"{stem}_audio.safetensors", target, sound)
        write_audio(references / f"{stem}_audio.safetensors", reference, sound)

    def train(self, *flags: str) -> None:
        """Train the LoRA with the command line's own flags."""
        sources, caches = ("video_directory", "reference_cache_directory")
        if self.mode == "audio":
            sources, caches = ("audio_directory", "reference_audio_cache_directory")
        (self.folder / "dataset.toml").write_text(
            f"[general]\nresolution = [{SIDE * 32}, {SIDE * 32}]\nbatch_size = 4\n[[datasets]]\n"
            f"{sources} = '{self.folder.as_posix()}'\ncache_directory = '{(self.folder / 'cache').as_posix()}'\n"
            f"{caches} = '{(self.folder / 'references').as_posix()}'\n",
            encoding="utf-8",
        )
        arguments = ["--ltx2_checkpoint", self.checkpoint.path, "--dataset_config", self.folder / "dataset.toml"]
        arguments += ["--ltx2_mode", self.mode, "--device", "cpu", "--dit_dtype", "float32", "--mixed_precision", "no"]
        arguments += ["--network_dim", 32, "--learning_rate", "5e-3", "--lr_scheduler", "cosine", "--seed", 1]
        arguments += ["--max_train_steps", TRAINING, "--max_data_loader_n_workers", 0]
        arguments += ["--ltx2_first_frame_conditioning_p", 0, "--timestep_sampling", "uniform"]
        arguments += ["--output_dir", self.folder / "output", "--output_name", "lora", *flags]
        if train_network([str(argument) for argument in arguments]):
            raise SystemExit(1)

    def sampler(self, strategy: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """Reference latents -> latents sampled from noise with the trained LoRA."""
        cpu = torch.device("cpu")
        model = load_transformer(self.checkpoint, self.mode, cpu, torch.float32, progress=False)
        lora = load_lora(self.folder / "output" / "lora.safetensors", table_of(model))
        LoRANetwork.from_file(model, lora).attach(model.eval()).eval()
        options = SamplingOptions(
            mode=self.mode, strategy=strategy, guidance_scale=1.0, audio_ref_negative_positions=True
        )
        size = {"width": SIDE * 32, "height": SIDE * 32, "frame_count": 1}
        if self.mode == "audio":
            size = {"frame_count": STEPS // 8 * 8 + 1, "frame_rate": RATE * (STEPS // 8 * 8 + 1) / STEPS}
        request = settle(0, SamplePrompt("", seed=5, sample_steps=20, **size), options)
        context = PromptContext(*(text[None] for text in self.texts))

        def sample(reference: torch.Tensor) -> torch.Tensor:
            given = {"reference" if self.mode == "video" else "reference_audio": reference[None]}
            sampler = Sampler(self.checkpoint, options, device=cpu, dtype=torch.float32)
            latents = sampler.denoise(model, request, context, Conditioning(**given))
            return (latents.video if self.mode == "video" else latents.audio)[0]

        return sample


def panel(latent: torch.Tensor) -> Image.Image:
    """A latent of a picture (8, 1, H, W) or a sound (2, T, 16) as a square picture."""
    if latent.ndim == 4:
        values = latent[:3, 0].permute(1, 2, 0)
    else:
        values = latent.permute(0, 2, 1).flatten(0, 1)[..., None].expand(-1, -1, 3)
    levels = ((values / 3.6 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    return Image.fromarray(levels.numpy()).resize((CELL, CELL), Image.Resampling.NEAREST)


def sheet(rows: Sequence[tuple[str, Sequence[torch.Tensor]]], path: Path) -> None:
    """Panels in labelled rows."""
    margin, label = 8, 150
    width = label + len(rows[0][1]) * (CELL + margin)
    picture = Image.new("RGB", (width, len(rows) * (CELL + margin) + margin), "white")
    draw = ImageDraw.Draw(picture)
    for row, (name, latents) in enumerate(rows):
        top = margin + row * (CELL + margin)
        draw.text((margin, top + CELL // 2 - 6), name, fill="black")
        for column, latent in enumerate(latents):
            picture.paste(panel(latent), (label + column * (CELL + margin), top))
    picture.quantize(64).save(path, optimize=True)
    print(path, path.stat().st_size, "bytes")


def make(mode: str, strategy: str, references: list[torch.Tensor], follow: Callable, flags: Sequence[str]) -> list:
    """Train on the items and return the rows of their picture."""
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder), mode)
        targets = [follow(reference) for reference in references]
        for index, (reference, target) in enumerate(zip(references, targets)):
            project.add(index, reference, target)
        project.train("--ic_lora_strategy", strategy, *flags)
        results = [project.sampler(strategy)(reference) for reference in references]
    return [("reference", references), ("target it was trained on", targets), ("result, from noise", results)]


def main() -> None:
    flags = ["--lora_target_preset", "full"]
    sheet(make("video", "v2v", shapes(), recoloured, flags), HERE / "ic-lora.png")
    flags += ["--audio_ref_use_negative_positions", "--audio_ref_mask_reference_from_text_attention"]
    sheet(make("audio", "audio_ref_only_ic", voices(), spoken, flags), HERE / "audio-reference.png")


if __name__ == "__main__":
    main()
