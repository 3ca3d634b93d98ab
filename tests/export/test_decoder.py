"""The traced graph computes what transformers computes, family by family, and what it cannot express is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from export.decoder import trace
from export.errors import UnsupportedModel, VerificationError
from export.loading import load_model
from export.optimize import optimize, save
from export.pipeline import Exported, ExportOptions, export_model
from export.probe import Layout, probe
from export.reference import make_prompts, run_reference
from export.runtime import SlotRuntime
from export.source import resolve
from export.verify import verify
from tests.export.checkpoints import VOCAB_SIZE, write_checkpoint


def test_fp32_is_transformers_to_the_last_digits(published: Exported) -> None:
    """A GPT-2 in slots has the logits and the greedy tokens of transformers up to its last position."""
    parity = published.parity
    assert parity["max_abs_logit_diff"] <= 1e-4
    assert parity["rms_over_std"] <= 1e-5
    assert parity["greedy_agreement"] == 1.0
    assert parity["nonfinite"] == 0
    assert parity["longest"] == 128
    assert {1, 2, 7, 31, 32, 33} <= set(parity["lengths"])


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        pytest.param("mistral", {"sliding_window": 16}, marks=pytest.mark.slow),
        # Soft-capped attention and logits, every other layer in a window, scaled embeddings.
        pytest.param(
            "gemma2",
            {"sliding_window": 16, "head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_families_by_one_method(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    """Other decoder families go through the same code and keep parity beyond their attention window."""
    checkpoint = write_checkpoint(tmp_path / family, family, **overrides)
    parity = export_model(ExportOptions(str(checkpoint), tmp_path / "repository")).parity
    assert parity["max_abs_logit_diff"] <= 2e-5
    assert parity["greedy_agreement"] == 1.0


@pytest.mark.slow
def test_a_wrong_window_is_noticed(tmp_path: Path) -> None:
    """Verification fails when the graph attends to more positions than the model does: it can fail at all."""
    source = resolve(str(write_checkpoint(tmp_path / "mistral", "mistral", sliding_window=16)))
    model = load_model(source)
    layout = probe(model)
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
        ("last_index", wide, ["rows"]),
        *cache,
    ]
    assert [_described(value) for value in graph.output] == [
        ("logits", real, ["rows", VOCAB_SIZE]),
        *((name.replace("past", "present"), kind, shape) for name, kind, shape in cache),
    ]
    assert sum(node.op_type == "GroupQueryAttention" for node in graph.node) == 2


def test_tied_weights_are_stored_once(published: Exported) -> None:
    """In fp32 the output embeddings share the input embeddings' matrix in the file."""
    initializers = onnx.load(published.path / "model.onnx").graph.initializer
    assert sum(VOCAB_SIZE in tensor.dims for tensor in initializers) == 1


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("bloom", {"n_head": 4, "n_layer": 2}, "position_ids"),
        ("gpt_oss", {"num_local_experts": 2, "head_dim": 16}, "'s_aux'"),
        ("llama", {"hidden_size": 48}, "multiple of 8"),
    ],
)
def test_what_the_graph_cannot_express_is_refused_by_name(family: str, overrides: dict[str, Any], reason: str) -> None:
    """Attention with biases, sinks or odd heads is recognised before tracing, and the sentence says what it is."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 64} if family != "bloom" else {}
    config = AutoConfig.for_model(family, **(sizes | overrides))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with pytest.raises(UnsupportedModel, match=reason):
        probe(model)


def test_a_layer_outside_the_interface_is_refused(llama: Path) -> None:
    """A layer that does not call the attention interface would ignore the cache: the count gives it away."""
    model = load_model(resolve(str(llama)))

    class Deaf(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
            return hidden_states, None

    model.model.layers[1].self_attn = Deaf()
    with pytest.raises(UnsupportedModel, match="2 layers but 1 calls"):
        probe(model)


def _described(value: onnx.ValueInfoProto) -> tuple[str, int, list[str | int]]:
    tensor = value.type.tensor_type
    return value.name, tensor.elem_type, [size.dim_param or size.dim_value for size in tensor.shape.dim]
