"""A decoder of one or two layers with random weights and the graph that exports have, in the precision asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCAB, MAX_LEN = 17, 24
LAYERS = ((2, 8), (1, 16))  # kv heads and head size of each: caches of different shapes
WIDTH = 16
_DTYPES = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}


def write_decoder(path: Path, element: int = TensorProto.FLOAT, max_len: int = MAX_LEN, spread: float = 0.3) -> Path:
    """Write the graph with weights and caches of `element` (a TensorProto type), slots of `max_len` positions; the
    weights' standard deviation is `spread`.
    """
    random = np.random.default_rng(0)
    weights: list[onnx.TensorProto] = []

    def weight(name: str, *shape: int) -> str:
        values = random.normal(size=shape, scale=spread).astype(np.float32)
        if element in _DTYPES:
            weights.append(numpy_helper.from_array(values.astype(_DTYPES[element]), name))
        else:
            weights.append(helper.make_tensor(name, element, shape, values.reshape(-1).tolist()))
        return name

    def constant(name: str, *values: int) -> str:
        weights.append(numpy_helper.from_array(np.array(values), name))
        return name

    node = helper.make_node
    nodes = [
        node("Gather", [weight("embedding", VOCAB, WIDTH), "input_ids"], ["tokens"]),
        node("Gather", [weight("places", max_len, WIDTH), "position_ids"], ["where"]),
        node("Add", ["tokens", "where"], ["x0"]),
    ]
    caches = []
    for i, (kv_heads, size) in enumerate(LAYERS):
        for part, width in (("q", 2 * size), ("k", kv_heads * size), ("v", kv_heads * size)):
            nodes.append(node("MatMul", [f"x{i}", weight(f"w{part}{i}", WIDTH, width)], [f"{part}{i}"]))
        nodes.append(
            node(
                "GroupQueryAttention",
                [f"q{i}", f"k{i}", f"v{i}", f"past_key_{i}", f"past_value_{i}", "seqlens_k", "total_sequence_length"],
                [f"seen{i}", f"present_key_{i}", f"present_value_{i}"],
                domain="com.microsoft", num_heads=2, kv_num_heads=kv_heads,
            )
        )  # fmt: skip
        nodes.append(node("MatMul", [f"seen{i}", weight(f"wo{i}", 2 * size, WIDTH)], [f"o{i}"]))
        nodes.append(node("Add", [f"x{i}", f"o{i}"], [f"x{i + 1}"]))
        caches += [(f"{kind}_{i}", ["rows", kv_heads, max_len, size]) for kind in ("key", "value")]
    nodes += [
        node("Unsqueeze", ["last_index", constant("axes", 2)], ["index"]),
        node("Expand", ["index", constant("one_row", 1, 1, WIDTH)], ["spread"]),
        node("GatherElements", [f"x{len(LAYERS)}", "spread"], ["last"], axis=1),
        node("Reshape", ["last", constant("flat", -1, WIDTH)], ["row"]),
        node("MatMul", ["row", weight("head", WIDTH, VOCAB)], ["scores"]),
        node("Cast", ["scores"], ["logits"], to=TensorProto.FLOAT),
    ]
    value = helper.make_tensor_value_info
    inputs = [
        *(value(name, TensorProto.INT64, ["rows", "seq"]) for name in ("input_ids", "position_ids")),
        value("seqlens_k", TensorProto.INT32, ["rows"]),
        value("total_sequence_length", TensorProto.INT32, []),
        value("last_index", TensorProto.INT64, ["rows", "picks"]),
        *(value(f"past_{name}", element, shape) for name, shape in caches),
    ]
    outputs = [
        value("logits", TensorProto.FLOAT, ["rows*picks", VOCAB]),
        *(value(f"present_{name}", element, shape) for name, shape in caches),
    ]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path
