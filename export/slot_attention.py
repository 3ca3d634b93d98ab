"""The one operator between torch and ONNX Runtime: attention over a slot's past, which it extends in place.

While tracing it is a torch custom operator that knows only its shapes; in the graph it is ``GroupQueryAttention`` of
ONNX Runtime's domain ``com.microsoft``.
Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from __future__ import annotations

from typing import Any

import onnx
import torch
from onnxscript import values


def _slot_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    seqlens_k: torch.Tensor,
    total_sequence_length: torch.Tensor,
    head_sink: torch.Tensor | None,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    softcap: float,
    local_window_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stand-in for GroupQueryAttention while tracing; query, key and value are [rows, seq, heads × head_dim].

    ``head_sink`` [heads] is a score that joins each head's softmax without a value of its own.
    """
    raise NotImplementedError("slot_attention exists for tracing; ONNX Runtime runs it as GroupQueryAttention")


def _slot_attention_shapes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(past_key), torch.empty_like(past_value)


slot_attention = torch.library.custom_op("truthgpt::slot_attention", _slot_attention, mutates_args=())
slot_attention.register_fake(_slot_attention_shapes)


def _schema() -> onnx.defs.OpSchema:
    # onnxscript knows no schemas of com.microsoft; without one it cannot tell inputs from attributes.
    schema = onnx.defs.OpSchema
    tensors = ("query", "key", "value", "past_key", "past_value")
    lengths = ("seqlens_k", "total_sequence_length")
    optional = schema.FormalParameterOption.Optional
    outputs = ("output", "present_key", "present_value")
    integer, real = schema.AttrType.INT, schema.AttrType.FLOAT
    return schema(
        "GroupQueryAttention",
        "com.microsoft",
        1,
        "",
        inputs=[
            *(schema.FormalParameter(name, "T") for name in tensors),
            *(schema.FormalParameter(name, "M") for name in lengths),
            *(schema.FormalParameter(name, "T", param_option=optional) for name in ("cos_cache", "sin_cache")),
            schema.FormalParameter("position_ids", "tensor(int64)", param_option=optional),
            *(schema.FormalParameter(name, "T", param_option=optional) for name in ("attention_bias", "head_sink")),
        ],
        outputs=[schema.FormalParameter(name, "T") for name in outputs],
        type_constraints=[("T", ["tensor(float)"], ""), ("M", ["tensor(int32)"], "")],
        attributes=[
            schema.Attribute("num_heads", integer, "", required=True),
            schema.Attribute("kv_num_heads", integer, "", required=True),
            schema.Attribute("scale", real, "", required=False),
            schema.Attribute("softcap", real, "", required=False),
            schema.Attribute("local_window_size", integer, "", required=False),
        ],
    )


_GROUP_QUERY_ATTENTION = values.Op(values.Opset("com.microsoft", 1), "GroupQueryAttention", _schema())


def _translate(
    query: Any,
    key: Any,
    value: Any,
    past_key: Any,
    past_value: Any,
    seqlens_k: Any,
    total_sequence_length: Any,
    head_sink: Any,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    softcap: float,
    local_window_size: int,
) -> Any:
    tensors = [query, key, value, past_key, past_value, seqlens_k, total_sequence_length]
    if head_sink is not None:
        tensors += [None, None, None, None, head_sink]  # no rotary caches, positions or bias: those are in the graph
    attributes: dict[str, int | float] = {"num_heads": num_heads, "kv_num_heads": kv_num_heads, "scale": scale}
    if softcap:
        attributes["softcap"] = softcap
    if local_window_size > 0:
        attributes["local_window_size"] = local_window_size
    return _GROUP_QUERY_ATTENTION(*tensors, **attributes)


TRANSLATION = {torch.ops.truthgpt.slot_attention.default: _translate}
