"""What a model's attention looks like, learnt by running its own forward once.

Reading ``config.json`` would need a rule for each family; the attention interface of transformers already receives
every number that counts. A probe is registered as the attention implementation and as the builder of its masks, the
model's forward runs on two tokens, and each call leaves one `AttentionLayer`. The masks are judged by the rule that
makes them, over the whole length of a sequence, so a pattern that shows only after thousands of tokens is known as
well. What the slot-cache graph cannot express is refused here, by name, before anything is traced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from export.errors import HINT, UnsupportedModel
from export.masks import MaskRecorder
from export.outside import TAKES_NO_POSITIONS, is_outside, routed
from export.rewrites import require_fixed_rotary

PROBE = "truthgpt_probe"
ALIBI_DIMS = 2  # extra dimensions of a key that hold its position; see export.decoder

# Families whose experts are chosen in a way that the tracer cannot follow.
_UNTRACEABLE_EXPERTS = frozenset({"aria_text", "longcat_flash", "phimoe"})

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

    ``head_dim`` and ``value_dim`` are the widths of a query (or key) and of a value head. ``sliding_window`` counts the
    positions that a token attends to, itself included (None: all of them). ``softcap`` caps the attention scores (0.0:
    off). ``sinks``: a learnt score for each head joins the softmax. ``alibi``: one slope for each head, by which a
    score grows with every position (None: off).
    """

    index: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    softcap: float
    sliding_window: int | None
    sinks: bool = False
    alibi: tuple[float, ...] | None = None

    @property
    def cache_dim(self) -> int:
        """Width of a head in the cache: keys and values are as wide as the wider, in multiples of eight."""
        position = ALIBI_DIMS if self.alibi else 0
        return -(-max(self.head_dim + position, self.value_dim) // 8) * 8


@dataclass(frozen=True)
class Layout:
    """The attention layers of a model, in the order of their layer index."""

    layers: tuple[AttentionLayer, ...]
    takes_positions: bool = True

    @property
    def caches(self) -> list[tuple[int, int]]:
        """(key/value heads, width of a head) of every layer's cache."""
        return [(layer.kv_heads, layer.cache_dim) for layer in self.layers]


@contextmanager
def attention(
    model: PreTrainedModel, name: str, function: Callable[..., Any], mask: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Run the model with ``function`` as its attention (and ``mask`` building its masks), and restore it afterwards.

    Without ``mask`` the model builds none: the attention is causal by itself.
    """
    if is_outside(model):
        with routed(model, function):
            yield
        return
    former = model.config._attn_implementation or "eager"
    AttentionInterface.register(name, function)
    if mask is not None:
        AttentionMaskInterface.register(name, mask)
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise _outside_interface(model)
        yield
    finally:
        model.set_attn_implementation(former)
        AttentionInterface.register(name, _retired)  # the registries are global and would keep the model alive
        if mask is not None:
            AttentionMaskInterface.register(name, _retired)


def _retired(*_: Any, **__: Any) -> Any:
    raise AssertionError("an attention function was called outside its `attention` block")


def probe(model: PreTrainedModel, max_len: int) -> Layout:
    """Run the model once on two tokens and describe its attention layers, for sequences of up to ``max_len`` tokens.

    Raises:
        UnsupportedModel: something that the slot-cache graph cannot express, named in the message.
    """
    name = architecture(model)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if not takes_positions and name not in TAKES_NO_POSITIONS:
        raise UnsupportedModel(f"{name} takes no position_ids, so cached decoding cannot place its tokens.", HINT)
    if name in _UNTRACEABLE_EXPERTS:
        raise UnsupportedModel(f"{name} sorts its tokens by experts, which no fixed graph can do.", HINT)
    if not isinstance(model.get_output_embeddings(), torch.nn.Module):
        raise UnsupportedModel(f"{name} has no output embeddings, so it is not a causal language model.", HINT)
    require_fixed_rotary(model, max_len)
    calls: list[AttentionLayer] = []
    masks = MaskRecorder(name, max_len)

    def record(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        s_aux: torch.Tensor | None = None,
        alibi: Callable[[], tuple[float, ...]] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        _refuse_extras(name, module, query, s_aux, kwargs)
        index = getattr(module, "layer_idx", None)
        window = int(sliding_window) if sliding_window else None
        calls.append(
            AttentionLayer(
                index=len(calls) if index is None else int(index),
                heads=query.shape[1],
                kv_heads=key.shape[1],
                head_dim=query.shape[3],
                value_dim=value.shape[3],
                scale=query.shape[3] ** -0.5 if scaling is None else float(scaling),
                softcap=float(softcap or 0.0),
                # The mask is what transformers' own plain attention goes by; the argument only informs other kernels.
                sliding_window=window if attention_mask is None else masks.window(attention_mask),
                sinks=s_aux is not None,
                alibi=None if alibi is None else alibi(),
            )
        )
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    def last_logits(first: int) -> torch.Tensor:
        tokens = torch.tensor([[first, 0]])
        positions = {"position_ids": torch.arange(2)[None]} if takes_positions else {}
        logits: torch.Tensor = model(input_ids=tokens, **positions, use_cache=False).logits[0, -1]
        return logits

    with attention(model, PROBE, record, masks.build), torch.no_grad(), _Complex() as complex_numbers:
        try:
            logits = last_logits(0)
            found = tuple(calls)
            alone = torch.allclose(logits, last_logits(1), rtol=1e-4, atol=1e-5, equal_nan=True)
        except UnsupportedModel:
            raise
        except Exception as error:
            raise UnsupportedModel(f"{name} does not run behind the attention interface: {error}", HINT) from error
    if complex_numbers.seen:
        raise UnsupportedModel(f"{name} computes with complex numbers, which ONNX does not have.", HINT)
    # The probe's attention lets nothing through, so only something else can have told one token of the other.
    if not alone:
        raise UnsupportedModel(
            f"{name} mixes tokens outside its attention (a recurrence, a convolution): the cache has no place for it.",
            HINT,
        )
    layers = int(model.config.get_text_config().num_hidden_layers)
    return Layout(_in_order(name, found, layers), takes_positions)


class _Complex(TorchDispatchMode):  # type: ignore[misc]  # mypy does not follow torch
    """Watches a forward for complex numbers."""

    seen = False

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), kwargs: Any = None) -> Any:
        result = function(*arguments, **(kwargs or {}))
        self.seen = self.seen or (isinstance(result, torch.Tensor) and result.is_complex())
        return result


def architecture(model: PreTrainedModel) -> str:
    """The family's name as ``config.json`` spells it (``model_type``)."""
    return str(model.config.model_type)


def _outside_interface(model: PreTrainedModel) -> UnsupportedModel:
    return UnsupportedModel(
        f"{architecture(model)} computes attention outside transformers' attention interface.", HINT
    )


def _refuse_extras(
    name: str, module: torch.nn.Module, query: torch.Tensor, sinks: torch.Tensor | None, kwargs: dict[str, Any]
) -> None:
    if getattr(module, "is_causal", True) is False or kwargs.get("is_causal") is False:
        raise UnsupportedModel(f"{name} has an attention that is not causal.", HINT)
    if sinks is not None and sinks.numel() != query.shape[1]:
        raise UnsupportedModel(f"{name} has attention sinks that are not one score a head.", HINT)
    unknown = sorted(key for key, given in kwargs.items() if given is not None and key not in _HARMLESS)
    if unknown:
        raise UnsupportedModel(f"{name} hands '{unknown[0]}' to its attention, which the graph cannot express.", HINT)


def _in_order(name: str, calls: tuple[AttentionLayer, ...], layers: int) -> tuple[AttentionLayer, ...]:
    ordered = sorted(calls, key=lambda layer: layer.index)
    if [layer.index for layer in ordered] != list(range(layers)):
        raise UnsupportedModel(
            f"{name} has {layers} layers but {len(calls)} calls of the attention interface, "
            "so a part of it would ignore the cache.",
            HINT,
        )
    return tuple(ordered)
