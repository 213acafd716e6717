"""The set of adapters of one transformer: create, put in place, switch, load, and hand out their state."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltx2_tuner.errors import UserError
from ltx2_tuner.lora.formats import LoRAFile, LoRAMatrices
from ltx2_tuner.lora.layer import LoRAAdapter, LoRALinear
from ltx2_tuner.lora.names import NameTable, kohya_name
from ltx2_tuner.lora.targets import linear_layers

logger = logging.getLogger(__name__)
_SHOWN = 5  # names listed in a message


@dataclass(frozen=True)
class Dropouts:
    """Probabilities in [0, 1) of the three dropouts (06 section 6.3), all of them active in training only."""

    element: float = 0.0
    rank: float = 0.0
    module: float = 0.0


class LoRANetwork(nn.Module):
    """Adapters for some linear layers of a transformer.

    Its state dict is the kohya form: `lora_unet_model_<path>.lora_down.weight`, `.lora_up.weight`, `.alpha`. The
    transformer is not a part of it; `attach` puts each adapter beside its layer, `detach` takes all of them away.

    Args:
        layers: path -> linear layer, as `targets.select_layers` gives them.
        ranks: rank of each path, or one for all.
        alphas: alpha of each path, or one for all; None or 0 means the rank.
        seed: adapters start from a generator of (seed, layer name), so a layer's start does not depend on the others.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        ranks: int | Mapping[str, int],
        alphas: float | Mapping[str, float] | None = None,
        *,
        dropouts: Dropouts | None = None,
        multiplier: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        dropouts = dropouts or Dropouts()
        self.paths: dict[str, str] = {}  # kohya name -> path
        self._wrappers: dict[str, tuple[nn.Module, str, LoRALinear]] = {}
        for path, layer in layers.items():
            rank = ranks[path] if isinstance(ranks, Mapping) else ranks
            alpha = alphas[path] if isinstance(alphas, Mapping) else alphas
            adapter = LoRAAdapter(
                layer.in_features,
                layer.out_features,
                rank,
                alpha,
                dropout=dropouts.element,
                rank_dropout=dropouts.rank,
                module_dropout=dropouts.module,
            )
            name = kohya_name(path)
            adapter.initialise(generator_for(seed, name))
            self.add_module(name, adapter)
            self.paths[name] = path
        self.set_multiplier(multiplier)

    @classmethod
    def from_file(
        cls,
        model: nn.Module,
        lora: LoRAFile,
        *,
        multiplier: float = 1.0,
        dropouts: Dropouts | None = None,
    ) -> LoRANetwork:
        """A network whose layers, ranks and alphas come from a file, trained values included.

        Args:
            model: the transformer; layers of the file that it lacks (connectors, sound of a video-only model) are
                counted in the log and left out.

        Raises:
            UserError: nothing in the file fits the model, or a layer's sizes differ.
        """
        layers = {path: layer for path, layer in linear_layers(model) if path in lora.modules}
        if not layers:
            raise UserError(
                f"{lora.source}: none of its {len(lora.modules) + len(lora.unknown)} modules is a layer of this model; "
                "it was made for another model"
            )
        left_out = len(lora.modules) + len(lora.unknown) - len(layers)
        if left_out:
            logger.warning("%s: %d modules have no layer here and are left out", lora.source, left_out)
        ranks = {path: lora.modules[path].rank for path in layers}
        alphas = {path: lora.modules[path].alpha for path in layers}
        network = cls(layers, ranks, alphas, dropouts=dropouts, multiplier=multiplier)
        network._assign({path: lora.modules[path] for path in layers}, lora.source)
        return network

    # -- access

    def adapters(self) -> Iterator[tuple[str, LoRAAdapter]]:
        """Path and adapter of every layer."""
        for name, path in self.paths.items():
            yield path, self.get_submodule(name)

    def matrices(self) -> dict[str, LoRAMatrices]:
        """Path -> the current matrices (no copies), for the writers of `formats`."""
        return {
            path: LoRAMatrices(a.lora_down.weight.detach(), a.lora_up.weight.detach(), a.alpha_value)
            for path, a in self.adapters()
        }

    @property
    def has_dropout(self) -> bool:
        """True when forwards in training draw random masks, which recomputation has to see again."""
        return any(a.dropout or a.rank_dropout or a.module_dropout for _, a in self.adapters())

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    # -- in and out of the transformer

    def attach(self, model: nn.Module) -> LoRANetwork:
        """Put every adapter beside its layer; more than one network can be attached, their sums add up."""
        if self._wrappers:
            raise RuntimeError("the network is attached already")
        for path, adapter in self.adapters():
            parent_path, _, child = path.rpartition(".")
            parent = model.get_submodule(parent_path)
            wrapper = LoRALinear(getattr(parent, child), adapter)
            wrapper.train(adapter.training)
            setattr(parent, child, wrapper)
            self._wrappers[path] = (parent, child, wrapper)
        return self

    def detach(self) -> None:
        """Give the transformer its own layers back (networks attached later have to be detached before)."""
        for parent, child, wrapper in self._wrappers.values():
            if getattr(parent, child) is not wrapper:
                raise RuntimeError(f"{child}: detach the network that was attached after this one first")
            setattr(parent, child, wrapper.base)
        self._wrappers = {}

    # -- switches

    def set_multiplier(self, multiplier: float) -> None:
        """Strength of the whole network, any sign; 0 is as good as off."""
        self.multiplier = multiplier
        for _, adapter in self.adapters():
            adapter.multiplier = multiplier

    def set_enabled(self, enabled: bool) -> None:
        """Switch all adapters on or off without touching their values."""
        for _, adapter in self.adapters():
            adapter.enabled = enabled

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The plain model within the block; on again afterwards even after an exception."""
        before = {path: adapter.enabled for path, adapter in self.adapters()}
        self.set_enabled(False)
        try:
            yield
        finally:
            for path, adapter in self.adapters():
                adapter.enabled = before[path]

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """The dtype adapters multiply in; None follows autocast, or else the parameters' dtype."""
        for _, adapter in self.adapters():
            adapter.compute_dtype = dtype

    # -- values

    def load(self, lora: LoRAFile) -> None:
        """Start from a file's values; alphas that differ are folded in, so the strength stays that of the file.

        Sound layers may be missing on either side (a warning says so).

        Raises:
            UserError: another layer is missing or surplus, or ranks or sizes differ; the first few are named.
        """
        mine = dict(self.adapters())
        shared = {path: module for path, module in lora.modules.items() if path in mine}
        missing = [path for path in mine if path not in shared]
        surplus = [path for path in lora.modules if path not in mine] + list(lora.unknown)
        lacking = [path for path in missing if "audio_" not in path]
        if lacking or not shared:
            raise UserError(
                f"{lora.source}: it lacks modules of this network ({_some(lacking or missing)}); "
                "use the preset and mode it was trained with, or --dim_from_weights"
            )
        wrong = {path: shared[path].rank for path in shared if shared[path].rank != mine[path].rank}
        if wrong:
            listed = _some([f"{path}: {rank}" for path, rank in wrong.items()])
            raise UserError(
                f"{lora.source}: its ranks differ from the network's {mine[next(iter(wrong))].rank} ({listed}); "
                "set --network_dim to its rank or add --dim_from_weights"
            )
        if missing:
            logger.warning("%s has no sound modules for %s; they start fresh", lora.source, _some(missing))
        if surplus:
            logger.warning("%s has modules that this network lacks, ignored: %s", lora.source, _some(surplus))
        self._assign(shared, lora.source)

    def start_from(self, values: Mapping[str, tuple[Tensor, Tensor]]) -> int:
        """Start adapters from (down (r, in), up (out, r)) whose plain product they are to add (LoftQ).

        Args:
            values: by layer path; fewer ranks than the adapter's leave the rest at zero.

        Returns:
            The number of adapters that start from them.

        Raises:
            UserError: none of the layers has an adapter here, or a product has more ranks than the adapter.
        """
        adapters = {path: adapter for path, adapter in self.adapters() if path in values}
        if not adapters:
            raise UserError("--loftq_init: none of the start values belongs to a layer of this network")
        for path, adapter in adapters.items():
            down, up = values[path]
            missing = adapter.rank - down.shape[0]
            if missing < 0:
                raise UserError(f"--loftq_init: found start values for rank {down.shape[0]}, not {adapter.rank}")
            down, up = F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing))
            adapter.assign(down, up, float(adapter.rank))
        return len(adapters)

    def _assign(self, modules: Mapping[str, LoRAMatrices], source: str) -> None:
        adapters = dict(self.adapters())
        for path, module in modules.items():
            adapter = adapters[path]
            expected = (adapter.out_features, adapter.in_features)
            found = (module.up.shape[0], module.down.shape[1])
            if expected != found:
                raise UserError(
                    f"{source}: {path} is for a layer of size {found[0]}x{found[1]}, the model's is "
                    f"{expected[0]}x{expected[1]}; the file was made for another model"
                )
            adapter.assign(module.down, module.up, module.alpha)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        """As torch's, and each adapter's scale follows the alpha that was loaded."""
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        for _, adapter in self.adapters():
            known = torch.tensor(adapter.alpha_value, dtype=adapter.alpha.dtype)
            if float(adapter.alpha) != float(known):  # a buffer in bf16 rounds the alpha it was made from
                adapter.alpha_value = float(adapter.alpha)
        return result

    @torch.no_grad()
    def scale_weight_norms(self, limit: float) -> dict[str, Tensor]:
        """Shrink adapters whose norm n = ‖alpha/r · up·down‖ exceeds `limit` to it (06 section 6.3).

        Returns:
            0-d tensors on the adapters' device: `keys_scaled`, `average_key_norm`, `max_key_norm` (after scaling).
        """
        norms = []
        for _, adapter in self.adapters():
            down, up = adapter.lora_down.weight.float(), adapter.lora_up.weight.float()
            gram = (up.t() @ up) * (down @ down.t())  # sum of it = squared Frobenius norm of up·down
            norms.append(abs(adapter.scale) * gram.sum().clamp_min(0).sqrt())
        norm = torch.stack(norms)
        floor = norm.clamp_min(limit / 2)
        ratio = floor.clamp_max(limit) / floor
        for (_, adapter), root in zip(self.adapters(), ratio.sqrt().unbind()):
            adapter.lora_down.weight.mul_(root)
            adapter.lora_up.weight.mul_(root)
        scaled = norm * ratio
        return {
            "keys_scaled": (ratio != 1).sum(),
            "average_key_norm": scaled.mean(),
            "max_key_norm": scaled.max(),
        }


def generator_for(seed: int, name: str) -> torch.Generator:
    """The CPU generator of the `init` stream for one module (06 section 12)."""
    digest = hashlib.sha256(f"{seed}/init/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def table_of(model: nn.Module) -> NameTable:
    """The name table of a model's own linear layers."""
    return NameTable([path for path, _ in linear_layers(model)], exact=True)


def _some(names: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
