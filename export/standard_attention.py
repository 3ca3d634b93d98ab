"""Attention over a slot's past in standard ONNX operators only, for runtimes that know no GroupQueryAttention.

It has the inputs and outputs of `export.slot_attention`, so the same runner runs either graph: the presents are the
pasts with the new keys and values scattered in behind what the slot holds. The past is read at positions below its live
length and written at positions from there on, so past and present may be the same memory, whatever order a runtime
chooses.
"""

from __future__ import annotations

import torch


def standard_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    past_length: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    sliding_window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal attention of the new tokens over the live past and themselves.

    Rows may be padded on the right: a live token never looks to its right, and what the padding computes is nobody's.

    Args:
        query: [rows, heads, seq, head_dim].
        key, value: [rows, kv_heads, seq, head_dim]; ``heads`` is a multiple of ``kv_heads``.
        past_key, past_value: [rows, kv_heads, max_len, head_dim], of any content behind the live length.
        past_length: int64 [rows], positions of the past that are live.
        sinks: float32 [heads], a score that joins each head's softmax without a value of its own; None for none.
        softcap: 0.0 for none, else scores become ``softcap · tanh(score / softcap)``.
        sliding_window: positions a token attends to, itself included; None for all.

    Returns:
        The output [rows, seq, heads, head_dim], present_key and present_value.
    """
    rows, heads, seq, width = query.shape
    kv_heads, max_len = past_key.shape[1:3]
    group = heads // kv_heads
    # Query heads that share a key head become further rows of one product: no key is repeated in memory.
    grouped = (query * scale).reshape(rows, kv_heads, group * seq, width)
    live, visible = _masks(past_length, torch.arange(seq).repeat(group), seq, max_len, sliding_window)
    old, new = (_scores(grouped, keys, softcap) for keys in (past_key, key))
    # Masked scores are replaced, not added to: what a reused slot still holds may be infinite or NaN.
    lowest = torch.full((), torch.finfo(torch.float32).min)
    scores = [torch.where(live, old, lowest), torch.where(visible, new, lowest)]
    if sinks is not None:
        scores.append(sinks.view(kv_heads, group, 1).expand(rows, -1, -1, seq).reshape(rows, kv_heads, group * seq, 1))
    weights = torch.softmax(torch.cat(scores, dim=-1), dim=-1).to(value.dtype)
    of_past, of_new = weights[..., :max_len], weights[..., max_len : max_len + seq]
    held = (torch.arange(max_len) < past_length[:, None])[:, None, :, None]
    # 0 × NaN is NaN: a weight of zero does not keep a dead position out.
    output = of_past @ torch.where(held, past_value, torch.zeros((), dtype=past_value.dtype)) + of_new @ value
    where = (past_length[:, None] + torch.arange(seq))[:, None, :, None]
    presents = [
        past.scatter(2, where.expand(-1, kv_heads, -1, fresh.shape[3]), fresh.to(past.dtype))
        for past, fresh in ((past_key, key), (past_value, value))
    ]
    output = output.unflatten(2, (group, seq)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return output, presents[0], presents[1]


def _scores(query: torch.Tensor, keys: torch.Tensor, softcap: float) -> torch.Tensor:
    """float32 [rows, kv_heads, group × seq, keys]."""
    scores = (query @ keys.to(query.dtype).transpose(2, 3)).float()
    return torch.tanh(scores / softcap) * softcap if softcap else scores


def _masks(
    past_length: torch.Tensor, token: torch.Tensor, seq: int, max_len: int, sliding_window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the queries of the new tokens ``token`` [queries] see.

    Of the past as bool [rows, 1, queries or 1, max_len], of the new tokens as bool [queries, seq].
    """
    position = torch.arange(max_len)
    length = past_length[:, None, None, None]
    live = position < length
    behind = token[:, None] - torch.arange(seq)
    visible = behind >= 0
    if sliding_window is not None:
        live = live & (length + token[:, None] - position < sliding_window)
        visible = visible & (behind < sliding_window)
    return live, visible
