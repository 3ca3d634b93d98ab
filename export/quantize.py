"""int8 with dynamic activations: every weight matrix becomes int8, activations are quantised while running.

Weights are symmetric, one scale for each output column. There is no zero point, which keeps ONNX Runtime on its fast
path (a zero point for each column, even of zeros, is slower by a sixth). Activations get one scale for the whole batch,
so an int8 row's logits depend a little on its neighbours: `export.verify` measures by how much.

The nodes are those that ONNX Runtime's own dynamic quantiser writes, and it fuses them when it opens the file:
``DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul``. Source: https://onnxruntime.ai/docs/performance/quantization.html
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from onnxscript import ir

from export.errors import UnsupportedModel
from export.optimize import add_weight, fold_transposed_weights


def quantize_int8(model: ir.Model) -> int:
    """Replace every ``MatMul`` with a constant matrix in place; returns how many there were.

    Raises:
        UnsupportedModel: there is nothing to quantise.
    """
    fold_transposed_weights(model)
    activations: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
    weights: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    count = 0
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or not _is_matrix(weight):
            continue
        if weight not in weights:
            weights[weight] = _quantized(model, weight)
        _replace(model, node, activations, *weights[weight])
        count += 1
    for weight in weights:
        if weight.name is not None and not weight.uses():
            model.graph.initializers.pop(weight.name)
    if count == 0:
        raise UnsupportedModel("The graph has no weight matrix for int8 to shrink.", "Export it with --precision fp32.")
    return count


def int8_matrix(weight: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Symmetric int8 of a float32 [inputs, outputs] matrix and its float32 [outputs] scales; values in −127 … 127."""
    # A column of zeros gets the smallest scale instead of a division by zero.
    largest = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny * 127)
    scales = (largest / np.float32(127)).astype(np.float32)
    return np.clip(np.rint(weight / scales), -127, 127).astype(np.int8), scales


def _is_matrix(value: ir.Value) -> bool:
    constant = value.const_value
    if constant is None or not value.is_initializer():
        return False
    return len(constant.shape) == 2 and constant.dtype == ir.DataType.FLOAT


def _quantized(model: ir.Model, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
    matrix, scales = int8_matrix(np.asarray(weight.const_value.numpy(), dtype=np.float32))
    return add_weight(model, f"{weight.name}.int8", matrix), add_weight(model, f"{weight.name}.scale", scales)


def _replace(
    model: ir.Model,
    node: ir.Node,
    activations: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]],
    matrix: ir.Value,
    scales: ir.Value,
) -> None:
    source, result = node.inputs[0], node.outputs[0]
    nodes: list[ir.Node] = []

    def add(op_type: str, inputs: list[ir.Value], outputs: int = 1, **attributes: int) -> list[ir.Value]:
        made = ir.node(op_type, inputs=inputs, num_outputs=outputs, attributes=attributes or None)
        nodes.append(made)
        return list(made.outputs)

    if source not in activations:
        quantized, scale, zero = add("DynamicQuantizeLinear", [source], 3)
        activations[source] = (quantized, scale, zero)
    quantized, scale, zero = activations[source]
    (product,) = add("MatMulInteger", [quantized, matrix, zero])
    (real,) = add("Cast", [product], to=int(ir.DataType.FLOAT))
    (factor,) = add("Mul", [scale, scales])
    (output,) = add("Mul", [real, factor])
    output.name, output.shape, output.type = result.name, result.shape, result.type
    result.name = f"{result.name}.fp32"
    model.graph.insert_before(node, nodes)
    result.replace_all_uses_with(output, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
