"""What a model's attention looks like, learnt by running its own forward once.

Reading ``config.json`` would need a rule for each family; the attention interface of transformers already receives
every number that counts. A probe is registered as the attention implementation, the model's forward runs on two tokens,
and each call leaves one `AttentionLayer`. What the slot-cache graph cannot express is refused here, by name, before
anything is traced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from export.errors import UnsupportedModel

PROBE = "truthgpt_probe"

# Keyword arguments of the attention interface that do not change what a causal, cached attention computes at inference.
_HARMLESS = frozenset(
    {
        "cache_position",
        "dropout",
        "is_causal",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer's static properties.

    ``sliding_window`` counts the positions that a token attends to, itself included (None: all of them).
    ``softcap`` caps the attention scores (0.0: off).
    """

    index: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    sliding_window: int | None


@dataclass(frozen=True)
class Layout:
    """The attention layers of a model, in the order of their layer index."""

    layers: tuple[AttentionLayer, ...]

    @property
    def kv_heads(self) -> int:
        """Key/value heads of every layer."""
        return self.layers[0].kv_heads

    @property
    def head_dim(self) -> int:
        """Width of one head, in elements."""
        return self.layers[0].head_dim


@contextmanager
def attention(model: PreTrainedModel, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Run the model with ``function`` as its attention, and put the former implementation back afterwards."""
    former = model.config._attn_implementation or "eager"
    AttentionInterface.register(name, function)
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise _outside_interface(model)
        yield
    finally:
        model.set_attn_implementation(former)
        AttentionInterface.register(name, _retired)  # the registry is global and would keep the model alive


def _retired(*_: Any, **__: Any) -> Any:
    raise AssertionError("an attention function was called outside its `attention` block")


def probe(model: PreTrainedModel) -> Layout:
    """Run the model once on two tokens and describe its attention layers.

    Raises:
        UnsupportedModel: something that the slot-cache graph cannot express, named in the message.
    """
    name = architecture(model)
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModel(f"{name} takes no position_ids, so cached decoding cannot place its tokens.", _HINT)
    if not isinstance(model.get_output_embeddings(), torch.nn.Module):
        raise UnsupportedModel(f"{name} has no output embeddings, so it is not a causal language model.", _HINT)
    calls: list[AttentionLayer] = []

    def record(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        _refuse_extras(name, module, query, value, attention_mask, kwargs)
        index = getattr(module, "layer_idx", None)
        calls.append(
            AttentionLayer(
                index=len(calls) if index is None else int(index),
                heads=query.shape[1],
                kv_heads=key.shape[1],
                head_dim=query.shape[3],
                scale=query.shape[3] ** -0.5 if scaling is None else float(scaling),
                softcap=float(softcap or 0.0),
                sliding_window=int(sliding_window) if sliding_window else None,
            )
        )
        return query.transpose(1, 2).contiguous(), None

    with attention(model, PROBE, record), torch.no_grad():
        tokens = torch.zeros(1, 2, dtype=torch.long)
        try:
            model(input_ids=tokens, position_ids=torch.arange(2)[None], use_cache=False)
        except UnsupportedModel:
            raise
        except Exception as error:
            raise UnsupportedModel(f"{name} does not run behind the attention interface: {error}", _HINT) from error
    return _layout(name, calls, int(model.config.get_text_config().num_hidden_layers))


def architecture(model: PreTrainedModel) -> str:
    """The family's name as ``config.json`` spells it (``model_type``)."""
    return str(model.config.model_type)


_HINT = "GPT-2 and Llama families are exported; see the README for what else is known to work."


def _outside_interface(model: PreTrainedModel) -> UnsupportedModel:
    return UnsupportedModel(
        f"{architecture(model)} computes attention outside transformers' attention interface.", _HINT
    )


def _refuse_extras(
    name: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    if mask is not None:
        raise UnsupportedModel(f"{name} adds a bias or mask of its own to the attention scores.", _HINT)
    if getattr(module, "is_causal", True) is False or kwargs.get("is_causal") is False:
        raise UnsupportedModel(f"{name} has an attention that is not causal.", _HINT)
    if value.shape[3] != query.shape[3]:
        raise UnsupportedModel(f"{name} has value heads of another width than its query heads.", _HINT)
    if query.shape[3] % 8:
        raise UnsupportedModel(f"{name} has heads of width {query.shape[3]}, which is not a multiple of 8.", _HINT)
    unknown = sorted(key for key, given in kwargs.items() if given is not None and key not in _HARMLESS)
    if unknown:
        raise UnsupportedModel(f"{name} hands '{unknown[0]}' to its attention, which the graph cannot express.", _HINT)


def _layout(name: str, calls: list[AttentionLayer], layers: int) -> Layout:
    ordered = sorted(calls, key=lambda layer: layer.index)
    if [layer.index for layer in ordered] != list(range(layers)):
        raise UnsupportedModel(
            f"{name} has {layers} layers but {len(calls)} calls of the attention interface, "
            "so a part of its attention would ignore the cache.",
            _HINT,
        )
    if len({(layer.kv_heads, layer.head_dim) for layer in ordered}) != 1:
        raise UnsupportedModel(f"{name} has layers with key/value caches of different shapes.", _HINT)
    return Layout(tuple(ordered))
