"""From logits to tokens. Rows are independent: a row's token depends on its logits and its own state only."""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidArgument
from .picking import log_probabilities, sample
from .processors import Edits
from .request import SamplingParams


@dataclass(frozen=True, slots=True)
class Pick:
    """A token that was picked. `logprob` is its log-probability, `top` the likeliest tokens with theirs, the likeliest
    first: both of the model's raw logits, and only where the request asks for them.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class State:
    """How one sequence's tokens are picked, and what that depends on: its random state and the tokens so far.

    `end` are the tokens that end the answer, the request's own among them.
    """

    def __init__(self, params: SamplingParams, prompt: Rows[int], end: frozenset[int], vocab_size: int) -> None:
        """Raises InvalidArgument for a token id that is not in the vocabulary, and where no token could come first."""
        for name, ids in (
            ("logit_bias", [token for token, _ in params.logit_bias]),
            ("stop_token_ids", params.stop_token_ids),
        ):
            bad = next((t for t in ids if t >= vocab_size), None)
            if bad is not None:
                raise InvalidArgument(f"{name} has {bad}, the vocabulary is 0 to {vocab_size - 1}")
        self.params = params
        self.end = end | frozenset(params.stop_token_ids)
        self.random = np.random.Generator(np.random.PCG64(params.seed % 2**64))
        if params.min_tokens and self.end.issuperset(range(vocab_size)):
            raise InvalidArgument("min_tokens needs a token that does not end the answer: stop_token_ids leaves none")
        self.edits = Edits(params, prompt, self.end, vocab_size)
        self.generated = 0

    def accept(self, token: int) -> None:
        """Count a token that was generated."""
        self.generated += 1
        self.edits.accept(token)


def pick(logits: NDArray[np.float32], states: Rows[State], rows: Rows[int] | None = None) -> list[Pick | None]:
    """A token for each state from its row of float32 [rows, vocab]: row i, or `rows[i]`.

    None where nothing can be picked: the row's maximum is not finite, or is none of the tokens that may come yet.
    Greedy rows take the largest logit, the lowest id of equals. A row that is sampled costs its state one uniform draw.
    `logits` are changed while this runs, and are what they were when it returns.
    """
    chosen = range(len(states)) if rows is None else rows
    with np.errstate(all="ignore"):  # infinities and underflow are what they should be
        return [_pick(logits[row], state) for row, state in zip(chosen, states, strict=True)]


def _pick(row: NDArray[np.float32], state: State) -> Pick | None:
    how = state.params
    edited = state.edits.apply(row, state.generated)
    token = int(row.argmax())  # of a row with a NaN it is that NaN's place
    largest = float(row[token])
    finite = math.isfinite(largest)
    if edited is not None:
        ids, before = edited
        finite = finite and bool((before < np.inf).all())
    if finite and how.temperature > 0:
        token = sample(row, largest, how, state.random.random())
    if edited is not None:
        row[ids] = before
    if not finite:
        return None
    return Pick(token) if how.logprobs is None else Pick(token, *log_probabilities(row, token, how.logprobs))
