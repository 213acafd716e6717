"""Decodes sound in a process of its own, so that the decoder's memory is gone when it ends.

python -m ltx2_tuner.sampling.audio_preview --checkpoint FILE --input LATENTS --output WAVEFORM
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ltx2_tuner.checkpoint import Checkpoint, SafetensorsFile, load_audio_decoder, load_vocoder
from ltx2_tuner.files import write_safetensors
from ltx2_tuner.sampling.decode import decode_waveform

logger = logging.getLogger(__name__)
_SOURCE_ROOT = Path(__file__).resolve().parents[2]


class AudioPreviewError(RuntimeError):
    """The child process ended without a waveform; the message holds the end of its error output."""


def decode_in_subprocess(checkpoint: str | Path, latents: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Waveform (2, samples) float32 and its rate for audio latents (1, C, T, bins).

    Raises:
        AudioPreviewError: the child failed.
    """
    with tempfile.TemporaryDirectory(prefix="ltx2_audio_") as folder:
        source, result = Path(folder, "latents.safetensors"), Path(folder, "waveform.safetensors")
        write_safetensors(source, {"latents": latents.float().cpu()})
        command = [sys.executable, "-m", "ltx2_tuner.sampling.audio_preview"]
        command += ["--checkpoint", str(checkpoint), "--input", str(source), "--output", str(result)]
        paths = [str(_SOURCE_ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        child = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
        if child.returncode or not result.exists():
            raise AudioPreviewError(f"decoding the sound failed: {child.stderr.strip()[-2000:]}")
        file = SafetensorsFile(result)
        return file.read("waveform"), int(file.metadata["rate"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--input", required=True, help="safetensors file with the key latents (1, C, T, bins)")
    parser.add_argument(
        "--output", required=True, help="safetensors file to write: waveform, and its rate in the metadata"
    )
    parser.add_argument("--device", default="auto", help="auto is the CPU: sound is small, the card is busy")
    args = parser.parse_args(argv)
    device = torch.device("cpu" if args.device == "auto" else args.device)
    checkpoint = Checkpoint.open(args.checkpoint)
    decoder = load_audio_decoder(checkpoint, device, torch.float32)
    vocoder = load_vocoder(checkpoint, device, torch.float32)
    waveform = decode_waveform(decoder, vocoder, SafetensorsFile(args.input).read("latents"))
    write_safetensors(args.output, {"waveform": waveform}, {"rate": str(vocoder.output_rate)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
