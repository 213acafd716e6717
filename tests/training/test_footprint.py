"""The memory estimate is made of what is really loaded."""

from __future__ import annotations

import pytest
import torch

from ltx2_tuner.cli.config_file import parse_with_config
from ltx2_tuner.cli.ltx2_train_network import build_parser
from ltx2_tuner.cli.training_config import training_config
from ltx2_tuner.training.footprint import batch_shapes, estimate, suited
from ltx2_tuner.training.sources import Processes, open_sources
from tests.training.tiny import Clip, make_trainer, write_workspace


@pytest.mark.parametrize("mode", ["video", "av"])
@pytest.mark.parametrize(("weights", "tolerance"), [([], 0.0), (["--fp8_base"], 0.05), (["--nf4_base"], 0.05)])
def test_the_estimate_matches_the_loaded_model(tmp_path, checkpoint, mode, weights, tolerance):
    space = write_workspace(tmp_path, checkpoint, [Clip(sound=17), Clip(grid=(1, 2, 2), sound=9)], batch_size=2)
    arguments = space.arguments("--ltx2_mode", mode, "--dit_dtype", "bfloat16", *weights)
    config = training_config(parse_with_config(build_parser(), arguments), "no")
    found = estimate(config, open_sources(config, Processes(torch.device("cpu"))))
    trainer = make_trainer(arguments)
    trained = {id(parameter) for parameter in trainer.run.network.parameters()}
    adapter_buffers = {id(buffer) for buffer in trainer.run.network.buffers()}
    tensors = [*trainer.run.model.parameters(), *trainer.run.model.buffers()]
    frozen = [tensor for tensor in tensors if id(tensor) not in trained | adapter_buffers]
    loaded = sum(tensor.numel() * tensor.element_size() for tensor in frozen)
    assert found.blocks * found.block + found.rest == pytest.approx(loaded, rel=max(tolerance, 0.002))
    values = sum(parameter.numel() for parameter in trainer.run.network.parameters())
    assert found.trained == (4 + 2 + 8) * values, "masters, working copies, two moments"
    assert found.gradients == 4 * values
    audio = 17 * 32 if mode == "av" else 0
    assert found.boundary == (3 * 2 * 2 * 64 + audio) * 2


def test_many_batch_shapes_share_a_compilation_unless_the_user_says_otherwise(tmp_path, checkpoint):
    clips = [Clip(grid=(frames, 2, 2)) for frames in (1, 2, 3, 4, 5)] + [Clip(grid=(5, 2, 2))]
    space = write_workspace(tmp_path, checkpoint, clips)

    def shapes(*more):
        config = training_config(
            parse_with_config(build_parser(), space.arguments("--ltx2_mode", "video", *more)), "no"
        )
        sources = open_sources(config, Processes(torch.device("cpu")))
        return config.compilation, len(set(batch_shapes(config, sources.training)))

    options, count = shapes()
    assert count == 5
    assert options.dynamic is False and suited(options, count).dynamic is True
    assert suited(options, 3) == options
    for typed, dynamic in (("false", False), ("true", True), ("auto", None)):
        options, count = shapes("--compile_dynamic", typed)
        assert options.dynamic is dynamic and suited(options, count) == options
