"""From logits to tokens. Rows are independent: a row's token depends on its logits and its own state only."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidArgument
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
        """Raises InvalidArgument for a token id that is not in the vocabulary."""
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
        self.generated = 0

    def accept(self, token: int) -> None:
        """Count a token that was generated."""
        self.generated += 1


def pick(logits: NDArray[np.float32], states: Rows[State], rows: Rows[int] | None = None) -> list[Pick | None]:
    """A token for each state from its row of float32 [rows, vocab]: row i, or `rows[i]`.

    None where the row's logits are not finite (their maximum is not; -infinity is a token that cannot be drawn).
    Greedy rows take the largest logit, the lowest id of equals. A row that is sampled costs its state one uniform draw.
    """
    best = logits.argmax(axis=1)  # of a row with a NaN it is that NaN's place
    picks: list[Pick | None] = []
    for row, state in zip(range(len(states)) if rows is None else rows, states, strict=True):
        token = int(best[row])
        if not np.isfinite(logits[row, token]):
            picks.append(None)
        elif state.params.temperature > 0:
            picks.append(Pick(_draw(logits[row], state.params, state.random)))
        else:
            picks.append(Pick(token))
    return picks


def _draw(logits: NDArray[np.float32], how: SamplingParams, random: np.random.Generator) -> int:
    """Temperature, then top-k, then top-p (nucleus; Holtzman et al. 2019), then one inverse-CDF draw in float64."""
    scaled = logits.astype(np.float64)
    scaled -= scaled.max()  # before the division: a tiny temperature then underflows to 0 instead of overflowing
    with np.errstate(over="ignore"):
        scaled /= how.temperature
    ids: NDArray[np.int64] | None = None
    if 0 < how.top_k < scaled.size:
        # Ties at the k-th place are all kept, as in transformers' TopKLogitsWarper.
        threshold = np.partition(scaled, scaled.size - how.top_k)[scaled.size - how.top_k]
        ids = np.flatnonzero(scaled >= threshold)
        scaled = scaled[ids]
    weights = np.exp(scaled)
    if how.top_p < 1.0:
        order = np.argsort(-weights, kind="stable")
        cumulative = np.cumsum(weights[order])
        # The smallest set whose mass reaches top_p: a token stays while the mass before it is below top_p.
        kept = int(np.count_nonzero(cumulative - weights[order] < how.top_p * cumulative[-1]))
        keep = np.sort(order[: max(1, kept)])
        weights, ids = weights[keep], keep if ids is None else ids[keep]
    edges = np.cumsum(weights)
    index = int(np.searchsorted(edges, random.random() * edges[-1], side="right"))
    index = min(index, weights.size - 1)
    return index if ids is None else int(ids[index])
