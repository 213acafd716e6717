"""The audio-video diffusion transformer."""

from ltx2_tuner.models.transformer.block import BasicAVTransformerBlock
from ltx2_tuner.models.transformer.config import TransformerConfig
from ltx2_tuner.models.transformer.modality import Modality
from ltx2_tuner.models.transformer.model import LTXTransformer
from ltx2_tuner.models.transformer.perturbations import Perturbations, SamplePerturbations

__all__ = [
    "BasicAVTransformerBlock",
    "LTXTransformer",
    "Modality",
    "Perturbations",
    "SamplePerturbations",
    "TransformerConfig",
]
