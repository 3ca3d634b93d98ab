"""An encoder of transformers becomes one ONNX graph from token ids to embeddings or logits, of standard operators only.

The model's own forward is traced with transformers' plainest attention; pooling, dense layers and normalisation are
part of the graph. Operators are fused by ONNX Runtime when it opens the file: attention's scaling and transposes into
its matrix products, bias and GELU. Measured on MiniLM, a graph with com.microsoft's
MultiHeadAttention instead was 3 % slower at 16 to 32 tokens and 3 % faster at 128, and only ONNX Runtime could read it.

Inputs:   input_ids, attention_mask and, where model and tokenizer have it, token_type_ids, all int64 [rows, seq]; rows
          are padded on the right
Outputs:  embedding float32 [rows, dim], or logits float32 [rows, labels]
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from onnxscript import ir
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from export.decoder import OPSET, quiet
from export.encoder_source import CLASSIFICATION, Dense, SentenceSettings
from export.errors import DAMAGED, ENCODERS, SourceError, UnsupportedModel
from export.rewrites import linear_instead_of_conv1d
from export.source import Source

IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"


class SentenceEncoder(nn.Module):  # type: ignore[misc]  # mypy does not follow torch
    """Token states, pooled, and what the checkpoint has behind the pooling."""

    output = "embedding"

    def __init__(self, model: PreTrainedModel, pooling: Sequence[str], head: Sequence[nn.Module]) -> None:
        super().__init__()
        self.model, self.pooling, self.head = model, tuple(pooling), nn.ModuleList(head)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embeddings float32 [rows, dim] of int64 [rows, seq] inputs."""
        states = _run(self.model, input_ids, attention_mask, token_type_ids).last_hidden_state
        pooled = torch.cat([pool(mode, states, attention_mask) for mode in self.pooling], dim=-1)
        for module in self.head:
            pooled = module(pooled)
        return pooled.float()


class SequenceClassifier(nn.Module):  # type: ignore[misc]
    """The model's own classification head, its raw logits."""

    output = "logits"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits float32 [rows, labels] of int64 [rows, seq] inputs."""
        return _run(self.model, input_ids, attention_mask, token_type_ids).logits.float()


class Normalize(nn.Module):  # type: ignore[misc]
    """To unit length (Euclidean)."""

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """The same shape as ``pooled`` [rows, dim]."""
        return nn.functional.normalize(pooled, p=2.0, dim=-1)


def pool(mode: str, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One vector a row, [rows, width], of token states [rows, seq, width]; ``mask`` int64 [rows, seq] counts from 0.

    The modes are sentence-transformers' (https://sbert.net/docs/package_reference/sentence_transformer/models.html).
    """
    if mode == "cls":
        return states[:, 0]
    if mode == "lasttoken":
        last = mask.sum(1) - 1
        return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[-1])).squeeze(1)
    live = mask.unsqueeze(-1).to(states.dtype)
    if mode == "max":
        return states.masked_fill(live == 0, torch.finfo(states.dtype).min).amax(1)
    if mode == "weightedmean":
        live = live * torch.cumsum(mask, 1).unsqueeze(-1).to(states.dtype)
    total, count = (states * live).sum(1), live.sum(1).clamp(min=1e-9)
    return total / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)


def with_head(model: PreTrainedModel, task: str, source: Source, settings: SentenceSettings) -> nn.Module:
    """The module that is traced: the model and what comes behind it.

    Raises:
        SourceError: a dense layer's weights are damaged or do not fit.
    """
    linear_instead_of_conv1d(model)
    if task == CLASSIFICATION:
        return SequenceClassifier(model).eval()
    width = int(model.config.get_text_config().hidden_size) * len(settings.pooling)
    head: list[nn.Module] = []
    for layer in settings.head:
        if layer is None:
            head.append(Normalize())
            continue
        linear = _linear(source, layer, width)
        head += [linear, getattr(nn, layer.activation)()]
        width = linear.out_features
    return SentenceEncoder(model, settings.pooling, head).eval()


def input_names(model: PreTrainedModel, tokenizer_inputs: Sequence[str]) -> tuple[str, ...]:
    """The graph's inputs: segment ids only where both the model and its tokenizer know them.

    Raises:
        UnsupportedModel: the model takes no attention mask, so padding would change what it computes.
    """
    known = inspect.signature(model.forward).parameters
    if MASK not in known:
        raise UnsupportedModel(
            f"{model.config.model_type} takes no attention mask: in a batch, shorter texts would be read with padding.",
            ENCODERS,
        )
    return (IDS, MASK, TYPES) if TYPES in known and TYPES in tokenizer_inputs else (IDS, MASK)


def trace(module: nn.Module, names: Sequence[str], family: str) -> ir.Model:
    """Trace into an ONNX graph (in memory, weights shared with torch where they can be).

    Raises:
        UnsupportedModel: the forward cannot be traced with any number of rows and tokens.
    """
    # Three rows of five tokens, one of them padded: sizes of 0 and 1 would be taken for constants by the tracer.
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1, 3:] = 0
    arguments = (torch.full((3, 5), 4), mask, torch.zeros(3, 5, dtype=torch.long))[: len(names)]
    both = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    output = str(module.output)
    try:
        with torch.no_grad(), quiet():
            exported = torch.export.export(module, arguments, dynamic_shapes=tuple(both for _ in names), strict=False)
            program = torch.onnx.export(
                exported,
                arguments,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(names),
                output_names=[output],
                verbose=False,
            )
    except Exception as error:
        summary = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModel(
            f"{family} cannot be traced: {summary}", "Run again with --debug for the tracer's full report."
        ) from error
    graph: ir.Model = program.model
    for node in graph.graph:  # the tracer names inner values after modules, and one may be called 'embedding'
        for value in node.outputs:
            if value.name == output and not value.is_graph_output():
                value.name = f"{output}.inner"
    return graph


def _run(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None) -> Any:
    segments = {} if types is None else {TYPES: types}
    return model(input_ids=ids, attention_mask=mask, **segments)


def _linear(source: Source, layer: Dense, width: int) -> nn.Linear:
    path = source.path / layer.folder / "model.safetensors"
    try:
        weights = load_file(path)
        matrix, bias = weights["linear.weight"].float(), weights.get("linear.bias")
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None)
        linear.load_state_dict({"weight": matrix} | ({} if bias is None else {"bias": bias.float()}))
    except Exception as error:
        raise SourceError(f"{path} does not hold a dense layer: {error}.", DAMAGED) from error
    if linear.in_features != width:
        raise SourceError(f"{path} takes vectors of {linear.in_features}, but {width} numbers come before it.", DAMAGED)
    return linear
