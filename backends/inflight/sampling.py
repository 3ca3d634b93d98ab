"""From logits to tokens. Rows are independent: a row's token depends on its logits, its parameters and its own random
state only.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
from numpy.typing import NDArray

from .request import SamplingParams


def generator(seed: int) -> np.random.Generator:
    """The random state of one request: PCG64 seeded with `seed` modulo 2^64."""
    return np.random.Generator(np.random.PCG64(seed % 2**64))


def finite_rows(logits: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which rows of float32 [rows, vocab] can be sampled from: a finite maximum (any NaN makes it NaN)."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.isfinite(logits.max(axis=1)))


def sample(
    logits: NDArray[np.float32], params: Rows[SamplingParams], generators: Rows[np.random.Generator]
) -> NDArray[np.int64]:
    """One token a row from float32 [rows, vocab]; greedy rows in one vectorised arg-max (the lowest id wins a tie)."""
    tokens: NDArray[np.int64] = logits.argmax(axis=1)
    for row, (how, random) in enumerate(zip(params, generators, strict=True)):
        if how.temperature > 0:
            tokens[row] = _draw(logits[row], how, random)
    return tokens


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
