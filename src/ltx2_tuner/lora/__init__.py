"""The LoRA network, its target presets and its file formats."""

from ltx2_tuner.lora.files import comfy_path, load_lora, save_comfy, save_original
from ltx2_tuner.lora.formats import FORMATS, LoRAFile, LoRAMatrices
from ltx2_tuner.lora.layer import LoRAAdapter, LoRALinear
from ltx2_tuner.lora.network import Dropouts, LoRANetwork, table_of
from ltx2_tuner.lora.targets import PRESETS, Targets, select_layers

__all__ = [
    "FORMATS",
    "PRESETS",
    "Dropouts",
    "LoRAAdapter",
    "LoRAFile",
    "LoRALinear",
    "LoRAMatrices",
    "LoRANetwork",
    "Targets",
    "comfy_path",
    "load_lora",
    "save_comfy",
    "save_original",
    "select_layers",
    "table_of",
]
