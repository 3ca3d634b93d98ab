"""Which positions a token attends to, by the rule that transformers builds its masks with.

transformers describes a mask by a function of (row, head, query position, key position). While a model is probed, its
masks are filled with a number that says which rule each came from; the rule itself is then evaluated over the whole
length of a sequence, which a forward on two tokens could never show.
Source: transformers.masking_utils
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from export.errors import HINT, UnsupportedModel

QUERIES = 512  # query positions that are looked at, spread over the length


class MaskRecorder:
    """Builds masks for the probe and knows, for each, the sliding window that its rule amounts to."""

    def __init__(self, family: str, max_len: int) -> None:
        self._family, self._max_len = family, max_len
        self._rules: list[Callable[..., torch.Tensor]] = []
        self._windows: dict[int, int | None] = {}

    def build(self, batch_size: int, q_length: int, kv_length: int, mask_function: Any, **_: Any) -> torch.Tensor:
        """transformers' mask interface: a float mask [rows, 1, queries, keys], here full of its rule's number."""
        self._rules.append(mask_function)
        return torch.full((batch_size, 1, q_length, kv_length), float(len(self._rules) - 1))

    def window(self, mask: torch.Tensor) -> int | None:
        """The positions a token attends to under a mask made by `build`, itself included; None for all.

        Raises:
            UnsupportedModel: the model changed the mask, or it is neither causal nor a causal sliding window.
        """
        number = int(mask.reshape(-1)[0])
        if not (mask == number).all() or number >= len(self._rules):
            raise UnsupportedModel(f"{self._family} adds a bias or mask of its own to the attention scores.", HINT)
        if number not in self._windows:
            self._windows[number] = self._judge(self._rules[number])
        return self._windows[number]

    def _judge(self, rule: Callable[..., torch.Tensor]) -> int | None:
        step = max(1, self._max_len // QUERIES)
        queries = torch.arange(self._max_len - 1, -1, -step)[:, None]
        keys = torch.arange(self._max_len)[None]
        first = torch.zeros((), dtype=torch.long)
        try:
            allowed = torch.as_tensor(rule(first, first, queries, keys)).expand(queries.shape[0], self._max_len)
        except Exception as error:
            raise UnsupportedModel(f"{self._family} has an attention mask that cannot be read.", HINT) from error
        window = int(allowed[0].sum())
        if not torch.equal(allowed, (keys <= queries) & (keys > queries - window)):
            raise UnsupportedModel(
                f"{self._family} attends in a pattern that is neither causal nor a causal sliding window "
                f"within {self._max_len} tokens.",
                "A smaller --max-len may stay inside its first block. " + HINT,
            )
        return window if window < self._max_len else None
