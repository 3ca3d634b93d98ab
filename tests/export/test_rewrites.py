"""What is done to a model before it is traced changes its form and not its arithmetic."""

from __future__ import annotations

import torch

from export.rewrites import prefill_chunk, rewrite
from tests.export.families import FAMILIES, Family, random_model

IDS = torch.arange(1, 12)[None]
BY_NAME = {family.name: family for family in FAMILIES}


def check(family: Family) -> None:
    model = random_model(family)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        rewrite(model)
        torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=1e-5, atol=1e-5)


def test_conv1d_experts_and_latent_keys_keep_their_logits() -> None:
    """A GPT-2, and a DeepSeek V3 with experts and latent attention, compute the same after the rewriting."""
    check(BY_NAME["gpt2"])
    check(BY_NAME["deepseek_v3"])


def test_growing_rotary_positions_are_fixed_below_their_length() -> None:
    """Within the length of the pre-training, dynamic rotary positions are the plain ones."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
    check(Family("llama", "", {"rope_parameters": rope}))


def test_the_chunk_is_cut_where_experts_are_large(monkeypatch) -> None:
    """A step gathers the experts of its tokens: as many tokens go into one as fit, at least one."""
    model = random_model(BY_NAME["mixtral"])
    expert = 4 * 3 * 64 * 128  # float32; gate, up and down
    for fitting, chunk in ((1000, 32), (5, 5), (0, 1)):
        monkeypatch.setattr("export.rewrites.GATHERED_BYTES", fitting * 2 * expert)  # two of them a token
        assert prefill_chunk(model, 32) == chunk
    assert prefill_chunk(random_model(BY_NAME["llama"]), 32) == 32
