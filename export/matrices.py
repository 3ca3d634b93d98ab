"""The products with a constant matrix in a graph: what the quantisers replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnxscript import ir

from export.calibrate import Calibration, Moments
from export.errors import UnsupportedModel
from export.optimize import array_of, fold_transposed_weights

Replace = Callable[["Product", "npt.NDArray[np.float32] | None"], None]


@dataclass(frozen=True)
class Product:
    """``MatMul(source, weight)``: [..., inputs] with a constant float32 [inputs, outputs].

    ``last`` is that of the output embeddings.
    """

    model: ir.Model
    node: ir.Node
    source: ir.Value
    weight: ir.Value
    last: bool

    def matrix(self) -> npt.NDArray[np.float32]:
        """The weights."""
        return np.ascontiguousarray(array_of(self.weight), dtype=np.float32)

    def replace(self, nodes: Sequence[ir.Node], output: ir.Value) -> None:
        """Put ``nodes``, which compute ``output``, in the place of the product."""
        result = self.node.outputs[0]
        output.name, output.shape, output.type = result.name, result.shape, result.type
        result.name = f"{result.name}.fp32"
        self.model.graph.insert_before(self.node, nodes)
        result.replace_all_uses_with(output, replace_graph_outputs=True)
        self.model.graph.remove(self.node, safe=True)


def each_product(
    model: ir.Model,
    precision: str,
    replace: Replace,
    calibration: Calibration | None,
    progress: Callable[[float], None],
) -> int:
    """Hand every product and its inputs' second moments to ``replace``; returns how many there were.

    Raises:
        UnsupportedModel: there is none.
    """
    fold_transposed_weights(model)
    nodes = [node for node in model.graph if node.op_type == "MatMul" and _is_matrix(node.inputs[1])]
    if not nodes:
        raise UnsupportedModel(
            f"The graph has no weight matrix for {precision} to shrink.", "Export it with --precision fp32."
        )
    products = [
        Product(model, node, source, weight, last=node is nodes[-1])
        for node in nodes
        for source, weight in [node.inputs]
        if source is not None and weight is not None
    ]
    done = 0
    for group, moments in _moments(products, calibration):
        for product in group:
            replace(product, moments.get(str(product.source.name)))
            done += 1
            progress(done / len(products))
    for weight in {product.weight for product in products}:
        if weight.name is not None and not weight.uses():
            model.graph.initializers.pop(weight.name)
    return len(products)


def _moments(
    products: Sequence[Product], calibration: Calibration | None
) -> Iterator[tuple[Sequence[Product], Moments]]:
    if calibration is None:
        yield products, {}
        return
    sources = list(dict.fromkeys(product.source for product in products))
    # Names may go to other values once products have been replaced.
    named = {product.node: str(product.source.name) for product in products}
    for moments in calibration.moments(products[0].model, sources):
        yield [product for product in products if named[product.node] in moments], moments


def _is_matrix(value: ir.Value | None) -> bool:
    if value is None or value.const_value is None or not value.is_initializer():
        return False
    return len(value.const_value.shape) == 2 and value.const_value.dtype == ir.DataType.FLOAT
