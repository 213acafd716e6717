"""What the network group of the command line says (08 section 5.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

BUILT_IN = "networks.lora_ltx2"
LYCORIS = "lycoris.kohya"


@dataclass(frozen=True)
class NetworkOptions:
    """Everything that decides which network is trained and what it starts from.

    Attributes:
        module: dotted name of the network module (kohya protocol).
        dim: rank.
        alpha: the scale is alpha/dim.
        dropout: element dropout of down(x), None for off.
        args: `--network_args` as typed, key -> text.
        preset: the target preset that holds when `args` has no include_patterns.
        weights: file to start from.
        dim_from_weights: layers, ranks and alphas come from `weights`.
        scale_weight_norms: limit of each adapter's norm, None for off.
        base_weights: LoRA files merged into the checkpoint before training, with their multipliers.
        lycoris_config, init_lokr_norm: LyCORIS only.
    """

    module: str = BUILT_IN
    dim: int = 32
    alpha: float = 32.0
    dropout: float | None = None
    args: Mapping[str, str] = field(default_factory=dict)
    preset: str = "t2v"
    weights: Path | None = None
    dim_from_weights: bool = False
    scale_weight_norms: float | None = None
    base_weights: tuple[tuple[Path, float], ...] = ()
    lycoris_config: Path | None = None
    init_lokr_norm: float | None = None

    @property
    def is_built_in(self) -> bool:
        return self.module == BUILT_IN

    @property
    def is_lycoris(self) -> bool:
        return self.module == LYCORIS
