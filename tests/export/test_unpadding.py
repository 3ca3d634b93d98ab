"""Products of live tokens only: the same numbers as the padded graph, whatever is live."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxscript import ir
from torch import nn

from export.encoder import trace
from export.optimize import optimize
from export.unpadding import compute_live_tokens_only

Numbers = npt.NDArray[np.int64]


class Tiny(nn.Module):  # type: ignore[misc]
    """Embeddings, one attention over live tokens, a residual, a normalisation, a masked state, and mean pooling."""

    output = "embedding"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.norm = nn.Embedding(50, 8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.o, self.up = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Embeddings float32 [rows, 8]."""
        states = self.norm(self.words(input_ids))
        scores = self.q(states) @ self.k(states).transpose(1, 2)
        scores = scores.masked_fill(attention_mask[:, None, :] == 0, torch.finfo(torch.float32).min)
        states = self.norm(states + self.o(torch.softmax(scores, -1) @ self.v(states)))
        live = attention_mask[:, :, None].float()
        # Masked in the middle, and read across tokens: what is no token's must be zero here.
        states = states + (nn.functional.gelu(self.up(states)) * live).sum(1, keepdim=True)
        return (states * live).sum(1) / live.sum(1).clamp(min=1.0)


@pytest.fixture(scope="module")
def sessions() -> tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession, ir.Model]:
    """The graph as traced, and rewritten."""
    made = []
    for rewrite in (False, True):
        model = trace(Tiny().eval(), ("input_ids", "attention_mask"), "tiny")
        optimize(model)
        if rewrite:
            assert compute_live_tokens_only(model, "attention_mask") == 5
        made.append(model)
    proto = ir.to_proto(made[1])
    onnx.checker.check_model(proto, full_check=True)
    before, after = (onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()) for model in made)
    return before, after, made[1]


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(0, 1000))
def test_the_numbers_are_the_same(
    sessions: tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession, ir.Model],
    live: list[list[bool]],
    seed: int,
) -> None:
    """For any mask, with dead rows and with holes, each row that has a live token comes out as before."""
    mask: Numbers = np.array(live, np.int64)
    ids = np.random.default_rng(seed).integers(0, 50, mask.shape)
    given_ = {"input_ids": ids, "attention_mask": mask}
    before, after = (session.run(None, given_)[0] for session in sessions[:2])
    assert np.isfinite(after).all()
    some = mask.any(axis=1)
    np.testing.assert_allclose(after[some], before[some], atol=2e-6)


def test_products_see_no_padding(
    sessions: tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession, ir.Model],
) -> None:
    """Every product with weights, and the residual and normalisation behind it, has the live tokens' shape."""
    graph = sessions[2].graph
    weighted = [
        n for n in graph if n.op_type == "MatMul" and n.inputs[1] is not None and n.inputs[1].const_value is not None
    ]
    assert len(weighted) == 5
    for node in weighted:
        assert node.outputs[0].shape is not None and str(node.outputs[0].shape[0]) == "live"
    shapes = [n.outputs[0].shape for n in graph if n.op_type == "LayerNormalization"]
    assert [len(shape) for shape in shapes if shape is not None] == [3, 2]


def test_a_graph_without_products_is_left_alone() -> None:
    """Nothing is rewritten where no product with weights looks at tokens."""

    class Bag(nn.Module):  # type: ignore[misc]
        output = "embedding"

        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(50, 8)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return (self.words(input_ids) * attention_mask[:, :, None]).sum(1)

    model = trace(Bag().eval(), ("input_ids", "attention_mask"), "bag")
    optimize(model)
    count = len(list(model.graph))
    assert compute_live_tokens_only(model, "attention_mask") == 0 and len(list(model.graph)) == count
