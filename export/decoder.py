"""A causal LM of transformers becomes an ONNX graph whose KV cache lives in slots.

The model's own forward is traced, untouched. Only two things are put in from outside: the attention (through
``transformers.AttentionInterface``), which becomes ONNX Runtime's GroupQueryAttention reading and writing the slots,
and a gather of each row's last live position right in front of the output embeddings, so that logits are computed once
a row and whatever the model does after them (scaling, soft-capping) is kept.

Inputs:   input_ids int64 [rows, seq] · position_ids int64 [rows, seq] · seqlens_k int32 [rows] (total length − 1) ·
          total_sequence_length int32 [] (maximum over the rows) · last_index int64 [rows] ·
          past_key_{i}, past_value_{i} float32 [rows, kv_heads, max_len, head_dim]
Outputs:  logits float32 [rows, vocab] · present_key_{i}, present_value_{i} (to be bound to the past's memory)
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from onnxscript import ir
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from export.errors import UnsupportedModel
from export.probe import Layout, architecture, attention
from export.slot_attention import TRANSLATION, slot_attention

OPSET = 21
SLOTS = "truthgpt_slots"
STEP_INPUTS = ("input_ids", "position_ids", "seqlens_k", "total_sequence_length", "last_index")


class SlotDecoder(nn.Module):  # type: ignore[misc]  # mypy does not follow torch
    """The model's forward with slots for a cache: what is handed to the tracer."""

    def __init__(self, model: PreTrainedModel, layout: Layout) -> None:
        super().__init__()
        self.model = model
        self.layout = layout

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        seqlens_k: torch.Tensor,
        total_sequence_length: torch.Tensor,
        last_index: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """Logits float32 [rows, vocab] and the presents, in the order of ``past`` (key 0, value 0, key 1, …)."""
        present: list[torch.Tensor | None] = [None] * len(past)
        calls = 0

        def attend(
            module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, None]:
            nonlocal calls
            index = getattr(module, "layer_idx", None)
            layer = self.layout.layers[calls if index is None else index]
            calls += 1
            where = 2 * layer.index
            rows, heads, seq, width = query.shape
            output, present[where], present[where + 1] = slot_attention(
                _packed(query),
                _packed(key),
                _packed(value),
                past[where],
                past[where + 1],
                seqlens_k,
                total_sequence_length,
                heads,
                layer.kv_heads,
                layer.scale,
                layer.softcap,
                layer.sliding_window or -1,
            )
            return output.view(rows, seq, heads, width), None

        def last_live_position(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden = arguments[0]
            where = last_index[:, None, None].expand(-1, -1, hidden.shape[-1])
            return (hidden.gather(1, where), *arguments[1:])

        hook = self.model.get_output_embeddings().register_forward_pre_hook(last_live_position)
        try:
            with attention(self.model, SLOTS, attend):
                logits = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        finally:
            hook.remove()
        if calls != len(self.layout.layers) or any(tensor is None for tensor in present):
            raise UnsupportedModel(f"{architecture(self.model)} did not call its attention once a layer while tracing.")
        return (logits.squeeze(1).float(), *(tensor for tensor in present if tensor is not None))


def _packed(heads: torch.Tensor) -> torch.Tensor:
    """[rows, heads, seq, head_dim] -> [rows, seq, heads × head_dim], GroupQueryAttention's layout."""
    rows, count, seq, width = heads.shape
    return heads.transpose(1, 2).reshape(rows, seq, count * width)


def linear_instead_of_conv1d(model: PreTrainedModel) -> None:
    """Replace GPT-2's ``Conv1D`` by the ``nn.Linear`` it is, in place, sharing the weights.

    Conv1D flattens its input and calls addmm, which exports as Gemm between two reshapes; the quantisers want MatMul.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape, device="meta")
            linear.weight = nn.Parameter(module.weight.detach().t(), requires_grad=False)
            linear.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
            model.set_submodule(name, linear)


def trace(model: PreTrainedModel, layout: Layout, max_len: int) -> ir.Model:
    """Trace the model into an ONNX graph (in memory, weights shared with torch where they can be).

    Raises:
        UnsupportedModel: the forward cannot be traced, or the cache would not be used by every layer.
    """
    linear_instead_of_conv1d(model)
    count = len(layout.layers)
    shape = (2, layout.kv_heads, max_len, layout.head_dim)
    past = [torch.empty(shape) for _ in range(2 * count)]  # never written, so never backed by memory
    # Two rows of three tokens: sizes of 0 and 1 would be taken for constants by the tracer.
    arguments = (
        torch.zeros(2, 3, dtype=torch.long),
        torch.arange(3).expand(2, 3).contiguous(),
        torch.full((2,), 2, dtype=torch.int32),
        torch.tensor(3, dtype=torch.int32),
        torch.full((2,), 2, dtype=torch.long),
        past,
    )
    rows, seq = torch.export.Dim("rows", min=1), torch.export.Dim("seq", min=1)
    dynamic: Any = ({0: rows, 1: seq}, {0: rows, 1: seq}, {0: rows}, {}, {0: rows}, [{0: rows}] * (2 * count))
    kinds = [f"{kind}_{index}" for index in range(count) for kind in ("key", "value")]
    try:
        with torch.no_grad(), quiet():
            exported = torch.export.export(
                SlotDecoder(model, layout).eval(), arguments, dynamic_shapes=dynamic, strict=False
            )
            program = torch.onnx.export(
                exported,
                arguments,
                dynamo=True,
                opset_version=OPSET,
                input_names=[*STEP_INPUTS, *(f"past_{kind}" for kind in kinds)],
                output_names=["logits", *(f"present_{kind}" for kind in kinds)],
                custom_translation_table=TRANSLATION,
                verbose=False,
            )
    except UnsupportedModel:
        raise
    except Exception as error:
        summary = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModel(
            f"{architecture(model)} cannot be traced: {summary}", "Run again with --debug for the tracer's full report."
        ) from error
    graph = program.model
    nodes = sum(node.op_type == "GroupQueryAttention" for node in graph.graph)
    if nodes != count:
        raise UnsupportedModel(f"{architecture(model)}: the graph has {nodes} cached attentions for {count} layers.")
    return graph


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the tracer's chatter (missing torchvision, deprecations in torch itself) off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
