"""int8 weights: the numbers themselves, and the exported model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from export.convert import check_weights
from export.errors import UnsupportedModel
from export.optimize import save
from export.pipeline import Exported, ExportOptions, export_model
from export.quantize import int8_matrix, quantize_int8
from export.resources import needs
from export.runtime import SlotRuntime
from export.source import resolve
from export.verify import verify
from tests.export.checkpoints import write_family
from tests.export.drafts import Draft
from tests.export.families import FAMILIES

_VALUES = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=_VALUES))
def test_every_weight_is_within_half_a_step(weight: np.ndarray) -> None:
    """Each column's int8 values times its scale are within half a step, whatever the other columns hold."""
    matrix, scales = int8_matrix(weight)
    assert matrix.dtype == np.int8 and scales.shape == (weight.shape[1],)
    assert matrix.min() >= -127
    assert np.isfinite(scales).all() and (scales > 0).all()
    error = np.abs(matrix.astype(np.float64) * scales - weight)
    assert (error <= scales * 0.501).all()


def test_every_matrix_is_int8(published_llama: Exported) -> None:
    """No fp32 product is left, the output embeddings' included, and the weights are int8 without zero points."""
    graph = onnx.load(published_llama.path / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    weights = {tensor.name: tensor for tensor in graph.initializer}
    assert kinds.count("MatMulInteger") == 2 * 7 + 1
    # What remains multiplies positions by rotary frequencies: no weights.
    products = [name for node in graph.node if node.op_type in ("MatMul", "Gemm") for name in node.input]
    assert not any(name in weights for name in products)
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            assert weights[node.input[1]].data_type == onnx.TensorProto.INT8
            assert len(node.input) == 3


def test_int8_drift_and_batch_effect_are_measured(published_llama: Exported) -> None:
    """int8 stays within its tolerance, differs from fp32 at all, and its dependence on the batch is on record."""
    parity = published_llama.parity
    assert 0 < parity["rms_over_std"] <= 0.06
    assert parity["batch_effect"] > 0
    assert parity["nonfinite"] == 0


def test_scales_for_each_row_leave_no_batch_effect(gpt2_draft: Draft, tmp_path: Path) -> None:
    """With a scale for each row an int8 row's logits are the same alone and in a batch, and drift no more."""
    graph = gpt2_draft.graph.clone()
    quantize_int8(graph, per_row=True)
    save(graph, tmp_path)
    parity = verify(SlotRuntime(tmp_path / "model.onnx", 8), gpt2_draft.references, "int8", 16)
    assert parity["batch_effect"] == 0.0
    assert 0 < parity["rms_over_std"] <= 0.06


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("family", ["qwen3_moe", "jetmoe"])
def test_experts_are_not_left_in_fp32_silently(tmp_path: Path, family: str, precision: str) -> None:
    """A mixture whose experts the quantisers would skip is refused by name before any work, and fp16 is suggested."""
    mixture = next(known for known in FAMILIES if known.name == family)
    folder = write_family(tmp_path / "model", mixture)
    with pytest.raises(UnsupportedModel, match=r"a mixture's experts .* would stay fp32") as caught:
        export_model(ExportOptions(str(folder), tmp_path / "repository", precision=precision))
    assert "--precision fp16" in str(caught.value.hint) and not (tmp_path / "repository").exists()
    source = resolve(str(folder))
    check_weights(source, "fp16", "fp32")
    experts = 4 * sum(tensor.elements for tensor in source.stacked)
    assert needs(source, precision, 64).disk > experts + (4 * source.parameters() - experts) / 8


def test_a_dense_model_has_nothing_stacked(llama: Path) -> None:
    """Only experts count: a model without them is quantised whole."""
    assert resolve(str(llama)).stacked == ()
