"""Rounding to blocks of few integers: never worse than nearest, better with a calibration text's second moments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from export import rounding
from export.int4 import packed_matrix
from export.rounding import INT8, Levels, best_scales, restored, rounded

INT4 = Levels(-8, 7, 32)
_VALUES = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


def _matrix(inputs: int = 100, outputs: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(seed))


def _moments(inputs: int = 100) -> torch.Tensor:
    """Second moments of correlated inputs of very different sizes, as activations are."""
    generator = torch.Generator().manual_seed(1)
    mixing = (
        torch.randn(inputs, inputs, generator=generator)
        * torch.logspace(-1, 1, inputs)[torch.randperm(inputs, generator=generator)]
    )
    texts = torch.randn(4 * inputs, inputs, generator=generator) @ mixing
    return texts.T @ texts / len(texts)


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=_VALUES))
def test_scales_are_usable_whatever_the_weights(weight: np.ndarray) -> None:
    """Integers are in range and every restored weight is finite and no further off than the largest weight."""
    integers, scales = rounded(torch.from_numpy(weight), INT4)
    assert integers.min() >= -8 and integers.max() <= 7
    assert np.isfinite(scales).all() and (scales != 0).all()
    error = (restored(integers, scales, INT4) - torch.from_numpy(weight)).abs()
    assert (error <= float(np.abs(weight).max()) + 1e-30).all()


def test_the_side_with_one_integer_more_is_used() -> None:
    """With −8 … 7 every column's scale is at least as good as the largest weight over 7, and better on the whole."""
    weight = _matrix(32, 200)
    plain = weight.abs().amax(0) / 7

    def error(scales: torch.Tensor) -> torch.Tensor:
        return ((weight / scales).round().clamp(-8, 7) * scales - weight).square().sum(0)

    chosen = error(best_scales(weight, INT4, torch.ones(32)))
    assert (chosen <= error(plain) * (1 + 1e-5)).all()
    assert chosen.sum() < 0.95 * error(plain).sum()


@pytest.mark.parametrize("levels", [INT8, INT4, Levels(-128, 127, 32)], ids=["int8", "int4", "8 bit blocks"])
@pytest.mark.parametrize("inputs", [64, 100, 300])
def test_moments_lower_the_outputs_error(levels: Levels, inputs: int) -> None:
    """With the inputs' second moments the product's error on such inputs is smaller than by rounding to nearest."""
    weight, moments = _matrix(inputs), _moments(inputs)

    def error(integers: torch.Tensor, scales: torch.Tensor) -> float:
        change = restored(integers, scales, levels) - weight
        return float((change * (moments @ change)).sum())

    assert error(*rounded(weight, levels, moments)) < 0.8 * error(*rounded(weight, levels))


def test_inputs_that_the_text_never_used() -> None:
    """Moments with zero rows, or all zero, give finite scales and leave the unused inputs represented."""
    weight, moments = _matrix(), _moments()
    moments[:10] = 0
    moments[:, :10] = 0
    for given_moments in (moments, torch.zeros_like(moments)):
        integers, scales = rounded(weight, INT4, given_moments)
        assert torch.isfinite(scales).all()
        change = restored(integers, scales, INT4) - weight
        assert float(change[:10].square().mean()) < 0.1 * float(weight.square().mean())


def test_a_worse_compensation_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where making up for errors does not lower the error, the plain rounding is kept."""
    weight, moments = _matrix(), _moments()
    far = torch.zeros_like(weight, dtype=torch.int8)
    monkeypatch.setattr(rounding, "_compensated", lambda *_: far)
    integers, _ = rounded(weight, INT4, moments)
    assert integers.abs().sum() > 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [32, 96, 100])
def test_the_operator_reads_what_was_packed(bits: int, inputs: int) -> None:
    """MatMulNBits multiplies by exactly the matrix that integers and scales stand for, a short last block included."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weight = _matrix(inputs).numpy()
    data, scales = packed_matrix(weight, bits, 32)
    attributes = {"K": inputs, "N": 24, "bits": bits, "block_size": 32}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(data, "w"), numpy_helper.from_array(scales, "s")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    levels = Levels(-(1 << (bits - 1)), (1 << (bits - 1)) - 1, 32)
    expected = restored(*rounded(torch.from_numpy(weight), levels), levels).numpy()
    np.testing.assert_allclose(session.run(None, {"x": np.eye(inputs, dtype=np.float32)})[0], expected, atol=1e-5)
