"""Sizes and switches of the transformer, from the `transformer` section of a checkpoint's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

VARIANTS = ("av", "video", "audio")

# Values the architecture is written for; any other one in a config means another model.
_GUARDS: dict[str, object] = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "qk_norm": "rms_norm",
    "standardization_norm": "rms_norm",
    "norm_elementwise_affine": False,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "only_cross_attention": False,
    "upcast_attention": False,
    "use_linear_projection": False,
    "share_ff": False,
    "num_vector_embeds": None,
    "num_embeds_ada_norm": 1000,
    "use_audio_video_cross_attention": True,
    "av_cross_ada_norm": True,
    "positional_embedding_type": "rope",
    "use_middle_indices_grid": True,
}
_ROPE_TYPES = ("split", "interleaved")
_TEXT_PATH_KEYS = (
    "caption_proj_before_connector",
    "caption_projection_first_linear",
    "caption_proj_input_norm",
    "caption_projection_second_linear",
)


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes in channels, limits in seconds and pixels; the defaults are those of the released LTX-2.0 model."""

    num_layers: int = 48
    num_heads: int = 32
    head_dim: int = 128
    audio_head_dim: int = 64
    in_channels: int = 128
    out_channels: int = 128
    audio_in_channels: int = 128
    audio_out_channels: int = 128
    cross_attention_dim: int = 4096
    audio_cross_attention_dim: int = 2048
    caption_channels: int = 3840
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_max_positions: tuple[float, ...] = (20, 2048, 2048)
    audio_rope_max_positions: tuple[float, ...] = (20,)
    rope_type: str = "split"
    double_precision_frequencies: bool = True
    timestep_scale: float = 1000.0
    gate_timestep_scale: float = 1000.0
    cross_attention_adaln: bool = False
    apply_gated_attention: bool = False
    caption_proj_before_connector: bool = False
    ff_bias: bool = True
    audio_ff_bias: bool = True
    use_prompt_adaln: bool = True
    use_keyframe_embedding: bool = False

    def __post_init__(self) -> None:
        if self.rope_type not in _ROPE_TYPES:
            raise ValueError(f"rope_type is {self.rope_type!r}; known are {', '.join(_ROPE_TYPES)}")
        if self.head_dim % 2 or self.audio_head_dim % 2:
            raise ValueError(f"head widths must be even, got {self.head_dim} and {self.audio_head_dim}")
        if self.audio_cross_attention_dim != self.audio_width:
            raise ValueError(
                f"audio_cross_attention_dim is {self.audio_cross_attention_dim}, "
                f"but {self.num_heads} heads of {self.audio_head_dim} make {self.audio_width}"
            )

    @classmethod
    def from_dict(cls, section: Mapping[str, object]) -> TransformerConfig:
        """Read the `transformer` section of a config.

        Raises:
            ValueError: a key holds a value that belongs to another architecture; the message names key and value.
        """
        _check_guards(section)
        return cls(
            num_layers=section.get("num_layers", 48),
            num_heads=section.get("num_attention_heads", 32),
            head_dim=section.get("attention_head_dim", 128),
            audio_head_dim=section.get("audio_attention_head_dim", 64),
            in_channels=section.get("in_channels", 128),
            out_channels=section.get("out_channels", 128),
            audio_in_channels=section.get("audio_in_channels", 128),
            audio_out_channels=section.get("audio_out_channels", 128),
            cross_attention_dim=section.get("cross_attention_dim", 4096),
            audio_cross_attention_dim=section.get("audio_cross_attention_dim", 2048),
            caption_channels=section.get("caption_channels", 3840),
            norm_eps=section.get("norm_eps", 1e-6),
            rope_theta=section.get("positional_embedding_theta", 10000.0),
            rope_max_positions=tuple(section.get("positional_embedding_max_pos", (20, 2048, 2048))),
            audio_rope_max_positions=tuple(section.get("audio_positional_embedding_max_pos", (20,))),
            rope_type=section.get("rope_type", "split"),
            double_precision_frequencies=section.get("frequencies_precision", "float64") == "float64",
            timestep_scale=section.get("timestep_scale_multiplier", 1000.0),
            gate_timestep_scale=section.get("av_ca_timestep_scale_multiplier", 1000.0),
            cross_attention_adaln=section.get("cross_attention_adaln", False),
            apply_gated_attention=section.get("apply_gated_attention", False),
            caption_proj_before_connector=_projects_captions_before(section),
            ff_bias=section.get("ff_bias", True),
            audio_ff_bias=section.get("audio_ff_bias", True),
            use_prompt_adaln=section.get("use_prompt_adaln_single", True),
            use_keyframe_embedding=section.get("use_keyframes_abs_pos_embedding", False),
        )

    @property
    def video_width(self) -> int:
        """Channels of a video token inside the model."""
        return self.num_heads * self.head_dim

    @property
    def audio_width(self) -> int:
        """Channels of an audio token inside the model."""
        return self.num_heads * self.audio_head_dim

    @property
    def modulation_rows(self) -> int:
        """Rows of a block's modulation table: 6, or 9 when the text queries are modulated too."""
        return 9 if self.cross_attention_adaln else 6

    def context_width(self, stream: str) -> int:
        """Channels of the text context that `forward` expects for the stream "video" or "audio"."""
        if not self.caption_proj_before_connector:
            return self.caption_channels
        return {"video": self.cross_attention_dim, "audio": self.audio_cross_attention_dim}[stream]


def _check_guards(section: Mapping[str, object]) -> None:
    for key, expected in _GUARDS.items():
        if section.get(key, expected) != expected:
            raise ValueError(f"transformer config: {key} is {section[key]!r}, this model needs {expected!r}")
    heads, audio_heads = section.get("num_attention_heads", 32), section.get("audio_num_attention_heads", 32)
    if "audio_num_attention_heads" in section and heads != audio_heads:
        raise ValueError(
            f"transformer config: audio_num_attention_heads is {audio_heads}, but num_attention_heads is {heads}"
        )


def _projects_captions_before(section: Mapping[str, object]) -> bool:
    """True for the 2.3 text path (captions are projected before the connectors), False for that of 2.0.

    Re-packed files may keep only some of the four keys: any of them with its 2.3 value means 2.3.
    """
    present = {key: section[key] for key in _TEXT_PATH_KEYS if key in section}
    if not present:
        return False
    before = present.pop("caption_proj_before_connector", True)
    wrong = [key for key, value in present.items() if value]
    if not before:
        wrong.append("caption_proj_before_connector")
    if wrong:
        values = ", ".join(f"{key}={section[key]!r}" for key in wrong)
        raise ValueError(f"transformer config: unknown text path, {values}")
    return True
