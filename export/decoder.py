"""A causal LM of transformers becomes an ONNX graph whose KV cache lives in slots.

The model's own forward is traced, untouched. Only two things are put in from outside: the attention (through
``transformers.AttentionInterface``), which becomes ONNX Runtime's GroupQueryAttention reading and writing the slots
(or, for the target tensorrt, standard operators that do the same), and a gather of the wanted positions right in front
of the output embeddings, so that logits are computed for them only and whatever the model does after them (scaling,
soft-capping) is kept. Mostly that is each row's last live position; a draft to be verified wants all of its own.

Inputs:   input_ids int64 [rows, seq] · position_ids int64 [rows, seq] · seqlens_k int32 [rows] (total length − 1) ·
          total_sequence_length int32 [] (maximum over the rows) · last_index int64 [rows, picks] (positions of this
          call whose logits are wanted, the row's last live one at the end) ·
          past_key_{i}, past_value_{i} float32 [rows, kv_heads, max_len, head_dim] (of layer i)
Outputs:  logits float32 [rows × picks, vocab] · present_key_{i}, present_value_{i} (to be bound to the past's memory)
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

from export.errors import HINT, UnsupportedModel
from export.packing import pack
from export.probe import ALIBI_DIMS, AttentionLayer, Layout, architecture, attention
from export.rewrites import rewrite
from export.slot_attention import TRANSLATION, slot_attention
from export.standard_attention import standard_attention

OPSET = 21
SLOTS = "truthgpt_slots"
STEP_INPUTS = ("input_ids", "position_ids", "seqlens_k", "total_sequence_length", "last_index")


class SlotDecoder(nn.Module):  # type: ignore[misc]  # mypy does not follow torch
    """The model's forward with slots for a cache: what is handed to the tracer."""

    def __init__(self, model: PreTrainedModel, layout: Layout, standard_operators: bool = False) -> None:
        super().__init__()
        self.model = model
        self.layout = layout
        self.standard_operators = standard_operators

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        seqlens_k: torch.Tensor,
        total_sequence_length: torch.Tensor,
        last_index: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """Logits float32 [rows × picks, vocab]; the presents, in the order of ``past`` (key 0, value 0, key 1, …)."""
        present: list[torch.Tensor | None] = [None] * len(past)
        calls = 0

        def attend(
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            *_: Any,
            s_aux: torch.Tensor | None = None,
            **__: Any,
        ) -> tuple[torch.Tensor, None]:
            nonlocal calls
            index = getattr(module, "layer_idx", None)
            layer = self.layout.layers[calls if index is None else index]
            calls += 1
            where = 2 * layer.index
            rows, heads, seq, _width = query.shape
            if layer.alibi is not None:
                query, key = with_positions(query, key, position_ids, layer)
            query, key, value = (_padded(part, layer.cache_dim) for part in (query, key, value))
            sinks = None if s_aux is None else s_aux.reshape(heads).float()
            if self.standard_operators:
                output, present[where], present[where + 1] = standard_attention(
                    query, key, value, past[where], past[where + 1], (seqlens_k - last_index[:, -1]).long(), sinks,
                    layer.scale, layer.softcap, layer.sliding_window,
                )  # fmt: skip
                return output[..., : layer.value_dim], None
            output, present[where], present[where + 1] = slot_attention(
                _packed(query),
                _packed(key),
                _packed(value),
                past[where],
                past[where + 1],
                seqlens_k,
                total_sequence_length,
                sinks,
                heads,
                layer.kv_heads,
                layer.scale,
                layer.softcap,
                layer.sliding_window or -1,
            )
            output = output.view(rows, seq, heads, layer.cache_dim)
            return output if layer.value_dim == layer.cache_dim else output[..., : layer.value_dim], None

        def wanted_positions(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden = arguments[0]
            where = last_index[:, :, None].expand(-1, -1, hidden.shape[-1])
            # Two dimensions, so that the product writes the graph's output where it is to lie.
            return (hidden.gather(1, where).flatten(0, 1), *arguments[1:])

        hook = self.model.get_output_embeddings().register_forward_pre_hook(wanted_positions)
        try:
            with attention(self.model, SLOTS, attend):
                positions = {"position_ids": position_ids} if self.layout.takes_positions else {}
                logits = self.model(input_ids=input_ids, **positions, use_cache=False).logits
        finally:
            hook.remove()
        if calls != len(self.layout.layers) or any(tensor is None for tensor in present):
            raise UnsupportedModel(
                f"{architecture(self.model)} did not call its attention once a layer while tracing.", HINT
            )
        return (logits.float(), *(tensor for tensor in present if tensor is not None))


def with_positions(
    query: torch.Tensor, key: torch.Tensor, position_ids: torch.Tensor, layer: AttentionLayer
) -> tuple[torch.Tensor, torch.Tensor]:
    """ALiBi as two more dimensions of each head: a key holds its position, a query its head's slope.

    The bias is slope × the key's position; what the query's own position would add is the same for all keys and does
    not change the softmax. Two dimensions (position = 128 × high + low), because bfloat16 counts exactly no further
    than 256.
    """
    rows, heads, seq, _ = query.shape
    slopes = torch.tensor(layer.alibi, dtype=query.dtype)[None, :, None, None] / layer.scale
    slopes = torch.cat([128 * slopes, slopes], dim=-1).expand(rows, heads, seq, ALIBI_DIMS)
    high = torch.div(position_ids, 128, rounding_mode="floor")
    position = torch.stack([high, position_ids - 128 * high], dim=-1).to(key.dtype)
    position = position[:, None].expand(rows, key.shape[1], seq, ALIBI_DIMS)
    return torch.cat([query, slopes], dim=-1), torch.cat([key, position], dim=-1)


def _padded(heads: torch.Tensor, width: int) -> torch.Tensor:
    """[rows, heads, seq, head_dim] with zeros behind each head, up to ``width``."""
    missing = width - heads.shape[3]
    return nn.functional.pad(heads, (0, missing)) if missing else heads


def _packed(heads: torch.Tensor) -> torch.Tensor:
    """[rows, heads, seq, width] -> [rows, seq, heads × width], GroupQueryAttention's layout."""
    rows, count, seq, width = heads.shape
    return heads.transpose(1, 2).reshape(rows, seq, count * width)


def trace(model: PreTrainedModel, layout: Layout, max_len: int, standard_operators: bool = False) -> ir.Model:
    """Trace the model into an ONNX graph (in memory, weights shared with torch where they can be).

    With ``standard_operators`` the graph has no operator of ONNX Runtime's own: see `export.standard_attention`.

    Raises:
        UnsupportedModel: the forward cannot be traced, or the cache would not be used by every layer.
    """
    rewrite(model)
    count = len(layout.layers)
    # Never written, so never backed by memory.
    past = [torch.empty(2, heads, max_len, width) for heads, width in layout.caches for _ in ("key", "value")]
    # Two rows of three tokens: sizes of 0 and 1 would be taken for constants by the tracer.
    arguments = (
        torch.zeros(2, 3, dtype=torch.long),
        torch.arange(3).expand(2, 3).contiguous(),
        torch.full((2,), 2, dtype=torch.int32),
        torch.tensor(3, dtype=torch.int32),
        torch.tensor([[1, 2], [1, 2]]),
        past,
    )
    rows, seq = torch.export.Dim("rows", min=1), torch.export.Dim("seq", min=1, max=max_len)
    picks = torch.export.Dim("picks", min=1, max=max_len)
    last: Any = {0: rows, 1: picks}
    dynamic: Any = ({0: rows, 1: seq}, {0: rows, 1: seq}, {0: rows}, {}, last, [{0: rows}] * (2 * count))
    kinds = [f"{kind}_{index}" for index in range(count) for kind in ("key", "value")]
    try:
        with torch.no_grad(), quiet():
            exported = torch.export.export(
                SlotDecoder(model, layout, standard_operators).eval(), arguments, dynamic_shapes=dynamic, strict=False
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
    # Each layer has one GroupQueryAttention, or scatters one key and one value.
    nodes = sum(node.op_type == "GroupQueryAttention" for node in graph.graph)
    if standard_operators:
        nodes = sum(node.op_type == "ScatterElements" for node in graph.graph) // 2
    if nodes != count:
        raise UnsupportedModel(
            f"{architecture(model)}: the graph has {nodes} cached attentions for {count} layers.", HINT
        )
    pack(graph)
    return graph


def cache_shapes(graph: ir.Model) -> dict[str, list[int]]:
    """The graph's ``past_*`` inputs and their dimensions behind the rows: [kv_heads, max_len, width of a head]."""
    return {
        str(value.name): [int(str(size)) for size in value.shape[1:]]
        for value in graph.graph.inputs
        if value.shape is not None and str(value.name).startswith("past_")
    }


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
