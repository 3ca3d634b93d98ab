"""A half graph as a GPU would compute it: every half value rounded to half, infinities and all, on any CPU.

ONNX Runtime's CPU computes fp16 nodes in fp32 where it can and knows no bf16 at all, but it can cast to both.
"""

from __future__ import annotations

import numpy as np
from onnxscript import ir


def strict(model: ir.Model, half: ir.DataType) -> ir.Model:
    """A float32 graph of a half one, with every half value cast to half and back where it is computed."""
    model = model.clone()
    graph = model.graph
    for value in list(graph.initializers.values()):
        if value.dtype == half and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32))
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for value in graph.inputs:
        if value.dtype == half:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in list(graph):
        if node.op_type == "Cast" and node.attributes["to"].as_int() == int(half):
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        for output in node.outputs:
            if output.dtype != half:
                continue
            output.type = ir.TensorType(ir.DataType.FLOAT)
            if output.is_graph_output():  # a cache: rounded before it is written
                continue
            narrow = ir.node("Cast", inputs=[output], attributes={"to": int(half)})
            wide = ir.node("Cast", inputs=[narrow.outputs[0]], attributes={"to": int(ir.DataType.FLOAT)})
            output.replace_all_uses_with(wide.outputs[0])
            narrow.replace_input_with(0, output)
            graph.insert_after(node, [narrow, wide])
    return model
