"""Writes what a run at full size reads: a random LTX-2.3 transformer in one file, caches that fit it, a dataset file.

    python benchmarks/full_size.py /dev/shm/full                       # 38 GB, made on the GPU where there is one
    python benchmarks/full_size.py /tmp/small --layers 2 --width_divisor 32 --size 64 64 --frames 17 --tokens 16

The checkpoint has the layout and the metadata of the released files, without autoencoders and text side, which training
does not read. The caches carry its fingerprints. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch

from ltx2_tuner.caching.synthetic import FPS, Clip, SyntheticCaches
from ltx2_tuner.checkpoint.keys import DIT
from ltx2_tuner.checkpoint.tiny import tiny_config
from ltx2_tuner.files import safetensors_header, write_text
from ltx2_tuner.models.transformer import LTXTransformer, TransformerConfig
from ltx2_tuner.models.transformer.tokens import audio_latent_length

BUFFERS = 3  # host buffers between the device and the writing thread
CHECKPOINT, DATASET = "ltx-2.3-random.safetensors", "dataset.toml"  # names in the folder
CLASS_PROMPT = "person"
DATASET_TEXT = """\
[general]
resolution = [{width}, {height}]
batch_size = 1

[[datasets]]
video_directory = '{videos}'
cache_directory = '{cache}'
target_frames = [{frames}]
target_fps = {fps}
"""


def transformer_section(layers: int, width_divisor: int) -> dict[str, object]:
    """The `transformer` section of the released 2.3 file's config, with as many layers and as wide heads as asked."""
    sizes = {"layers": layers, "heads": 32, "head_dim": 128 // width_divisor, "audio_head_dim": 64 // width_divisor}
    section = tiny_config("2.3", **sizes, latent_channels=128, text_hidden=3840)["transformer"]
    return section | {"audio_in_channels": 128, "audio_out_channels": 128, "connector_num_layers": 8}


def write_checkpoint(path: Path, section: dict[str, object], device: torch.device) -> int:
    """Write the transformer in bf16, tensor by tensor; the number of bytes.

    The device makes the next tensor while a thread writes the last: the file costs the host three tensors. It is not
    flushed to the disk, so that it is in the page cache afterwards, as after a download.
    """
    with torch.device("meta"):
        model = LTXTransformer(TransformerConfig.from_dict(section))
    shapes = {f"{DIT}{name}": tuple(parameter.shape) for name, parameter in model.named_parameters()}
    metadata = {"config": json.dumps({"transformer": section}), "model_version": "2.3.0", "format": "pt"}
    header = safetensors_header({name: (torch.bfloat16, shape) for name, shape in shapes.items()}, metadata)
    size = max(torch.Size(shape).numel() for shape in shapes.values())
    free: queue.Queue[torch.Tensor] = queue.Queue()
    for _ in range(BUFFERS):
        free.put(torch.empty(size, dtype=torch.bfloat16, pin_memory=device.type == "cuda"))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", buffering=0) as file:
            _write_all(file, memoryview(header))
            _write_tensors(file, shapes, free, device)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


def _write_tensors(
    file, shapes: dict[str, tuple[int, ...]], free: queue.Queue[torch.Tensor], device: torch.device
) -> None:
    """Append the tensors in the order of the header, by way of the `free` buffers."""
    generator = torch.Generator(device).manual_seed(0)
    with ThreadPoolExecutor(1) as writer:
        written = []
        for name in sorted(shapes):
            buffer = free.get()
            values = buffer[: torch.Size(shapes[name]).numel()]
            values.copy_(_random(name, shapes[name], generator).flatten())
            written.append(writer.submit(_write_and_free, file, values, buffer, free))
            if written[0].done():
                written.pop(0).result()  # a full disk shows at once
        for each in written:
            each.result()


def _write_all(file, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _write_and_free(file, values: torch.Tensor, buffer: torch.Tensor, free: queue.Queue[torch.Tensor]) -> None:
    try:
        _write_all(file, memoryview(values.view(torch.uint8).numpy()))
    finally:
        free.put(buffer)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Values with which every layer answers with about 1: norms near 1, matrices by their number of inputs."""
    if len(shape) == 1:
        mean, std = (1.0, 0.1) if name.endswith("norm.weight") else (0.0, 0.02)
    elif "scale_shift_table" in name:
        mean, std = 0.0, 0.3
    else:
        mean, std = 0.0, shape[-1] ** -0.5 * (0.3 if name.endswith("adaln_single.linear.weight") else 1.0)
    values = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    return values.normal_(mean, std, generator=generator)


def write_caches(folder: Path, checkpoint: Path, args: argparse.Namespace) -> Path:
    """Caches of picture, sound and text for `args.items` clips, the preservation prompts, and the dataset file."""
    height, width = args.size
    grid = ((args.frames - 1) // 8 + 1, height // 32, width // 32)
    clip = Clip(grid, audio_latent_length(args.frames / FPS))
    cache, videos = folder / "cache", folder / "videos"
    videos.mkdir(exist_ok=True)
    caches = SyntheticCaches(checkpoint, tokens=args.tokens, dtype=torch.bfloat16)
    caches.write_items(cache, [clip] * args.items)
    caches.write_prompts(cache, CLASS_PROMPT)
    dataset = folder / DATASET
    places = {"videos": videos.resolve().as_posix(), "cache": cache.resolve().as_posix()}
    write_text(dataset, DATASET_TEXT.format(width=width, height=height, frames=args.frames, fps=FPS, **places))
    return dataset


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width_divisor", type=int, default=1, help="narrower heads, for machines without a big card")
    parser.add_argument("--items", type=int, default=4, help="cached clips")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 768), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--tokens", type=int, default=1024, help="of a prompt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="makes the values")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = args.folder / CHECKPOINT
    start = time.perf_counter()
    size = write_checkpoint(checkpoint, transformer_section(args.layers, args.width_divisor), torch.device(args.device))
    seconds = time.perf_counter() - start
    dataset = write_caches(args.folder, checkpoint, args)
    line = {
        "checkpoint": str(checkpoint),
        "dataset": str(dataset),
        "gb": round(size / 1e9, 3),
        "sec": round(seconds, 2),
        "gb_per_sec": round(size / 1e9 / seconds, 2),
        "caches_sec": round(time.perf_counter() - start - seconds, 2),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
