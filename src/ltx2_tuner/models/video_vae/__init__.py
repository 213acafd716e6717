"""The causal video autoencoder and its tiled forms."""

from ltx2_tuner.models.video_vae.config import VideoVAEConfig, infer_section
from ltx2_tuner.models.video_vae.decoder import VideoDecoder
from ltx2_tuner.models.video_vae.encoder import VideoEncoder

__all__ = ["VideoDecoder", "VideoEncoder", "VideoVAEConfig", "infer_section"]
