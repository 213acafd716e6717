"""Golden cases: one safetensors file each, tensors `in.*` are fed and `out.*` must come out.

A folder of cases is laid out like `tests/golden/data`: `<part>_<version>/<case>.safetensors`,
`common/<case>.safetensors` and the checkpoints `tiny_ltx2_<version>.safetensors` beside them. No size is known here:
sizes come from the `config` metadata of the checkpoints, from the `settings` metadata of a case and from its tensors.

A test names the cases it covers with `@golden("transformer_*/av_*", "!*/av_bf16")` and takes them through its `case`
argument; patterns that start with "!" take cases out again.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Case:
    """One case: its tensors without their `in.`/`out.` prefixes, and its scalar settings."""

    directory: Path
    name: str
    inputs: Mapping[str, torch.Tensor]
    outputs: Mapping[str, torch.Tensor]
    settings: Mapping[str, object]

    @property
    def version(self) -> str:
        """`20` or `23`: the suffix of the case's folder."""
        return self.name.split("/")[0].rsplit("_", 1)[-1]

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that the case was made with."""
        return checkpoint_path(self.directory, self.version)

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """Inputs below `prefix.`, without it: `group("video")` holds latent, sigma, timesteps, positions..."""
        return {name[len(prefix) + 1 :]: value for name, value in self.inputs.items() if name.startswith(prefix + ".")}


def golden(*patterns: str) -> pytest.MarkDecorator:
    """Mark a test as covering the cases that match a pattern and no "!" pattern; it is run once a case."""
    return pytest.mark.golden(*patterns)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether the marker arguments `patterns` take the case `name`."""
    wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns if not pattern.startswith("!"))
    return wanted and not any(fnmatch.fnmatchcase(name, pattern[1:]) for pattern in patterns if pattern.startswith("!"))


def case_names(directory: Path) -> list[str]:
    """Names of all case files below `directory`, such as `transformer_20/av_scalar_t`; checkpoints are no cases."""
    names = []
    for path in sorted(Path(directory).glob("*/*.safetensors")):
        with safe_open(path, "pt") as file:
            if any(key.startswith("out.") for key in file.keys()):  # noqa: SIM118 (not a dict)
                names.append(f"{path.parent.name}/{path.stem}")
    return names


def load_case(directory: Path, name: str) -> Case:
    """Read the case `name` (`<folder>/<case>`) of a folder of cases."""
    path = Path(directory) / f"{name}.safetensors"
    inputs, outputs = {}, {}
    with safe_open(path, "pt") as file:
        settings = json.loads((file.metadata() or {}).get("settings", "{}"))
        for key in file.keys():  # noqa: SIM118 (not a dict)
            kind, _, rest = key.partition(".")
            {"in": inputs, "out": outputs}[kind][rest] = file.get_tensor(key)
    return Case(Path(directory), name, inputs, outputs, settings)


def checkpoint_path(directory: Path, version: str) -> Path:
    """`tiny_ltx2_<version>.safetensors` of the folder; a missing one skips the test that asks."""
    path = Path(directory) / f"tiny_ltx2_{version}.safetensors"
    if not path.is_file():
        pytest.skip(f"no checkpoint {path.name} in {directory}")
    return path


def read_weights(path: Path, prefix: str, dtype: torch.dtype | None = torch.float32) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file below `prefix`, without it, cast to `dtype` (None: as stored)."""
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dict)
        return {name[len(prefix) :]: file.get_tensor(name).to(dtype or file.get_tensor(name).dtype) for name in names}


def read_config(path: Path) -> dict:
    """The `config` metadata of a checkpoint."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"])


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "") -> None:
    """Largest absolute difference at most `tolerance`, equal shapes, everything finite."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    difference = (actual.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    assert difference <= tolerance, f"{what}: differs by {difference:.3g}, allowed {tolerance:.3g}"
