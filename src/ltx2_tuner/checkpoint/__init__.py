"""Reading official checkpoints: headers, configs, versions, streaming loads, fingerprints."""

from ltx2_tuner.checkpoint.checkpoint import Checkpoint, check_version
from ltx2_tuner.checkpoint.safetensors_file import SafetensorsFile, TensorEntry

__all__ = ["Checkpoint", "SafetensorsFile", "TensorEntry", "check_version"]
