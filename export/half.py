"""fp16 and bf16: weights, activations and KV cache half as wide, where that is safe.

The pass works on the traced fp32 graph, whose types are all known. Each node computes either in half or in fp32, and a
``Cast`` stands wherever a value crosses over:

- products, attention, look-ups of weights, and whatever only moves their results about, are half;
- the insides of normalisations, softmax and powers stay fp32, and so does arithmetic on positions (a position of 2049
  is no fp16 number). What is computed element by element from an fp32 value stays fp32 up to the next product;
- a weight that is no finite number in half, and the nodes that the caller names, stay fp32 (`export.scan` finds them);
- logits leave as float32.

`LayerNormalization` and ``GroupQueryAttention`` take half and accumulate in fp32 inside.
"""

from __future__ import annotations

from collections.abc import Set

import ml_dtypes
import numpy as np
from onnxscript import ir

from export.errors import UnsupportedModel
from export.optimize import add_weight, array_of

DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
LIMITS = {"fp16": 65504.0, "bf16": 3.3895313892515355e38}
_NUMPY = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}

_HALF = frozenset({"MatMul", "Gemm", "Einsum", "Conv", "GroupQueryAttention"})
_FP32 = frozenset(
    {
        "Pow", "Sqrt", "Reciprocal", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "Exp", "Log", "Softmax",
        "LogSoftmax", "Softplus", "CumSum", "Cos", "Sin",
    }
)  # fmt: skip


def to_half(model: ir.Model, precision: str, keep: Set[str] = frozenset()) -> list[ir.Node]:
    """Convert the fp32 graph in place; nodes whose first output is named in ``keep`` compute in fp32.

    Returns the nodes that had to stay fp32 because half cannot hold a weight of theirs.

    Raises:
        UnsupportedModel: the graph has control flow or values of unknown type.
    """
    _require_plain(model)
    conversion = _Conversion(model, precision)
    for node in list(model.graph):
        conversion.convert(node, keep)
    conversion.finish()
    return conversion.unfit


def _require_plain(model: ir.Model) -> None:
    for node in model.graph:
        nested = any(attribute.type in _NESTED for attribute in node.attributes.values())
        if nested or any(output.dtype is None for output in node.outputs):
            raise UnsupportedModel(
                f"The graph's {node.op_type} cannot be converted to half precision.", "Export it with --precision fp32."
            )


class _Conversion:
    """One walk over the nodes in their topological order; remembers what has been converted already."""

    def __init__(self, model: ir.Model, precision: str) -> None:
        self._model = model
        self._graph = model.graph
        self._half = DTYPES[precision]
        self._suffix = precision
        self._dtype = _NUMPY[precision]
        self._limit = LIMITS[precision]
        self._cast: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._narrow: dict[ir.Value, bool] = {}
        # Values computed from positions and constants alone: fp32, but no reason for a consumer to be.
        self._positional: set[ir.Value] = set()
        self.unfit: list[ir.Node] = []

    def convert(self, node: ir.Node, keep: Set[str]) -> None:
        reals = [value for value in node.inputs if value is not None and value.dtype in (ir.DataType.FLOAT, self._half)]
        outputs = [output for output in node.outputs if output.dtype == ir.DataType.FLOAT]
        positional = not any(self._hidden(value) for value in reals)
        half = not positional and self._computes_in_half(node, reals) and node.outputs[0].name not in keep
        if positional:
            self._positional.update(outputs)
        dtype = self._half if half else ir.DataType.FLOAT
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in (ir.DataType.FLOAT, self._half):
                node.replace_input_with(index, self._as(value, dtype))
        for output in outputs:
            output.type = ir.TensorType(dtype)
        if half and node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", int(self._half))

    def finish(self) -> None:
        for index, output in enumerate(self._graph.outputs):
            if output.name == "logits" and output.dtype != ir.DataType.FLOAT:
                output.name = "logits.half"
                logits = _cast_node(output, ir.DataType.FLOAT, "logits")
                self._graph.append(logits)
                self._graph.outputs[index] = logits.outputs[0]
        for value in list(self._graph.initializers.values()):
            if value.name is not None and not value.uses() and not value.is_graph_output():
                self._graph.initializers.pop(value.name)

    def _hidden(self, value: ir.Value) -> bool:
        if value.is_initializer():
            return sum(isinstance(size, int) and size > 1 for size in value.shape or ()) > 1
        return value not in self._positional

    def _computes_in_half(self, node: ir.Node, reals: list[ir.Value]) -> bool:
        if node.op_type in _FP32:
            return False
        if not all(self._fits(value) for value in reals if value.is_initializer()):
            self.unfit.append(node)
            return False
        if node.op_type in _HALF:
            return True
        moving = [value for value in reals if not value.is_initializer() and value not in self._positional]
        return all(value.dtype == self._half for value in moving)

    def _fits(self, value: ir.Value) -> bool:
        if value not in self._narrow:
            self._narrow[value] = bool(np.abs(array_of(value)).max(initial=0.0) < self._limit)
        return self._narrow[value]

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if value.dtype == dtype:
            return value
        if value.is_graph_input():  # a cache: its only consumer is this attention
            value.type = ir.TensorType(dtype)
            return value
        if (value, dtype) not in self._cast:
            producer = value.producer()
            narrow = self._stored(value) if producer is None else self._cross(producer, value, dtype)
            self._cast[value, dtype] = narrow
        return self._cast[value, dtype]

    def _stored(self, value: ir.Value) -> ir.Value:
        return add_weight(self._model, f"{value.name}.{self._suffix}", array_of(value).astype(self._dtype))

    def _cross(self, producer: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        node = _cast_node(value, dtype, f"{value.name}.{self._suffix if dtype == self._half else 'fp32'}")
        self._graph.insert_after(producer, node)
        return node.outputs[0]


def _cast_node(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", inputs=[value], attributes={"to": int(dtype)})
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, value.shape, ir.TensorType(dtype)
    return node


_NESTED = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
