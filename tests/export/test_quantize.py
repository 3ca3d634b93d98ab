"""int8 weights: the numbers themselves, and the exported model."""

from __future__ import annotations

import numpy as np
import onnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from export.pipeline import Exported
from export.quantize import int8_matrix

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
