"""Families whose attention is not behind transformers' attention interface: the same call, put in by hand.

Each keeps its own projections and positions; only the product of queries, keys and values is replaced, in the instance
and for as long as a context lasts. An adapter calls ``attend`` as the interface would: queries, keys and values
[rows, heads, seq, head_dim] in, [rows, seq, heads, head_dim] out. ALiBi's slopes are handed on as a function: they are
asked for while probing, when tensors still have values, and not while tracing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from export.errors import HINT, UnsupportedModel

Attend = Callable[..., tuple[torch.Tensor, None]]
Slopes = tuple[float, ...]
# Their attention counts positions by itself (ALiBi), so nothing has to be told them.
TAKES_NO_POSITIONS = frozenset({"bloom", "mpt"})


def is_outside(model: PreTrainedModel) -> bool:
    """Whether the model's family has an adapter here."""
    return model.config.model_type in _FAMILIES


@contextmanager
def routed(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    """Let every attention of the model call ``attend``."""
    name, method, adapter = _FAMILIES[model.config.model_type]
    modules = [module for module in model.modules() if type(module).__name__ == name]
    for module in modules:
        setattr(module, method, adapter(module, attend))
    try:
        yield
    finally:
        for module in modules:
            delattr(module, method)


def _scaled(module: nn.Module, attend: Attend) -> Callable[..., Any]:
    # GPT-J and CodeGen: _attn(query, key, value, mask), divided by scale_attn.
    def attn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None]:
        output, _weights = attend(module, query, key, value, None, scaling=1.0 / float(module.scale_attn))
        return output.transpose(1, 2), None

    return attn


def _gpt_neo(module: nn.Module, attend: Attend) -> Callable[..., Any]:
    window = module.config.window_size if module.attention_type == "local" else None

    def attn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None]:
        output, _weights = attend(module, query, key, value, None, scaling=1.0, sliding_window=window)
        return output.transpose(1, 2), None

    return attn


def _openai(module: nn.Module, attend: Attend) -> Callable[..., Any]:
    # Its keys come transposed for the product.
    def attn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> list[torch.Tensor]:
        scale = value.shape[-1] ** -0.5 if module.scale else 1.0
        output, _weights = attend(module, query, key.transpose(2, 3), value, None, scaling=scale)
        return [output.transpose(1, 2)]

    return attn


def _xglm(module: nn.Module, attend: Attend) -> Callable[..., Any]:
    def forward(hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        rows, seq, width = hidden_states.shape
        query = module.q_proj(hidden_states) * module.scaling
        heads = [
            projected.view(rows, seq, module.num_heads, module.head_dim).transpose(1, 2)
            for projected in (query, module.k_proj(hidden_states), module.v_proj(hidden_states))
        ]
        output, _weights = attend(module, *heads, None, scaling=1.0)
        return module.out_proj(output.reshape(rows, seq, width)), None

    return forward


def _bloom(module: nn.Module, attend: Attend) -> Callable[..., Any]:
    build = sys.modules[type(module).__module__].build_alibi_tensor

    def alibi() -> Slopes:
        return _slopes(build(torch.ones(1, 2), module.num_heads, torch.float32))

    def forward(hidden_states: torch.Tensor, residual: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        query, key, value = module._reshape(module.query_key_value(hidden_states))
        output, _weights = attend(module, query, key, value, None, scaling=module.inv_norm_factor, alibi=alibi)
        return residual + module.dense(output.reshape(hidden_states.shape)), None

    return forward


def _mpt(module: nn.Module, attend: Attend) -> Callable[..., Any]:
    build = sys.modules[type(module).__module__].build_mpt_alibi_tensor

    def alibi() -> Slopes:
        return _slopes(build(module.n_heads, 2))

    def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        rows, seq, width = hidden_states.shape
        packed = module.Wqkv(hidden_states)
        if module.clip_qkv:
            packed = packed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
        heads = [part.view(rows, seq, module.n_heads, -1).transpose(1, 2) for part in packed.chunk(3, dim=2)]
        output, _weights = attend(module, *heads, None, scaling=float(module.softmax_scale), alibi=alibi)
        return module.out_proj(output.reshape(rows, seq, width)), None

    return forward


def _falcon(module: nn.Module, attend: Attend) -> Callable[..., Any]:
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb

    def forward(
        hidden_states: torch.Tensor, alibi: Any, *_: Any, position_embeddings: Any = None, **__: Any
    ) -> tuple[torch.Tensor, None]:
        if alibi is not None:
            raise UnsupportedModel(
                "falcon with ALiBi rounds its position biases to bfloat16, which the graph cannot express.", HINT
            )
        rows, seq, width = hidden_states.shape
        packed = module.query_key_value(hidden_states)
        if module.new_decoder_architecture:
            # A group is its queries, one key and one value.
            packed = packed.view(rows, seq, module.num_kv_heads, -1, module.head_dim)
            query, key, value = packed[..., :-2, :].flatten(2, 3), packed[..., -2, :], packed[..., -1, :]
        else:
            query, key, value = module._split_heads(packed)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        query, key = rotate(query, key, *position_embeddings)
        output, _weights = attend(module, query, key, value, None, scaling=float(module.inv_norm_factor))
        return module.dense(output.reshape(rows, seq, width)), None

    return forward


def _slopes(alibi: torch.Tensor) -> Slopes:
    """The slope of each head from a bias [heads, 1, 2] over two positions."""
    return tuple(float(slope) for slope in alibi[:, 0, 1] - alibi[:, 0, 0])


# model_type: the class of its attention, the method to replace, the adapter.
_FAMILIES: dict[str, tuple[str, str, Callable[[nn.Module, Attend], Callable[..., Any]]]] = {
    "bloom": ("BloomAttention", "forward", _bloom),
    "codegen": ("CodeGenAttention", "_attn", _scaled),
    "falcon": ("FalconAttention", "forward", _falcon),
    "gpt_neo": ("GPTNeoSelfAttention", "_attn", _gpt_neo),
    "gptj": ("GPTJAttention", "_attn", _scaled),
    "mpt": ("MptAttention", "forward", _mpt),
    "openai-gpt": ("Attention", "_attn", _openai),
    "xglm": ("XGLMAttention", "forward", _xglm),
}
