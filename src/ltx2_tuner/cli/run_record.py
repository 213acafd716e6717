"""What a training run leaves for people to look at: the CSV of its numbers and the page made from it."""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ltx2_tuner import __version__
from ltx2_tuner.sampling.prompts import read_prompts
from ltx2_tuner.training.report import RunFacts, find_samples, write_report
from ltx2_tuner.training.run_log import RunLog, read_log
from ltx2_tuner.training.sources import Processes, TrainingConfig

logger = logging.getLogger(__name__)
_SECRETS = ("--huggingface_token", "--wandb_api_key")
_PACKAGES = ("torch", "torchaudio", "accelerate", "transformers", "bitsandbytes", "safetensors", "av")


class RunRecord:
    """`<output_name>.log.csv` while the run goes on, `<output_name>.report.html` when it is over.

    Args:
        command: the words of the command line.
    """

    def __init__(
        self, args: argparse.Namespace, config: TrainingConfig, processes: Processes, command: Sequence[str]
    ) -> None:
        self._args, self._config, self._processes, self._command = args, config, processes, command
        self._started = time.strftime("%Y%m%d%H%M%S")
        self.log = RunLog(self._path(".log.csv"))

    def _path(self, suffix: str) -> Path:
        save = self._config.save
        return save.output_dir / f"{save.output_name}{suffix}"

    def close(self) -> None:
        """Write the page; one that fails to be written is no reason to fail a run."""
        try:
            if self.log.has_rows and not self._args.no_report:
                self._report()
        except Exception:
            logger.exception("the run's report could not be written")

    def _report(self) -> None:
        config = self._config
        samples = find_samples(config.save.output_dir / "sample", config.save.output_name)
        since = min([self._started, *(_digits(row["time"]) for row in read_log(self.log.path)[:1])])
        prompts = [prompt.prompt for prompt in read_prompts(self._args.sample_prompts)] if samples else []
        settings = self._path(".config.toml")
        facts = RunFacts(
            name=config.save.output_name,
            command=["python", *without_secrets(self._command)],
            versions=versions(),
            settings=settings.read_text(encoding="utf-8") if settings.is_file() else "",
            prompts=prompts,
            facts=self._facts(),
        )
        page = self._path(".report.html")
        write_report(page, self.log.path, facts, [sample for sample in samples if sample.time >= since])
        logger.info("report: %s", page)

    def _facts(self) -> dict[str, str]:
        device = self._processes.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or str(device)
        return {
            "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
            "device": name if self._processes.count == 1 else f"{self._processes.count} x {name}",
            "seed": str(self._config.loop.seed),
            "checkpoint": self._config.checkpoint.name,
        }


def _digits(timestamp: object) -> str:
    return "".join(character for character in str(timestamp) if character.isdigit())


def without_secrets(command: Sequence[str]) -> list[str]:
    """The words with the values of tokens and keys replaced by ***."""
    words, hide = [], False
    for word in map(str, command):
        flag = word.split("=", 1)[0]
        words.append("***" if hide else f"{flag}=***" if flag in _SECRETS and "=" in word else word)
        hide = not hide and word in _SECRETS
    return words


def versions() -> dict[str, str]:
    """The suite, Python, the system and the packages that results depend on."""
    found = {"ltx2-tuner": __version__, "Python": platform.python_version(), "system": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    return found
