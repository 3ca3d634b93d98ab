"""What is done to some tokens' logits before one is picked: bias, penalties, end tokens that may not come yet.

The rules are those of transformers' LogitsProcessors (repetition penalty, minimum of new tokens) and of the OpenAI API
(bias, presence and frequency penalty). Each concerns few tokens, so a table of those is kept and the rest of a row is
never touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Ids

import numpy as np
from numpy.typing import NDArray

from .request import SamplingParams

LARGEST = float(np.finfo(np.float32).max)
TABLE = np.dtype(
    {"names": ["id", "bias", "count", "seen", "ends"], "formats": [np.intp, "f8", "f8", np.bool_, np.bool_]}, align=True
)


class Edits:
    """The tokens of one sequence whose logits are changed, and how. `end` are those that may not come before
    `min_tokens` others; ids beyond the vocabulary are left out.
    """

    def __init__(self, params: SamplingParams, prompt: Ids[int], end: Iterable[int], vocab_size: int) -> None:
        self._how = params
        self._repeats = params.repetition_penalty != 1.0
        self._counts = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._always = bool(self._repeats or self._counts or params.logit_bias)
        ends = set(end) if params.min_tokens else set()
        seen = set(prompt) if self._repeats else set()
        bias = dict(params.logit_bias)
        ids = [token for token in seen | ends | bias.keys() if token < vocab_size]
        rows = [(token, bias.get(token, 0.0), 0, token in seen, token in ends) for token in ids]
        self._place = {token: place for place, token in enumerate(ids)}
        self._table = np.array(rows, TABLE)

    def accept(self, token: int) -> None:
        """Count a token that was generated."""
        if not (self._repeats or self._counts):
            return
        place = self._place.get(token)
        if place is None:
            place = self._place[token] = len(self._place)
            if place == self._table.size:
                self._table = np.concatenate([self._table, np.zeros(max(64, place), TABLE)])
            self._table[place]["id"] = token
        entry = self._table[place]
        entry["seen"] = True
        entry["count"] += 1

    def apply(self, row: NDArray[np.float32], generated: int) -> tuple[NDArray[np.intp], NDArray[np.float32]] | None:
        """Change float32 [vocab] in place after so many tokens were generated. Ids and logits of what was there before,
        or None where nothing changes.
        """
        barred = generated < self._how.min_tokens
        table = self._table[: len(self._place)]
        if not table.size or not (barred or self._always):
            return None
        ids = table["id"]
        before = row[ids]
        values = before + table["bias"]
        if self._repeats:
            penalty = self._how.repetition_penalty
            punished = np.where(values < 0, values * penalty, values / penalty)
            # a penalty near 0 makes no infinity of a finite logit
            np.clip(punished, -LARGEST, LARGEST, out=punished, where=np.isfinite(before))
            values = np.where(table["seen"], punished, values)
        if self._counts:
            count = table["count"]
            values -= count * self._how.frequency_penalty + (count > 0) * self._how.presence_penalty
        if barred:
            values[table["ends"]] = -np.inf
        row[ids] = values
        return ids, before
