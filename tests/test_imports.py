"""What importing the program takes: nothing optional (K3), no compiled part of torchaudio (T10), no model library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

WITHOUT = """
import importlib, pkgutil, sys
for name in ("triton", "flash_attn", "flash_attn_interface", "xformers", "sageattention", "wandb", "lycoris", "peft",
             "tensorboard", "diffusers", "torchcodec", "soundfile", "torchvision"):
    sys.modules[name] = None  # importing it fails
import ltx2_tuner
for module in pkgutil.walk_packages(ltx2_tuner.__path__, "ltx2_tuner."):
    importlib.import_module(module.name)
print(sorted({"torchaudio", "transformers", "bitsandbytes", "av"} & sys.modules.keys()))
"""

# torchaudio built for another torch: its compiled part fails to load, its Python parts are all that is used.
WITH_BROKEN_EXTENSION = """
import importlib.abc, sys
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchaudio._extension":
            raise OSError("undefined symbol: torch_library_impl")
sys.meta_path.insert(0, Broken())
import torch
from ltx2_tuner.compat import prepare_torchaudio
prepare_torchaudio()
import torchaudio.functional as functional
print(functional.resample(torch.ones(1, 480), 48000, 16000).shape[1])
"""


def run(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_imports_without_optional_packages():
    assert "transformers" not in run(WITHOUT), "libraries that take seconds are imported where they are needed"


def test_a_torchaudio_of_another_torch_is_enough():
    assert run(WITH_BROKEN_EXTENSION).splitlines()[-1] == "160"


def test_processes_that_a_script_starts_import_nothing_for_its_sake():
    """Loader and decoding processes import the script's file under another name first."""
    scripts = sorted(path.name for path in ROOT.glob("*.py"))
    code = f"""
import runpy, sys
for script in {scripts!r}:
    runpy.run_path({str(ROOT)!r} + "/" + script, run_name="__mp_main__")
print(sorted(name for name in sys.modules if name.partition(".")[0] in ("torch", "ltx2_tuner")))
"""
    assert len(scripts) > 5 and run(code).strip() == "[]"
