"""Sizes of the video autoencoder, from a checkpoint's `config["vae"]` or from its tensor shapes."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

logger = logging.getLogger(__name__)

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
DECODER_BLOCKS = frozenset(("res_x", "res_x_y", "compress_time", "compress_space", "compress_all"))
ENCODER_BLOCKS = DECODER_BLOCKS | {"compress_all_x_y", "compress_time_res", "compress_space_res", "compress_all_res"}


@dataclass(frozen=True)
class BlockSpec:
    """One entry of a block list: its name, number of residual layers, channel multiplier and switches."""

    name: str
    layers: int = 1
    multiplier: int = 1
    residual: bool = False
    inject_noise: bool = False

    @property
    def strides(self) -> tuple[int, int, int]:
        """Resampling factors in time, height and width."""
        time = 2 if self.name.startswith(("compress_time", "compress_all")) else 1
        space = 2 if self.name.startswith(("compress_space", "compress_all")) else 1
        return time, space, space


@dataclass(frozen=True)
class VideoVAEConfig:
    """Sizes of the video autoencoder.

    `decoder_blocks` are in the order of the file (pixel end first) and empty where the file has no
    convolutional decoder. Paddings are modes of `torch.nn.Conv3d`.
    """

    encoder_blocks: tuple[BlockSpec, ...]
    decoder_blocks: tuple[BlockSpec, ...]
    latent_channels: int = 128
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int = 4
    norm_layer: str = "pixel_norm"
    latent_log_var: str = "uniform"
    encoder_padding: str = "zeros"
    decoder_padding: str = "reflect"
    decoder_base_channels: int = 128
    causal_decoder: bool = False
    timestep_conditioning: bool = False

    @classmethod
    def from_dict(cls, section: Mapping[str, Any]) -> VideoVAEConfig:
        """Read the `vae` section of a checkpoint's config; ValueError names a key this model cannot follow.

        A file of the diffusion-decoder generation (`CausalDiffusionVAE`) gives an encoder only.
        """
        kind = section.get("_class_name", "CausalVideoAutoencoder")
        if kind == "CausalDiffusionVAE":
            encoder = section.get("encoder", {})
            fields = {**encoder, "encoder_blocks": encoder.get("blocks", ())}
            fields["latent_channels"] = encoder.get("latent_channels", encoder.get("out_channels", 128))
            fields.update(decoder_blocks=(), out_channels=3)
        elif kind == "CausalVideoAutoencoder":
            fields = dict(section)
        else:
            raise ValueError(f"vae._class_name is {kind!r}; known are CausalVideoAutoencoder and CausalDiffusionVAE")
        _expect(fields, "dims", 3, (3,))
        both = fields.get("spatial_padding_mode")
        return cls(
            encoder_blocks=_blocks(fields, "encoder_blocks", ENCODER_BLOCKS),
            decoder_blocks=_blocks(fields, "decoder_blocks", DECODER_BLOCKS),
            latent_channels=fields.get("latent_channels", 128),
            in_channels=fields.get("in_channels", 3),
            out_channels=fields.get("out_channels", 3),
            patch_size=fields.get("patch_size", 4),
            norm_layer=_expect(fields, "norm_layer", "pixel_norm", ("pixel_norm", "group_norm")),
            latent_log_var=_expect(fields, "latent_log_var", "uniform", ("uniform", "per_channel", "constant")),
            encoder_padding=_padding(both or fields.get("encoder_spatial_padding_mode", "zeros")),
            decoder_padding=_padding(both or fields.get("decoder_spatial_padding_mode", "reflect")),
            decoder_base_channels=fields.get("decoder_base_channels", 128),
            causal_decoder=fields.get("causal_decoder", False),
            timestep_conditioning=fields.get("timestep_conditioning", False),
        )

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> VideoVAEConfig:
        """The config of a file without metadata; see `infer_section` for the keys."""
        return cls.from_dict(infer_section(shapes))

    def matched_to(self, keys: Collection[str]) -> VideoVAEConfig:
        """This config with timestep conditioning on exactly if the decoder's keys have it.

        `keys` are the decoder's tensor names, with or without a prefix. Released configs and code disagree about
        the default of this field, the weights do not.
        """
        conditioned = any("last_time_embedder." in key for key in keys)
        if conditioned != self.timestep_conditioning:
            logger.warning("vae.timestep_conditioning is %s, the weights say %s", not conditioned, conditioned)
        return replace(self, timestep_conditioning=conditioned)

    @property
    def spatial_scale(self) -> int:
        """Pixels a latent stands for, along height and width."""
        return self.patch_size * math.prod(block.strides[1] for block in self._resampling)

    @property
    def temporal_scale(self) -> int:
        """Frames a latent stands for; the first latent stands for one frame."""
        return math.prod(block.strides[0] for block in self._resampling)

    @property
    def _resampling(self) -> tuple[BlockSpec, ...]:
        return self.encoder_blocks or self.decoder_blocks

    def latent_shape(self, pixels: Sequence[int]) -> tuple[int, int, int, int]:
        """(channels, F, H, W) of the latents of `pixels` = (frames, height, width); frames past 8n+1 do not count."""
        frames, height, width = pixels
        scale = self.spatial_scale
        if frames < 1 or height % scale or width % scale:
            raise ValueError(f"{frames} frames of {width}x{height} cannot be encoded: sizes must divide by {scale}")
        latent_frames = 1 + (frames - 1) // self.temporal_scale
        return self.latent_channels, latent_frames, height // scale, width // scale

    def pixel_shape(self, latents: Sequence[int]) -> tuple[int, int, int]:
        """(frames, height, width) that latents of (F, H, W) decode to."""
        frames, height, width = latents
        return 1 + (frames - 1) * self.temporal_scale, height * self.spatial_scale, width * self.spatial_scale


def infer_section(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The `vae` section of a file without metadata, from its tensor shapes.

    `shapes` maps `encoder.*`, `decoder.*` and `per_channel_statistics.*` (prefix `vae.` allowed) to shapes; one of
    encoder and decoder is enough. Which generation it is follows from the last downsampler, which halves the
    channels it is given in 2.3 and keeps them in 2.0, or from the number of decoder blocks.
    """
    shapes = {key.removeprefix("vae."): tuple(shape) for key, shape in shapes.items()}
    last_down = shapes.get("encoder.down_blocks.7.conv.conv.weight")
    has_decoder = "decoder.conv_in.conv.weight" in shapes
    if last_down is None and not has_decoder:
        raise ValueError("no video autoencoder among the tensors: neither encoder.down_blocks.7 nor decoder.conv_in")
    if last_down is not None:
        newer = last_down[1] == 8 * last_down[0]
    else:
        newer = any(key.startswith("decoder.up_blocks.8.") for key in shapes)
    section: dict[str, Any] = {"encoder_blocks": [], "decoder_blocks": []}
    if last_down is not None:
        names = ["compress_space_res", "compress_time_res", "compress_all_res", "compress_all_res"]
        multipliers = [2, 2, 2, 1 if newer else 2]
        section["encoder_blocks"] = _interleave(shapes, "encoder.down_blocks", names, multipliers)
        section["latent_channels"] = shapes["encoder.conv_in.conv.weight"][0]
    if has_decoder:
        names = ["compress_all", "compress_all", "compress_time", "compress_space"] if newer else ["compress_all"] * 3
        multipliers = [2, 1, 2, 2] if newer else [2, 2, 2]
        blocks = _interleave(shapes, "decoder.up_blocks", names, multipliers, residual=not newer)
        section["decoder_blocks"] = blocks[::-1]
        section["latent_channels"] = shapes["decoder.conv_in.conv.weight"][1]
        section["decoder_base_channels"] = shapes["decoder.conv_out.conv.weight"][1]
        section["timestep_conditioning"] = any("last_time_embedder." in key for key in shapes)
    if newer:
        section["spatial_padding_mode"] = "zeros"
    return section


def _interleave(
    shapes: Mapping[str, Sequence[int]], prefix: str, names: list[str], multipliers: list[int], residual: bool = False
) -> list[list]:
    """Residual stages, as deep as the tensors say, with the resampling blocks between them."""
    blocks: list[list] = []
    for stage in range(len(names) + 1):
        pattern = re.compile(rf"{re.escape(prefix)}\.{2 * stage}\.res_blocks\.(\d+)\.")
        depth = 1 + max((int(match[1]) for key in shapes if (match := pattern.match(key))), default=-1)
        if depth == 0:
            raise ValueError(f"{prefix}.{2 * stage} has no residual blocks, so this is no video autoencoder known here")
        blocks.append(["res_x", {"num_layers": depth}])
        if stage < len(names):
            options: dict[str, Any] = {"multiplier": multipliers[stage]}
            blocks.append([names[stage], {**options, "residual": True} if residual else options])
    return blocks


def _blocks(fields: Mapping[str, Any], key: str, known: frozenset[str]) -> tuple[BlockSpec, ...]:
    blocks = []
    for name, options in fields.get(key, ()):
        if name not in known:
            raise ValueError(f"vae.{key} names the block {name!r}; known are {', '.join(sorted(known))}")
        options = {"num_layers": options} if isinstance(options, int) else options
        widens = name == "res_x_y" or name.endswith(("_res", "_x_y"))
        blocks.append(
            BlockSpec(
                name=name,
                layers=options.get("num_layers", 1),
                multiplier=options.get("multiplier", 2 if widens else 1),
                residual=options.get("residual", False) and name == "compress_all",
                inject_noise=options.get("inject_noise", False),
            )
        )
    return tuple(blocks)


def _expect(fields: Mapping[str, Any], key: str, default: Any, known: tuple) -> Any:
    value = fields.get(key, default)
    if value not in known:
        raise ValueError(f"vae.{key} is {value!r}; known are {', '.join(map(str, known))}")
    return value


def _padding(mode: str) -> str:
    if mode not in PADDING_MODES:
        raise ValueError(f"vae spatial padding mode is {mode!r}; known are {', '.join(PADDING_MODES)}")
    return mode
