"""Makes what the quickstart trains on: a tiny random checkpoint and Gemma, captioned clips, a dataset and prompts."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ltx2_tuner.checkpoint import write_tiny_checkpoint
from ltx2_tuner.cli.parser import entry_point
from ltx2_tuner.errors import UserError
from ltx2_tuner.files import write_text
from ltx2_tuner.media.audio import read_audio
from ltx2_tuner.media.resize import cover_crop
from ltx2_tuner.media.video import probe, read_frames
from ltx2_tuner.media.write import write_video
from ltx2_tuner.text_encoding import write_tiny_gemma

WIDTH, HEIGHT, FPS, FRAMES = 128, 96, 25, 33
CLIPS = 4
RATE = 16000

DATASET = """\
[general]
resolution = [{width}, {height}]
caption_extension = ".txt"
batch_size = 1

[[datasets]]
video_directory = "{clips}"
cache_directory = "{cache}"
target_frames = [{frames}]
frame_extraction = "head"
target_fps = {fps}
"""


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--clip", type=Path)
    args = parser.parse_args(argv)
    folder: Path = args.folder
    clips = folder / "clips"
    clips.mkdir(parents=True, exist_ok=True)
    if args.clip:
        cut_clips(args.clip, clips)
    else:
        render_clips(clips)
    write_tiny_checkpoint(folder / "tiny_ltx23.safetensors", version="2.3", seed=0)
    write_tiny_gemma(folder / "tiny_gemma", seed=0)
    dataset = DATASET.format(
        width=WIDTH,
        height=HEIGHT,
        frames=FRAMES,
        fps=float(FPS),
        clips=clips.resolve().as_posix(),
        cache=(folder / "cache").resolve().as_posix(),
    )
    write_text(folder / "dataset.toml", dataset)
    caption = next(clips.glob("*.txt")).read_text(encoding="utf-8").strip()
    write_text(folder / "prompts.txt", f"{caption} --w {WIDTH} --h {HEIGHT} --f {FRAMES} --s 8 --d 1 --g 1.0\n")
    return 0


def render_clips(folder: Path) -> None:
    """A coloured disc that crosses the picture while a tone of its own glides: one clip a colour."""
    colours = {"red": (220, 40, 40), "green": (40, 190, 70), "blue": (50, 80, 230), "yellow": (235, 215, 40)}
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    for number, (name, colour) in enumerate(colours.items()):
        frames = np.empty((FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)
        for index in range(FRAMES):
            position = (index + 1) / (FRAMES + 1)
            centre = position if number % 2 else 1 - position
            height = HEIGHT * (0.5 + 0.25 * math.sin(2 * math.pi * position))
            disc = (columns - WIDTH * centre) ** 2 + (rows - height) ** 2 < 18**2
            background = np.stack([rows + 60, columns // 2 + 60, 90 + rows * 0], axis=-1).astype(np.uint8)
            frames[index] = np.where(disc[..., None], np.array(colour, dtype=np.uint8), background)
        seconds = np.arange(FRAMES * RATE // FPS) / RATE
        tone = 0.4 * np.sin(2 * np.pi * (220 * (number + 1) + 80 * seconds) * seconds)
        sound = np.stack([tone, tone]).astype(np.float32)
        write_video(folder / f"{name} disc.mp4", frames, FPS, audio=(sound, RATE))
        side = "right" if number % 2 else "left"
        write_text(folder / f"{name} disc.txt", f"A {name} disc moves to the {side} while a tone rises.\n")


def cut_clips(source: Path, folder: Path) -> None:
    """Cut up to four windows of a clip, with their sound, at the quickstart's size.

    Raises:
        UserError: the clip is shorter than one window.
    """
    info = probe(source)
    step = info.fps / FPS
    window = math.ceil(FRAMES * step)
    count = min(CLIPS, info.frames // window)
    if not count:
        raise UserError(f"--clip {source}: has {info.frames} frames, at least {window} are needed; name a longer clip")
    starts = np.linspace(0, info.frames - window, count).astype(int)
    for number, start in enumerate(starts):
        indices = [int(start + index * step) for index in range(FRAMES)]
        frames = read_frames(source, indices, resize=lambda frame: cover_crop(frame, WIDTH, HEIGHT))
        sound = None
        if info.has_audio:
            begin = start / info.fps
            sound = read_audio(source, begin, begin + FRAMES / FPS)
        write_video(folder / f"part {number}.mp4", frames, FPS, audio=sound)
        write_text(folder / f"part {number}.txt", f"Part {number + 1} of {count} of the clip {source.stem}.\n")


if __name__ == "__main__":
    sys.exit(main())
