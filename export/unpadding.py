"""Layers of an encoder that look at one token at a time compute the live tokens only, whatever a batch is padded to.

Most of an encoder's work is products of each token with a matrix. Texts of different lengths share a run by padding,
and what is computed for padding is thrown away: so before such a product the live tokens of all rows are gathered into
one matrix, [live, width] instead of [rows, seq, width], and what comes behind it goes on with that for as long as
it looks at single tokens (biases, activations, normalisation, residuals). Whatever looks at a row as a whole, attention
and pooling, gets the padded form back.

At padded positions that holds numbers of other tokens, where the graph had numbers of padding: nobody may read either.
A model that does is found by the verification, whose batches are padded.
"""

from __future__ import annotations

import numpy as np
from onnxscript import ir

from export.optimize import add_weight

# Of one token's numbers alone, and none of them makes a mask of its input.
_SAME = {"Gelu", "Relu", "Tanh", "Sigmoid", "Erf", "Sqrt", "Reciprocal", "Neg", "Abs", "Exp", "Softplus", "Elu", "Cast"}
_BINARY = {"Add", "Sub", "Mul", "Div", "Pow"}
_NORMS = {"LayerNormalization", "RMSNormalization"}
_ROWS = ("rows", "seq")


def compute_live_tokens_only(model: ir.Model, mask: str) -> int:
    """Rewrite an optimised encoder graph in place; returns how many products it now computes of live tokens only.

    ``mask`` names the input int64 [rows, seq] that is 1 where a token is live. At least one position is computed even
    if none is live.
    """
    if not any(_is_product(node) for node in model.graph):
        return 0
    return _Rewriter(model, next(value for value in model.graph.inputs if value.name == mask)).run()


def _is_token_wise(value: ir.Value | None) -> bool:
    shape = value.shape if value is not None else None
    return shape is not None and len(shape) == 3 and tuple(map(str, shape[:2])) == _ROWS


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _is_product(node: ir.Node) -> bool:
    """Whether a node multiplies each token with a matrix of weights."""
    if node.op_type != "MatMul" or node.domain:
        return False
    left, right = node.inputs
    return _is_token_wise(left) and right is not None and right.const_value is not None and _rank(right) == 2


class _Rewriter:
    def __init__(self, model: ir.Model, mask: ir.Value) -> None:
        self._model, self._mask = model, mask
        self._live: set[ir.Value] = set()  # values that are computed as [live, width]
        self._gathered: dict[ir.Value, ir.Value] = {}  # padded value -> the same as [live, width]
        self._padded: dict[ir.Value, ir.Value] = {}  # the other way round
        self._count = 0

    def run(self) -> int:
        nodes = list(self._model.graph)
        self._positions, self._places = self._indices(nodes[0])
        products = 0
        for node in nodes:
            if self._takes_live(node):
                products += _is_product(node)
                for index, value in enumerate(node.inputs):
                    if value is not None and _is_token_wise(value):
                        node.replace_input_with(index, self._as_live(value, node))
                self._live.update(output for output in node.outputs if output.name)
            else:
                for index, value in enumerate(node.inputs):
                    if value in self._live:
                        node.replace_input_with(index, self._as_padded(value, node))
        for index, output in enumerate(self._model.graph.outputs):
            if output in self._live:
                raise AssertionError(f"output {index} has one row a text, not one a token")
        for value in self._live:  # the shapes were needed until here
            value.shape = ir.Shape([ir.SymbolicDim("live"), *value.shape[2:]]) if value.shape is not None else None
        return products

    def _takes_live(self, node: ir.Node) -> bool:
        if node.domain or not all(_is_token_wise(output) for output in node.outputs):
            return False
        if _is_product(node):
            return True
        values = [value for value in node.inputs if value is not None]
        # What was never gathered may be a mask, which is to be applied where there is something to mask.
        if not all(v in self._live or v in self._gathered for v in values if _rank(v) != 1 and not _is_scalar(v)):
            return False
        if not any(value in self._live for value in values):
            return False
        if node.op_type in _SAME | _BINARY:
            return all(v.const_value is not None for v in values if not _is_token_wise(v))
        if node.op_type in _NORMS:
            return "axis" not in node.attributes or node.attributes["axis"].as_int() == -1
        return node.op_type == "ReduceMean" and _keeps_last(node)

    def _as_live(self, value: ir.Value, before: ir.Node) -> ir.Value:
        if value in self._live:
            return value
        if value not in self._gathered:
            self._gathered[value] = self._add(before, "GatherND", [value, self._positions], value, "live")
        return self._gathered[value]

    def _as_padded(self, value: ir.Value, before: ir.Node) -> ir.Value:
        if value not in self._padded:
            self._padded[value] = self._add(before, "Gather", [value, self._places], value, "padded")
        return self._padded[value]

    def _add(self, before: ir.Node, op: str, inputs: list[ir.Value], of: ir.Value, what: str) -> ir.Value:
        node = ir.node(op, inputs)
        node.outputs[0].name = f"{of.name}.{what}"
        node.outputs[0].type = of.type
        self._model.graph.insert_before(before, node)
        return node.outputs[0]

    def _indices(self, first: ir.Node) -> tuple[ir.Value, ir.Value]:
        """Where the live tokens are, int64 [live, 2], and which of them each position holds, int64 [rows, seq].

        Position 0 of row 0 comes first, whatever it is: so there is one, and what comes before the first live token
        has numbers to hold, too.
        """
        number = iter(range(100))

        def op(kind: str, *inputs: ir.Value, **attributes: int | list[int]) -> ir.Value:
            node = ir.node(kind, inputs, attributes=attributes)
            node.outputs[0].name = f"live.{next(number)}"
            self._model.graph.insert_before(first, node)
            return node.outputs[0]

        def constant(name: str, numbers: list[int] | list[list[int]] | int) -> ir.Value:
            return add_weight(self._model, f"live.{name}", np.array(numbers, np.int64))

        found = op("Transpose", op("NonZero", self._mask), perm=[1, 0])
        positions = op("Concat", constant("origin", [[0, 0]]), found, axis=0)
        flat = op("Reshape", self._mask, constant("flat", [-1]))
        running = op("CumSum", flat, constant("axis", 0))
        return positions, op("Reshape", running, op("Shape", self._mask))


def _is_scalar(value: ir.Value) -> bool:
    return _rank(value) == 0


def _keeps_last(node: ir.Node) -> bool:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    keeps = "keepdims" not in node.attributes or node.attributes["keepdims"].as_int() == 1
    return keeps and axes is not None and axes.const_value is not None and axes.const_value.numpy().tolist() == [-1]
