from __future__ import annotations

import pytest

from ltx2_tuner.quantization import is_quantisable

BLOCK = "model.diffusion_model.transformer_blocks.0."


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        (BLOCK + "attn1.to_q.weight", (64, 64), True),
        (BLOCK + "audio_to_video_attn.to_out.0.weight", (64, 32), True),
        (BLOCK + "ff.net.0.proj.weight", (256, 64), True),
        ("transformer_blocks.3.audio_ff.net.2.weight", (32, 128), True),
        (BLOCK + "attn1.to_q.bias", (64,), False),
        (BLOCK + "attn1.q_norm.weight", (64,), False),
        (BLOCK + "attn1.to_gate_logits.weight", (4, 64), False),
        (BLOCK + "scale_shift_table", (6, 64), False),
        ("model.diffusion_model.proj_out.weight", (8, 64), False),
        ("model.diffusion_model.adaln_single.linear.weight", (384, 64), False),
        ("model.diffusion_model.video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q.weight", (64, 64), False),
        ("vae.decoder.conv_in.conv.weight", (32, 8, 3, 3, 3), False),
    ],
)
def test_only_the_matrices_of_the_blocks(name, shape, expected):
    assert is_quantisable(name, shape) is expected
