"""int8 with dynamic activations: every weight matrix becomes int8, activations are quantised while running.

Weights are symmetric, one scale for each output column. There is no zero point, which keeps ONNX Runtime on its fast
path (a zero point for each column, even of zeros, is slower by a sixth). Activations get one scale for the whole batch,
so an int8 row's logits depend a little on its neighbours: `export.verify` measures by how much. With ``per_row`` each
row of activations is divided by its own largest value and rounded on one constant scale: sums of integers are exact, so
what a row's product is does not depend on its neighbours any more.

The nodes are those that ONNX Runtime's own dynamic quantiser writes, and it fuses them when it opens the file:
``DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul``. Source: https://onnxruntime.ai/docs/performance/quantization.html
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnxscript import ir

from export.calibrate import Calibration
from export.matrices import Product, each_product
from export.optimize import add_weight
from export.rounding import INT8, rounded


def quantize_int8(
    model: ir.Model,
    calibration: Calibration | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
    per_row: bool = False,
) -> int:
    """Replace every ``MatMul`` with a constant matrix in place; returns how many there were.

    ``per_row``: a scale for each row of activations instead of one for all.

    Raises:
        UnsupportedModel: there is nothing to quantise.
    """
    activations: dict[ir.Value, tuple[ir.Value, ...]] = {}
    row_scales = _RowScales(model)
    weights: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def replace(product: Product, moments: npt.NDArray[np.float32] | None) -> None:
        if product.weight not in weights:
            matrix, scales = int8_matrix(product.matrix(), moments)
            weights[product.weight] = (
                add_weight(model, f"{product.weight.name}.int8", matrix),
                add_weight(model, f"{product.weight.name}.scale", scales),
            )
        if per_row:
            row_scales.replace(product, *weights[product.weight])
        else:
            _replace(product, activations, *weights[product.weight])

    return each_product(model, "int8", replace, calibration, progress)


def int8_matrix(
    weight: npt.NDArray[np.float32], moments: npt.NDArray[np.float32] | None = None
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Symmetric int8 of a float32 [inputs, outputs] matrix and its float32 [outputs] scales; values in −127 … 127.

    ``moments`` float32 [inputs, inputs]: the inputs' second moments over a calibration text.
    """
    integers, scales = rounded(torch.from_numpy(weight), INT8, None if moments is None else torch.from_numpy(moments))
    return integers.numpy(), scales[0].numpy()


def _replace(
    product: Product,
    activations: dict[ir.Value, tuple[ir.Value, ...]],
    matrix: ir.Value,
    scales: ir.Value,
) -> None:
    source = product.source
    nodes: list[ir.Node] = []

    def add(op_type: str, inputs: list[ir.Value], outputs: int = 1, **attributes: int) -> list[ir.Value]:
        made = ir.node(op_type, inputs=inputs, num_outputs=outputs, attributes=attributes or None)
        nodes.append(made)
        return list(made.outputs)

    if source not in activations:
        quantized, scale, zero = add("DynamicQuantizeLinear", [source], 3)
        activations[source] = (quantized, scale, zero)
    quantized, scale, zero = activations[source]
    (whole,) = add("MatMulInteger", [quantized, matrix, zero])
    (real,) = add("Cast", [whole], to=int(ir.DataType.FLOAT))
    (factor,) = add("Mul", [scale, scales])
    (output,) = add("Mul", [real, factor])
    product.replace(nodes, output)


class _RowScales:
    """Activations on a scale for each row: x / max|x| of the row, as uint8 around 128 in steps of 1/127."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self._constants: dict[str, ir.Value] = {}

    def replace(self, product: Product, matrix: ir.Value, scales: ir.Value) -> None:
        nodes: list[ir.Node] = []

        def add(op_type: str, *inputs: ir.Value, domain: str = "", **attributes: int) -> ir.Value:
            nodes.append(ir.node(op_type, inputs=inputs, attributes=attributes or None, domain=domain))
            return nodes[-1].outputs[0]

        step = self._constant("step", np.asarray(1 / 127, np.float32))
        middle = self._constant("middle", np.asarray(128, np.uint8))
        if product.source not in self._rounded:
            sizes = add("Abs", product.source)
            largest = add("ReduceMax", sizes, self._constant("last", np.asarray([-1], np.int64)), keepdims=1)
            # A row of zeros stays one.
            largest = add("Max", largest, self._constant("least", np.asarray(1e-30, np.float32)))
            self._rounded[product.source] = add(
                "QuantizeLinear", add("Div", product.source, largest), step, middle
            ), largest
        whole, largest = self._rounded[product.source]
        real = add("MatMulIntegerToFloat", whole, matrix, step, scales, middle, domain="com.microsoft")
        product.replace(nodes, add("Mul", real, largest))
        self._model.graph.opset_imports.setdefault("com.microsoft", 1)

    def _constant(self, name: str, value: npt.NDArray[Any]) -> ir.Value:
        if name not in self._constants:
            self._constants[name] = add_weight(self._model, f"activations.{name}", value)
        return self._constants[name]
