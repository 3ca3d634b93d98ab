"""int4: weights in blocks of 4 bits, multiplied by ONNX Runtime's ``MatMulNBits``.

Each block of `BLOCK` inputs of a column has a float32 scale and integers −8 … 7; the operator pads the last block. The
output embeddings, where an error goes straight into the logits, take 8 bits. Embeddings that are looked up become fp16.
``accuracy_level`` 4 lets the CPU multiply in int8, with a scale for each block of each row of activations, so that a
row does not depend on its neighbours.
Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from onnxscript import ir

from export.calibrate import Calibration
from export.matrices import Product, each_product
from export.optimize import add_weight
from export.rounding import Levels, rounded

BLOCK = 32
HEAD_BITS = 8
INT8_ACTIVATIONS = 4


def quantize_int4(
    model: ir.Model, calibration: Calibration | None = None, progress: Callable[[float], None] = lambda fraction: None
) -> int:
    """Replace every ``MatMul`` with a constant matrix in place; returns how many there were.

    Raises:
        UnsupportedModel: there is nothing to quantise.
    """
    packed: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def replace(product: Product, moments: npt.NDArray[np.float32] | None) -> None:
        bits = HEAD_BITS if product.last else 4
        inputs, outputs = product.matrix().shape
        if product.weight not in packed:
            data, scales = packed_matrix(product.matrix(), bits, BLOCK, moments)
            packed[product.weight] = (
                add_weight(model, f"{product.weight.name}.int{bits}", data),
                add_weight(model, f"{product.weight.name}.scale", scales),
            )
        node = ir.node(
            "MatMulNBits",
            inputs=[product.source, *packed[product.weight]],
            attributes={
                "K": inputs,
                "N": outputs,
                "bits": bits,
                "block_size": BLOCK,
                "accuracy_level": INT8_ACTIVATIONS,
            },
            domain="com.microsoft",
        )
        product.replace([node], node.outputs[0])

    count = each_product(model, "int4", replace, calibration, progress)
    model.graph.opset_imports.setdefault("com.microsoft", 1)
    halve_embeddings(model)
    return count


def packed_matrix(
    weight: npt.NDArray[np.float32], bits: int, block: int, moments: npt.NDArray[np.float32] | None = None
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """A float32 [inputs, outputs] matrix as ``MatMulNBits`` wants it, with 4 or 8 bits.

    Returns uint8 [outputs, blocks, block × bits / 8], integers raised by half their range, the first of two in the low
    half of a byte, and float32 scales [outputs, blocks]. ``moments`` as in `export.rounding`.
    """
    middle = 1 << (bits - 1)
    levels = Levels(-middle, middle - 1, block)
    integers, scales = rounded(torch.from_numpy(weight), levels, None if moments is None else torch.from_numpy(moments))
    inputs, outputs = weight.shape
    blocks = scales.shape[0]
    raised = np.full((outputs, blocks * block), middle, np.uint8)  # padding stands for zero
    raised[:, :inputs] = (integers.numpy().T.astype(np.int16) + middle).astype(np.uint8)
    if bits == 4:
        raised = np.bitwise_or(raised[:, ::2], np.left_shift(raised[:, 1::2], 4), dtype=np.uint8)
    return raised.reshape(outputs, blocks, -1), np.ascontiguousarray(scales.numpy().T)


def halve_embeddings(model: ir.Model) -> None:
    """Store the matrices that ``Gather`` looks rows up in as fp16, in place, where their values fit."""
    limit = float(np.finfo(np.float16).max)
    for node in list(model.graph):
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is None or table.const_value is None or table.dtype != ir.DataType.FLOAT or len(table.uses()) != 1:
            continue
        array = table.const_value.numpy()
        if array.ndim != 2 or not np.abs(array).max(initial=0.0) < limit:
            continue
        half = add_weight(model, f"{table.name}.fp16", array.astype(np.float16))
        node.replace_input_with(0, half)
        result = node.outputs[0]
        cast = ir.node("Cast", inputs=[result], attributes={"to": int(ir.DataType.FLOAT)})
        cast.outputs[0].shape, cast.outputs[0].type = result.shape, ir.TensorType(ir.DataType.FLOAT)
        result.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, result)
        result.type = ir.TensorType(ir.DataType.FLOAT16)
        model.graph.insert_after(node, cast)
        model.graph.initializers.pop(str(table.name))
