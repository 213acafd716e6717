"""The LoRA network, its target presets and its file formats."""
