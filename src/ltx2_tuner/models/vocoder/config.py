"""Sizes of the waveform generators, from a checkpoint's `config["vocoder"]`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class GeneratorConfig:
    """One generator: `rates` and `kernels` of its upsampling stages, kernels and dilations of its residual blocks.

    `anti_aliased` selects snake activations between up- and downsampling; `final` is tanh, clamp or none.
    """

    initial_channels: int = 1024
    rates: tuple[int, ...] = (6, 5, 2, 2, 2)
    kernels: tuple[int, ...] = (16, 15, 8, 4, 4)
    res_kernels: tuple[int, ...] = (3, 7, 11)
    res_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    anti_aliased: bool = False
    activation: str = "snake"
    channels: int = 2
    mel_bins: int = 64
    final: str = "tanh"
    final_bias: bool = True
    output_rate: int = 24000  # samples/s

    @classmethod
    def from_dict(cls, section: Mapping[str, Any], *, final_activation: bool = True) -> GeneratorConfig:
        """Read one generator's section; `final_activation` is the default where the section does not say."""
        block = section.get("resblock", "1")
        if block not in ("1", "AMP1"):
            raise ValueError(f"vocoder resblock is {block!r}; known are '1' and 'AMP1'")
        activation = section.get("activation", "snake")
        if activation not in ("snake", "snakebeta"):
            raise ValueError(f"vocoder activation is {activation!r}; known are 'snake' and 'snakebeta'")
        final = "tanh" if section.get("use_tanh_at_final", True) else "clamp"
        if not section.get("apply_final_activation", final_activation):
            final = "none"
        res_kernels = tuple(section.get("resblock_kernel_sizes", cls.res_kernels))
        res_dilations = tuple(map(tuple, section.get("resblock_dilation_sizes", [(1, 3, 5)] * len(res_kernels))))
        rates = tuple(section.get("upsample_rates", cls.rates))
        kernels = tuple(section.get("upsample_kernel_sizes", cls.kernels))
        if len(rates) != len(kernels) or len(res_kernels) != len(res_dilations):
            raise ValueError(
                f"vocoder lists do not match: {len(rates)} upsample_rates for {len(kernels)} upsample_kernel_sizes, "
                f"{len(res_kernels)} resblock_kernel_sizes for {len(res_dilations)} resblock_dilation_sizes"
            )
        return cls(
            initial_channels=section.get("upsample_initial_channel", cls.initial_channels),
            rates=rates,
            kernels=kernels,
            res_kernels=res_kernels,
            res_dilations=res_dilations,
            anti_aliased=block == "AMP1",
            activation=activation,
            channels=2 if section.get("stereo", True) else 1,
            mel_bins=section.get("num_mels", cls.mel_bins),
            final=final,
            final_bias=section.get("use_bias_at_final", True),
            output_rate=section.get("output_sampling_rate", cls.output_rate),
        )

    @property
    def samples_per_frame(self) -> int:
        """Samples a mel frame becomes."""
        return math.prod(self.rates)


@dataclass(frozen=True)
class ExtensionConfig:
    """A generator whose sound a second generator extends to a higher rate, from the first one's spectrogram."""

    base: GeneratorConfig
    extension: GeneratorConfig
    hop_length: int  # samples of the base generator
    fft_length: int  # samples of the base generator

    @classmethod
    def from_dict(cls, section: Mapping[str, Any]) -> ExtensionConfig:
        """Read a section with the objects `vocoder` and `bwe`."""
        bwe = section["bwe"]
        base = GeneratorConfig.from_dict(section["vocoder"])
        extension = GeneratorConfig.from_dict(bwe, final_activation=False)
        config = cls(
            base=replace(base, output_rate=bwe.get("input_sampling_rate", 16000)),
            extension=replace(extension, output_rate=bwe.get("output_sampling_rate", 48000)),
            hop_length=bwe.get("hop_length", 80),
            fft_length=bwe.get("n_fft", 512),
        )
        before, after = config.base.output_rate, config.extension.output_rate
        if config.extension.samples_per_frame * before != config.hop_length * after or after % before:
            raise ValueError(
                f"vocoder.bwe turns {config.hop_length} samples into {config.extension.samples_per_frame}, which does "
                f"not fit its rates {before} and {after}"
            )
        return config

    @property
    def ratio(self) -> int:
        """Samples made of one sample of the base generator."""
        return self.extension.output_rate // self.base.output_rate


# Block lists of the released generators, which shapes do not tell apart from others of equal size.
_AMP = {"resblock": "AMP1", "activation": "snakebeta", "use_tanh_at_final": False, "use_bias_at_final": False}
_BASE_RATES = {"upsample_rates": [5, 2, 2, 2, 2, 2], "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4]}
_EXTENSION_RATES = {"upsample_rates": [6, 5, 2, 2, 2], "upsample_kernel_sizes": [12, 11, 4, 4, 4]}


def infer_section(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The `vocoder` section of a file without metadata, from its tensor shapes (names below `vocoder.`).

    Widths come from the shapes, everything else from the released files: with bandwidth extension where there are
    `bwe_generator.*` tensors, plain otherwise.
    """
    shapes = {key: tuple(shape) for key, shape in shapes.items()}
    if any(key.startswith("bwe_generator.") for key in shapes):
        return {
            "vocoder": {**_AMP, **_BASE_RATES, **_widths(shapes, "vocoder.")},
            "bwe": {
                **_AMP,
                **_EXTENSION_RATES,
                **_widths(shapes, "bwe_generator."),
                "apply_final_activation": False,
                "input_sampling_rate": 16000,
                "output_sampling_rate": 48000,
                "hop_length": 80,
                "n_fft": shapes["mel_stft.stft_fn.forward_basis"][-1],
                "num_mels": shapes["mel_stft.mel_basis"][0],
            },
        }
    if "conv_pre.weight" in shapes:
        return {"resblock": "1", "stereo": True, "output_sampling_rate": 24000, **_widths(shapes, "")}
    raise ValueError("no vocoder among the tensors: neither conv_pre nor bwe_generator")


def _widths(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, Any]:
    stages = sum(key.startswith(f"{prefix}ups.") and key.endswith(".weight") for key in shapes)
    blocks = {key.removeprefix(f"{prefix}resblocks.").split(".")[0] for key in shapes if f"{prefix}resblocks." in key}
    kernels = [shapes[f"{prefix}resblocks.{index}.convs1.0.weight"][-1] for index in range(len(blocks) // stages)]
    return {
        "upsample_initial_channel": shapes[f"{prefix}conv_pre.weight"][0],
        "resblock_kernel_sizes": kernels,
        "resblock_dilation_sizes": [[1, 3, 5]] * len(kernels),
    }
