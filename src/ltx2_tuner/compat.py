"""Third-party packages that need a hand before they import."""

from __future__ import annotations

import importlib.machinery
import sys
import types


def prepare_torchaudio() -> None:
    """Make `import torchaudio` work where its compiled extension does not load (a CPU-only torch, a version mismatch).

    Only its Python parts are used here (resampling, mel filters, phase vocoder), and transformers imports it by
    itself, so call this before importing either. Does nothing when torchaudio loads as it is or is absent.
    """
    if "torchaudio" in sys.modules:
        return
    try:
        import torchaudio  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name == "torchaudio":
            return
        _stub_extension()
    except (ImportError, OSError, RuntimeError):
        _stub_extension()


def _stub_extension() -> None:
    for name in [name for name in sys.modules if name == "torchaudio" or name.startswith("torchaudio.")]:
        del sys.modules[name]
    stub = types.ModuleType("torchaudio._extension")
    stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio._extension", loader=None)
    stub._IS_TORCHAUDIO_EXT_AVAILABLE = False
    stub._IS_ALIGN_AVAILABLE = False
    stub.fail_if_no_align = lambda function: function
    stub._check_cuda_version = lambda: None
    sys.modules["torchaudio._extension"] = stub
