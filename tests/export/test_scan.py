"""Overflow in half precision is found where it happens, mended where it can be, and refused where not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnxscript import ir

from export import scan
from export.errors import VerificationError
from export.pipeline import ExportOptions, export_model
from export.scan import half_without_overflow
from tests.export.checkpoints import write_llama
from tests.export.drafts import Draft, draft, load, scale
from tests.export.strict import strict


@pytest.fixture(scope="module")
def hot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose second layer overflows fp16 inside: values near 100,000, scaled down again by the output's
    projection, so that the model computes what it would without.
    """
    checkpoint = write_llama(tmp_path_factory.mktemp("checkpoints") / "hot")
    model = load(checkpoint)
    scale(model.model.layers[1].self_attn.v_proj, 1e5)
    scale(model.model.layers[1].self_attn.o_proj, 1e-5)
    model.save_pretrained(checkpoint)
    return checkpoint


def test_an_overflow_is_found_named_and_mended(hot: Path, tmp_path: Path) -> None:
    """The layer that overflows stays fp32 and is named; the published entry's logits are finite and right."""
    exported = export_model(ExportOptions(str(hot), tmp_path, name="hot", precision="fp16"))
    manifest = json.loads((exported.path / "manifest.json").read_text())
    assert manifest["fp32_layers"] == ["model.layers.1"] == list(exported.fp32_layers)
    assert manifest["precision"] == "fp16" and manifest["graph"]["kv_dtype"] == "float16"
    assert exported.parity["nonfinite"] == 0 and exported.parity["rms_over_std"] <= 0.02
    assert manifest["largest_half"] < 65504 / scan.HEADROOM
    assert not (exported.path / "scan").exists()


@pytest.fixture(scope="module")
def hot_draft(hot: Path) -> Draft:
    """The same, traced."""
    return draft(load(hot))


@pytest.mark.slow
def test_without_the_scan_a_gpu_would_compute_nan(hot_draft: Draft, tmp_path: Path) -> None:
    """With every half value really rounded the plain fp16 graph computes NaN and the mended one the right logits."""
    given = hot_draft
    plain = given.graph.clone()
    scan.to_half(plain, "fp16")
    assert given.drift(strict(plain, ir.DataType.FLOAT16), tmp_path / "plain").nonfinite > 0
    mended = half_without_overflow(given.graph, "fp16", tmp_path, given.exercise)
    comparison = given.drift(strict(mended.graph, ir.DataType.FLOAT16), tmp_path / "mended")
    assert comparison.nonfinite == 0 and comparison.rms_over_std <= 0.02


@pytest.mark.slow
def test_a_residual_stream_that_overflows(tmp_path: Path) -> None:
    """Where only sums of the residual stream overflow, they stay fp32 and the products of every layer stay half."""
    model = load(write_llama(tmp_path / "stream"))
    model.model.embed_tokens.weight.data[:, 0] = 40_000.0
    given = draft(model)
    mended = half_without_overflow(given.graph, "fp16", tmp_path, given.exercise)
    assert mended.fp32_layers == ("model.layers.0", "model.layers.1")
    kinds = {node.op_type: node.outputs[0].dtype for node in mended.graph.graph}
    assert kinds["MatMul"] == kinds["GroupQueryAttention"] == ir.DataType.FLOAT16
    sums = [node for node in mended.graph.graph if node.op_type == "Add" and _is_stream(node)]
    assert len(sums) == 4 and all(node.outputs[0].dtype == ir.DataType.FLOAT for node in sums)


def _is_stream(node: ir.Node) -> bool:
    return all(
        value is not None and not value.is_initializer() and len(value.shape or ()) == 3 for value in node.inputs
    )


@pytest.mark.slow
def test_a_weight_beyond_fp16(tmp_path: Path) -> None:
    """A layer with a weight that fp16 cannot hold keeps that product in fp32 and is named."""
    model = load(write_llama(tmp_path / "heavy"))
    scale(model.model.layers[0].mlp.up_proj, 1e6)
    scale(model.model.layers[0].mlp.down_proj, 1e-6)
    given = draft(model)
    mended = half_without_overflow(given.graph, "fp16", tmp_path, given.exercise)
    assert mended.fp32_layers == ("model.layers.0",)
    assert given.drift(mended.graph, tmp_path / "mended").rms_over_std <= 0.02


def test_what_cannot_be_mended_is_refused(hot_draft: Draft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that still overflows after the last round is refused by the layer's name, and nothing is left behind."""
    monkeypatch.setattr(scan, "ROUNDS", 1)
    with pytest.raises(VerificationError, match=r"fp16 overflows in model\.layers\.1") as caught:
        half_without_overflow(hot_draft.graph, "fp16", tmp_path, hot_draft.exercise)
    assert "fp32" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_underflow_is_refused_by_its_drift(tmp_path: Path) -> None:
    """Values too small for fp16 vanish without any overflow: the drift tells, and nothing is published."""
    checkpoint = write_llama(tmp_path / "cold")
    model = load(checkpoint)
    for layer in model.model.layers:
        scale(layer.self_attn.v_proj, 1e-8)
        scale(layer.self_attn.o_proj, 1e8)
    model.save_pretrained(checkpoint)
    with pytest.raises(VerificationError, match=r"fp16 moves .* \(allowed: 2%\)"):
        export_model(ExportOptions(str(checkpoint), tmp_path / "repository", precision="fp16"))
    assert list((tmp_path / "repository").iterdir()) == []


def test_only_the_first_nan_is_a_cause(gpt2_draft: Draft) -> None:
    """NaN spreads to everything behind it; only the value where it began is blamed, and a sum never hides it."""
    half = gpt2_draft.graph.clone()
    scan.to_half(half, "fp16")
    names = [str(node.outputs[0].name) for node in half.graph if node.op_type == "MatMul"]
    ranges = dict.fromkeys(names, 1.0) | dict.fromkeys(names[3:], float("nan"))
    assert [value.name for value in scan.causes(half, ranges, 100.0)] == names[3:4]
    ranges |= {names[0]: 101.0}
    assert [value.name for value in scan.causes(half, ranges, 100.0)] == [names[0], names[3]]


def test_a_nan_anywhere_is_seen(llama_draft: Draft, tmp_path: Path) -> None:
    """One NaN in the middle of a row is in the range of its value, which ONNX Runtime's ReduceMax alone would lose."""
    given = llama_draft
    half = given.graph.clone()
    scan.to_half(half, "fp16")
    table = half.graph.initializers["model.model.embed_tokens.weight.fp16"]
    assert table.const_value is not None
    spoilt = table.const_value.numpy().copy()
    spoilt[given.references[0].prompt[0], 5] = np.nan
    table.const_value = ir.tensor(spoilt)
    ranges = scan.measure(half, "fp16", tmp_path / "scan", given.exercise, "cpu")
    last = next(node.outputs[0].name for node in reversed(half.graph) if node.op_type == "MatMul")
    assert np.isnan(ranges[str(last)]) and sum(np.isnan(reached) for reached in ranges.values()) > 20
    assert not (tmp_path / "scan").exists()


def test_the_scan_leaves_no_trace_in_the_graph(llama_draft: Draft, tmp_path: Path) -> None:
    """The graph that is published has neither the scan's output nor any of its nodes."""
    mended = half_without_overflow(llama_draft.graph, "fp16", tmp_path, llama_draft.exercise)
    assert "ranges" not in {value.name for value in mended.graph.graph.outputs}
    assert not {node.op_type for node in mended.graph.graph} & {"IsNaN", "ReduceMax", "Abs"}
    assert mended.fp32_layers == () and 0 < mended.largest < 100
