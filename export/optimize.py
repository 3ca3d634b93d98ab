"""Housekeeping on the traced graph: names that people can read, nothing saved twice, no machine-specific layout.

Operator fusion is left to ONNX Runtime when it opens the file: it knows the processor that it runs on.
"""

from __future__ import annotations

import ast
import gc
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnxscript import ir
from onnxscript.ir.passes import common as passes

_MODULE = "module"
# Above this the weights go to a file of their own beside the graph. Protobuf stops at 2 GiB, and long before that it
# costs memory: it holds every weight several times while it writes, and ONNX Runtime cannot map what lies inside it.
EXTERNAL_DATA_BYTES = 64_000_000
_PAGE = 4096


def optimize(model: ir.Model) -> None:
    """Tidy the traced graph in place: symbolic dimensions ``rows`` and ``seq``, no trace metadata, no dead nodes."""
    _name_dimensions(model)
    passes.RemoveUnusedNodesPass()(model)
    for node in model.graph:
        node.meta[_MODULE] = _module(node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
    passes.ClearMetadataAndDocStringPass()(model)
    model.producer_name = "truthgpt"


def layer_of(model: ir.Model) -> dict[ir.Node, str]:
    """The module that each node of an optimised graph belongs to, by the checkpoint's names.

    That is the layer (``transformer.h.3``) where there is one, else the innermost module (``lm_head``). A node that the
    tracer did not place belongs where its first input was computed.
    """
    modules: dict[ir.Node, str] = {}
    for node in model.graph:
        producers = [value.producer() for value in node.inputs if value is not None]
        inherited = next((modules[producer] for producer in producers if producer is not None), "")
        modules[node] = str(node.meta.get(_MODULE) or inherited)
    return modules


def _module(scopes: str) -> str:
    # The tracer's list of enclosing modules, outermost first, the node itself last.
    names = [str(scope) for scope in ast.literal_eval(scopes)[:-1]] if scopes.startswith("[") else []
    layers = [name for name in names if re.search(r"\.\d+$", name)]
    return (layers[0] if layers else names[-1] if names else "").removeprefix("model.")


def fold_transposed_weights(model: ir.Model) -> None:
    """Turn ``Transpose(weight)`` into a weight of its own, in place.

    The tracer leaves one where a weight has a second use: output embeddings tied to the input embeddings. In fp32 that
    is the better file (stored once, ONNX Runtime folds it when loading), but the quantiser needs to see the matrix.
    """
    done: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or not source.is_initializer() or source.const_value is None:
            continue
        order = tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else ()
        if (source, order) not in done:
            # A view: copied when it is quantised or written.
            transposed = np.transpose(source.const_value.numpy(), order or None)
            name = f"{source.name}.transposed" + ("" if not done else f".{len(done)}")
            done[source, order] = add_weight(model, name, transposed)
        node.outputs[0].replace_all_uses_with(done[source, order])
        model.graph.remove(node, safe=True)
    passes.RemoveUnusedNodesPass()(model)


def add_weight(model: ir.Model, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """Register an array as an initializer and return the value to use it by."""
    tensor = ir.tensor(array)
    value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
    model.graph.register_initializer(value)
    return value


def array_of(value: ir.Value) -> npt.NDArray[Any]:
    """A constant's array. Raises ValueError for a value that is computed."""
    if value.const_value is None:
        raise ValueError(f"{value.name} is no constant")
    array: npt.NDArray[Any] = value.const_value.numpy()
    return array


def save(model: ir.Model, folder: Path) -> None:
    """Write ``model.onnx`` into the folder, with ``model.onnx.data`` beside it when the weights are large.

    External weights are written one by one and begin on a page, so that whoever opens the file can map them.
    """
    large = weight_bytes(model) > EXTERNAL_DATA_BYTES
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data" if large else None, alignment=_PAGE)


def drop_weights(model: ir.Model) -> None:
    """Let go of all weights, for a graph that has been saved.

    The rewriter's rules are global and remember the last graph that they saw, and a graph remembers, as inputs that it
    once had, the weights that were folded away: without this the checkpoint stays in memory for good.
    """
    for value in gc.get_objects():
        # By its type: isinstance would ask every lazy module for its __class__.
        if issubclass(type(value), ir.Value) and (value.graph is None or value.graph is model.graph):
            value.const_value = None


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def _name_dimensions(model: ir.Model) -> None:
    ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    names = {str(ids.shape[0]): "rows", str(ids.shape[1]): "seq"}
    names |= {str(value.shape[1]): "picks" for value in model.graph.inputs if value.name == "last_index"}
    pairs = [(one, other) for one in names for other in names]
    names |= {f"{a}*{b}": "rows*picks" for a, b in pairs if {names[a], names[b]} == {"rows", "picks"}}
    values = {*model.graph.inputs, *(output for node in model.graph for output in node.outputs)}
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dimension, names) for dimension in value.shape])


def _renamed(dimension: int | ir.SymbolicDim, names: dict[str, str]) -> int | ir.SymbolicDim:
    if isinstance(dimension, int):
        return dimension
    return ir.SymbolicDim(names.get(str(dimension), str(dimension)))
