"""Sizes of the sound autoencoder and of the mel front end, from a checkpoint's `config["audio_vae"]`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AudioVAEConfig:
    """Sizes of the sound autoencoder; `channel_multipliers` has one entry a resolution level."""

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4)
    res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = ()
    resolution: int = 256
    mid_attention: bool = False
    latent_channels: int = 8
    double_latent: bool = True
    in_channels: int = 2
    out_channels: int = 2
    mel_bins: int = 64
    sample_rate: int = 16000  # samples/s
    fft_length: int = 1024  # samples
    hop_length: int = 160  # samples
    mel_min: float = 0.0  # Hz
    mel_max: float = 8000.0  # Hz

    @classmethod
    def from_dict(cls, section: Mapping[str, Any]) -> AudioVAEConfig:
        """Read the `audio_vae` section; ValueError names a key this model cannot follow."""
        params = section.get("model", {}).get("params", {})
        sizes = params.get("ddconfig", {})
        preprocessing = section.get("preprocessing", {})
        stft, mel = preprocessing.get("stft", {}), preprocessing.get("mel", {})
        for key, wanted in {
            "norm_type": "pixel",
            "causality_axis": "height",
            "resamp_with_conv": True,
            "attn_type": "vanilla",
        }.items():
            if sizes.get(key, wanted) != wanted:
                raise ValueError(f"audio_vae ddconfig.{key} is {sizes[key]!r}; only {wanted!r} is known")
        if not stft.get("causal", True):
            raise ValueError("audio_vae preprocessing.stft.causal is False; only causal preprocessing is known")
        sample_rate = params.get("sampling_rate", 16000)
        bins = (sizes.get("mel_bins"), mel.get("n_mel_channels"), section.get("variables", {}).get("mel_bins"))
        return cls(
            channels=sizes.get("ch", 128),
            channel_multipliers=tuple(sizes.get("ch_mult", (1, 2, 4))),
            res_blocks=sizes.get("num_res_blocks", 2),
            attention_resolutions=tuple(sizes.get("attn_resolutions", (8, 16, 32))),
            resolution=sizes.get("resolution", 256),
            mid_attention=sizes.get("mid_block_add_attention", True),
            latent_channels=sizes.get("z_channels", 8),
            double_latent=sizes.get("double_z", True),
            in_channels=sizes.get("in_channels", 2),
            out_channels=sizes.get("out_ch", 2),
            mel_bins=next((value for value in bins if value is not None), 64),
            sample_rate=sample_rate,
            fft_length=stft.get("filter_length", 1024),
            hop_length=stft.get("hop_length", 160),
            mel_min=mel.get("mel_fmin", 0.0),
            mel_max=mel.get("mel_fmax", sample_rate / 2),
        )

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> AudioVAEConfig:
        """The config of a file without metadata; see `infer_section` for the keys."""
        return cls.from_dict(infer_section(shapes))

    @property
    def downscale(self) -> int:
        """Mel frames, and mel bins, a latent stands for."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def latent_bins(self) -> int:
        """Frequency bins of the latents."""
        return self.mel_bins // self.downscale

    @property
    def latents_per_second(self) -> float:
        """Latents per second of sound."""
        return self.sample_rate / self.hop_length / self.downscale

    def has_attention(self, level: int) -> bool:
        """Whether the blocks of a resolution level are followed by attention."""
        return self.resolution // 2**level in self.attention_resolutions

    def mel_frames(self, samples: int) -> int:
        """Mel frames of `samples` at `sample_rate`."""
        return 1 + samples // self.hop_length

    def latent_length(self, samples: int) -> int:
        """Latents of `samples` at `sample_rate`."""
        return math.ceil(self.mel_frames(samples) / self.downscale)


def infer_section(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The `audio_vae` section of a file without metadata, from its tensor shapes.

    `shapes` maps `encoder.*`, `decoder.*` and `per_channel_statistics.*` (prefix `audio_vae.` allowed) to shapes; one
    of encoder and decoder is enough. What the front end does is not in the weights: the released values are taken.
    """
    shapes = {key.removeprefix("audio_vae."): tuple(shape) for key, shape in shapes.items()}
    part, levels = ("encoder", "down") if "encoder.conv_in.conv.weight" in shapes else ("decoder", "up")
    if f"{part}.conv_in.conv.weight" not in shapes:
        raise ValueError("no sound autoencoder among the tensors: neither encoder.conv_in nor decoder.conv_in")
    widths: dict[int, int] = {}
    blocks = 0
    for key, shape in shapes.items():
        match = re.match(rf"{part}\.{levels}\.(\d+)\.block\.(\d+)\.conv1\.conv\.weight$", key)
        if match:
            widths[int(match[1])] = shape[0]
            blocks = max(blocks, int(match[2]) + 1)
    if part == "encoder":
        channels = shapes["encoder.conv_in.conv.weight"][0]
        latent_channels = shapes["encoder.conv_out.conv.weight"][0] // 2
    else:
        channels = shapes["decoder.conv_out.conv.weight"][1]
        latent_channels = shapes["decoder.conv_in.conv.weight"][1]
    sizes: dict[str, Any] = {
        "ch": channels,
        "ch_mult": [widths[level] // channels for level in range(len(widths))],
        "num_res_blocks": blocks if part == "encoder" else blocks - 1,
        "z_channels": latent_channels,
        "attn_resolutions": [],
        "mid_block_add_attention": f"{part}.mid.attn_1.q.conv.weight" in shapes,
    }
    statistics = shapes.get("per_channel_statistics.mean-of-means")
    if statistics is not None:
        sizes["mel_bins"] = statistics[0] // latent_channels * 2 ** (len(widths) - 1)
    return {"model": {"params": {"ddconfig": sizes}}}
