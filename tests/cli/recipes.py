"""What the recipe tests share: tiny models, made clips and sounds, and the scripts as users start them."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from ltx2_tuner.checkpoint import write_tiny_checkpoint
from ltx2_tuner.media.write import write_image, write_video, write_wav
from ltx2_tuner.text_encoding import write_tiny_gemma

ROOT = Path(__file__).resolve().parents[2]
SIZE = (96, 64)  # pixels, width and height
RATE = 16000


def write_models(folder: Path) -> Path:
    """A checkpoint of 3 blocks and a Gemma; returns the folder."""
    write_tiny_checkpoint(folder / "ltx-2.safetensors", layers=3, seed=0)
    write_tiny_gemma(folder / "gemma", seed=0)
    return folder


def moving_square(frames: int, colour: tuple[int, int, int], background: int = 20) -> np.ndarray:
    """uint8 (N, H, W, 3): a square that goes from left to right."""
    width, height = SIZE
    clip = np.full((frames, height, width, 3), background, dtype=np.uint8)
    for index in range(frames):
        left = 4 + (width - 40) * index // max(frames - 1, 1)
        clip[index, 20:44, left : left + 24] = colour
    return clip


def tone(seconds: float, pitch: float) -> np.ndarray:
    """float32 (2, S): a soft tone."""
    time = np.arange(round(seconds * RATE)) / RATE
    return np.stack([0.3 * np.sin(2 * np.pi * pitch * time)] * 2).astype(np.float32)


def write_scene(folder: Path, name: str, colour: tuple[int, int, int], pitch: float | None = None) -> None:
    """A captioned clip of 33 frames; with sound where a pitch (Hz) is given."""
    folder.mkdir(parents=True, exist_ok=True)
    sound = None if pitch is None else (tone(33 / 25, pitch), RATE)
    write_video(folder / f"{name}.mp4", moving_square(33, colour), 25, audio=sound)
    (folder / f"{name}.txt").write_text(f"A square of {colour} moves.", encoding="utf-8")


def write_reference(path: Path, colour: tuple[int, int, int]) -> None:
    """An image or a clip, by the suffix, of the square on a light ground."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = moving_square(9, colour, background=200)
    if path.suffix == ".mp4":
        write_video(path, frames, 25)
    else:
        write_image(path, frames[0])


def write_sound(path: Path, pitch: float, seconds: float = 0.6) -> None:
    """A .wav or .flac tone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = tone(seconds, pitch)
    if path.suffix == ".wav":
        write_wav(path, samples, RATE)
        return
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=RATE, layout="stereo")
        planes = np.ascontiguousarray((samples * 32767).astype(np.int16).T.reshape(1, -1))
        frame = av.AudioFrame.from_ndarray(planes, format="s16", layout="stereo")
        frame.rate = RATE
        container.mux([*stream.encode(frame), *stream.encode(None)])


@dataclass(frozen=True)
class Finished:
    returncode: int
    stdout: str
    stderr: str


def run(script: str, *arguments: object, cwd: Path, launcher: tuple[object, ...] = (), status: int = 0) -> Finished:
    """A script of the repository, started in a project folder.

    Without a launcher it runs in this process: each start of Python and torch takes seconds.
    """
    words = [str(argument) for argument in arguments]
    done = _launch(script, words, cwd, launcher) if launcher else _call(script, words, cwd)
    assert done.returncode == status, f"{script}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def _launch(script: str, words: list[str], cwd: Path, launcher: tuple[object, ...]) -> Finished:
    command = [sys.executable, *map(str, launcher), str(ROOT / script), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", env=environment)
    return Finished(done.returncode, done.stdout, done.stderr)


def _call(script: str, words: list[str], cwd: Path) -> Finished:
    main = importlib.import_module(f"ltx2_tuner.cli.{script.removesuffix('.py')}").main
    out, err = io.StringIO(), io.StringIO()
    root, handler = logging.getLogger(), logging.StreamHandler(err)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(words)
    except SystemExit as stop:
        status = stop.code
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    return Finished(status, out.getvalue(), err.getvalue())


LAUNCH = (
    *("-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", 1, "--mixed_precision", "bf16"),
    *("--num_processes", 1, "--num_machines", 1, "--dynamo_backend", "no", "--cpu"),
)
