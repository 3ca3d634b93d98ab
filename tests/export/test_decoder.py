"""The traced graph computes what transformers computes, family by family, and what it cannot express is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest
import torch

from export.decoder import trace, with_positions
from export.errors import UnsupportedModel, VerificationError
from export.loading import load_model
from export.optimize import optimize, save
from export.pipeline import Exported
from export.probe import AttentionLayer, Layout, probe
from export.reference import make_prompts, run_reference
from export.runtime import SlotRuntime
from export.source import resolve
from export.verify import verify
from tests.export.checkpoints import VOCAB_SIZE, write_checkpoint
from tests.export.families import REFUSED, random_model


def test_fp32_is_transformers_to_the_last_digits(published: Exported) -> None:
    """A GPT-2 in slots has the logits and the greedy tokens of transformers up to its last position."""
    parity = published.parity
    assert parity["max_abs_logit_diff"] <= 1e-4
    assert parity["rms_over_std"] <= 1e-5
    assert parity["greedy_agreement"] == 1.0
    assert parity["nonfinite"] == 0
    assert parity["longest"] == 128
    assert {1, 2, 7, 31, 32, 33} <= set(parity["lengths"])


@pytest.mark.slow
def test_a_wrong_window_is_noticed(tmp_path: Path) -> None:
    """Verification fails when the graph attends to more positions than the model does: it can fail at all."""
    source = resolve(str(write_checkpoint(tmp_path / "mistral", "mistral", sliding_window=16)))
    model = load_model(source)
    layout = probe(model, 128)
    assert [layer.sliding_window for layer in layout.layers] == [16, 16]
    references = run_reference(model, make_prompts((1, 7, 60), VOCAB_SIZE, []), 4)
    wrong = Layout(tuple(dataclasses.replace(layer, sliding_window=None) for layer in layout.layers))
    graph = trace(model, wrong, 128)
    optimize(graph)
    save(graph, tmp_path)
    with pytest.raises(VerificationError, match="differ from transformers"):
        verify(SlotRuntime(tmp_path / "model.onnx", 4), references, "fp32", chunk=16)


def test_graph_keeps_the_contract(published: Exported) -> None:
    """Names, types and dimensions of the graph's inputs and outputs are those that the backend binds."""
    graph = onnx.load(published.path / "model.onnx").graph
    integer, wide, real = onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    cache = [
        (f"{kind}_{layer}", real, ["rows", 4, 128, 16]) for layer in range(2) for kind in ("past_key", "past_value")
    ]
    assert [_described(value) for value in graph.input] == [
        ("input_ids", wide, ["rows", "seq"]),
        ("position_ids", wide, ["rows", "seq"]),
        ("seqlens_k", integer, ["rows"]),
        ("total_sequence_length", integer, []),
        ("last_index", wide, ["rows", "picks"]),
        *cache,
    ]
    assert [_described(value) for value in graph.output] == [
        ("logits", real, ["rows*picks", VOCAB_SIZE]),
        *((name.replace("past", "present"), kind, shape) for name, kind, shape in cache),
    ]
    assert sum(node.op_type == "GroupQueryAttention" for node in graph.node) == 2


def test_tied_weights_are_stored_once(published: Exported) -> None:
    """In fp32 the output embeddings share the input embeddings' matrix in the file."""
    initializers = onnx.load(published.path / "model.onnx").graph.initializer
    assert sum(VOCAB_SIZE in tensor.dims for tensor in initializers) == 1


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_graph_cannot_express_is_refused_by_name(what: str) -> None:
    """A family that the method does not carry is recognised before tracing, and the sentence says why."""
    with pytest.raises(UnsupportedModel, match=REFUSED[what].message):
        probe(random_model(REFUSED[what].family), 128)


def test_keys_that_hold_their_position_are_alibi() -> None:
    """Two more dimensions of a head give the scores that adding slope × position gives, up to a constant a query."""
    layer = AttentionLayer(0, 3, 1, 16, 16, 0.25, 0.0, None, alibi=(0.5, 0.0625, 0.3))
    query, key = torch.randn(1, 3, 1000, 16), torch.randn(1, 1, 1000, 16)
    positions = torch.arange(1000)[None]
    bias = torch.tensor(layer.alibi)[:, None, None] * positions
    expected = layer.scale * query @ key.transpose(2, 3) + bias
    queries, keys = with_positions(query, key, positions, layer)
    torch.testing.assert_close(layer.scale * queries @ keys.transpose(2, 3), expected, rtol=1e-5, atol=1e-3)
    assert torch.equal(keys.bfloat16().float()[..., 16:], keys[..., 16:])  # exact in the coarsest cache


def test_a_layer_outside_the_interface_is_refused(llama: Path) -> None:
    """A layer that does not call the attention interface would ignore the cache: the count gives it away."""
    model = load_model(resolve(str(llama)))

    class Deaf(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
            return hidden_states, None

    model.model.layers[1].self_attn = Deaf()
    with pytest.raises(UnsupportedModel, match="2 layers but 1 calls"):
        probe(model, 128)


def _described(value: onnx.ValueInfoProto) -> tuple[str, int, list[str | int]]:
    tensor = value.type.tensor_type
    return value.name, tensor.elem_type, [size.dim_param or size.dim_value for size in tensor.shape.dim]
