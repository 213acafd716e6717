"""Both oracle packages import torchaudio on their way, whose compiled part a CPU-only torch cannot load."""

from ltx2_tuner.compat import prepare_torchaudio

prepare_torchaudio()
