"""From one row of logits to a token: which tokens are left, with what weight, and which of them a uniform draw means.

The largest k are found through the maxima of blocks: the k-th largest of these is a lower bound of the k-th largest
logit, so only what reaches it is looked at, and nothing else of the row is copied. A nucleus is looked for among the
likeliest few, against a total that is summed in float32; where that does not decide, the row is weighed in float64.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .request import SamplingParams

Row = NDArray[np.float32]
Ids = NDArray[np.intp]
Weights = NDArray[np.float64]

COLDEST = 1e-30  # a lower temperature means the same: nothing but the largest logit has any weight
HEAD = 256  # the likeliest tokens among which a nucleus is looked for
SLACK = 1e-5  # of a total in float32: well above its error, which is below 3e-6
FEW = 2048  # so many are sorted at once
BINS, SPAN = 4096, 64.0  # keys are sorted into so many bins, over this range at most at once
BLOCK = 256  # of weights that are summed before they are accumulated


def top(row: Row, k: int) -> Ids:
    """Ids of the k largest of a row without NaN, ascending, with all that equal the k-th. 1 <= k <= size."""
    ids, values = None, row
    width = min(64, row.size // (4 * k))
    if width >= 8:
        blocks = row.size // width
        maxima = row[: blocks * width].reshape(width, blocks).max(axis=0)
        ids = np.flatnonzero(row >= np.partition(maxima, blocks - k)[blocks - k])
        values = row[ids]
    kept = np.flatnonzero(values >= np.partition(values, values.size - k)[values.size - k])
    return kept if ids is None else ids[kept]


def total(row: Row, largest: float, temperature: float = 1.0) -> float:
    """The sum of exp((row - largest) / temperature): terms in float32, added in float64."""
    terms = row - np.float32(largest)
    if temperature != 1.0:
        terms /= np.float32(temperature)
    return float(np.exp(terms, out=terms).sum(dtype=np.float64))


def log_probabilities(row: Row, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Of a token, and of the `count` likeliest, the likeliest first and the lowest id of equals; those that cannot come
    (-infinity) are left out. The row's maximum is finite.
    """
    largest = float(row.max())
    sum_ = largest + math.log(total(row, largest))
    likeliest: tuple[tuple[int, float], ...] = ()
    if count:
        ids = top(row, min(count, row.size))
        ids = ids[np.argsort(-row[ids], kind="stable")[:count]]
        likeliest = tuple((id_, value - sum_) for id_, value in zip(ids.tolist(), row[ids].tolist(), strict=True))
        likeliest = tuple(pair for pair in likeliest if pair[1] > -math.inf)
    return float(row[token]) - sum_, likeliest


def sample(row: Row, largest: float, how: SamplingParams, uniform: float) -> int:
    """The token that `uniform` (0 to below 1) means: temperature, top-k, top-p, min-p, typical, then the inverse of
    the distribution function over what is left, in the order of ids. `largest` is the row's maximum, which is finite.
    """
    ids, weights = survivors(row, largest, how)
    place = drawn(weights, uniform)
    return place if ids is None else int(ids[place])


def survivors(row: Row, largest: float, how: SamplingParams) -> tuple[Ids | None, Weights]:
    """Ids, ascending (None: the whole row), of the tokens that the filters leave, and their weights before they are
    normalised: the largest logit's is 1.
    """
    temperature = max(how.temperature, COLDEST)
    ids, top_p = None, how.top_p
    if 0 < how.top_k < row.size:
        ids = top(row, how.top_k)
    elif top_p < 1.0:
        ids = _likely_nucleus(row, largest, temperature, top_p)
        top_p = top_p if ids is None else 1.0
    elif how.min_p > 0.0:
        # slightly too low: the weights decide
        bound = np.float32(largest + temperature * (np.log(how.min_p) - 1e-3))
        ids = np.flatnonzero(row >= np.nextafter(bound, np.float32(-np.inf)))
    scaled = _scaled(row if ids is None else row[ids], largest, temperature)
    weights = np.exp(scaled)
    if top_p < 1.0:
        kept = _nucleus(scaled, weights, top_p)
        ids, scaled, weights = _narrowed(ids, kept), scaled[kept], weights[kept]
    if how.min_p > 0.0:
        kept = np.flatnonzero(weights >= how.min_p)
        ids, scaled, weights = _narrowed(ids, kept), scaled[kept], weights[kept]
    if how.typical_p < 1.0:
        kept = _typical(scaled, weights, how.typical_p)
        ids, weights = _narrowed(ids, kept), weights[kept]
    return ids, weights


def drawn(weights: Weights, uniform: float) -> int:
    """The first place where the weights up to it add up to more than `uniform` times all; never one of weight 0."""
    if weights.size <= FEW:
        edges = np.cumsum(weights)
        return _place(edges, uniform * edges[-1])
    whole = weights.size // BLOCK * BLOCK
    sums = weights[:whole].reshape(-1, BLOCK).sum(axis=1)
    edges = np.cumsum(np.append(sums, weights[whole:].sum()))
    target = uniform * edges[-1]
    block = _place(edges, target)
    within = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK])
    return block * BLOCK + _place(within, target - (edges[block - 1] if block else 0.0))


def _place(edges: Weights, target: float) -> int:
    place = int(np.searchsorted(edges, target, side="right"))
    # rounding may have made the target as large as the sum: the last weight that is not 0
    return place if place < edges.size else int(np.searchsorted(edges, edges[-1], side="left"))


def _narrowed(ids: Ids | None, kept: Ids) -> Ids:
    return kept if ids is None else ids[kept]


def _scaled(values: Row, largest: float, temperature: float) -> Weights:
    scaled = values.astype(np.float64)
    scaled -= largest  # before the division: a low temperature then underflows to 0 instead of overflowing
    scaled /= temperature
    return scaled


def _likely_nucleus(row: Row, largest: float, temperature: float, mass: float) -> Ids | None:
    """The nucleus of a whole row, ids ascending, if it surely lies among the likeliest few."""
    ids = top(row, min(HEAD, row.size))
    weights = np.exp(_scaled(row[ids], largest, temperature))
    order = np.argsort(-weights, kind="stable")
    edges = np.cumsum(weights[order])
    target = mass * total(row, largest, temperature)
    first, last = np.searchsorted(edges, (target * (1 - SLACK), target * (1 + SLACK)))
    return np.sort(ids[order[: first + 1]]) if first == last < ids.size else None


def _nucleus(scaled: Weights, weights: Weights, mass: float) -> Ids:
    """Places, ascending, of the smallest set whose share reaches `mass` (Holtzman et al. 2019, arXiv:1904.09751): one
    stays while the share of those before it is below. Of equals the first stay.
    """
    if weights.size <= FEW:
        order = np.argsort(-weights, kind="stable")
        edges = np.cumsum(weights[order])
        return np.sort(order[: 1 + np.searchsorted(edges[:-1], mass * edges[-1])])
    target = mass * weights.sum()
    keys = -scaled
    cut, before = _reach(keys, weights, target)
    equals = np.flatnonzero(keys == cut)
    needed = 1 + np.count_nonzero(before + weights[equals[0]] * np.arange(1, equals.size) < target)
    left = keys <= cut
    left[equals[needed:]] = False
    return np.flatnonzero(left)


def _typical(scaled: Weights, weights: Weights, mass: float) -> Ids:
    """Places, ascending, of the tokens whose information is nearest to the entropy (Meister et al. 2023,
    arXiv:2202.00666): the smallest set whose share reaches `mass`, with all that equal the last one.
    """
    sum_ = weights.sum()
    information = np.log(sum_) - scaled
    shares = weights / sum_
    entropy = (shares * np.where(shares > 0, information, 0.0)).sum()
    keys = np.abs(information - entropy)
    return np.flatnonzero(keys <= _reach(keys, weights, mass * sum_)[0])


def _reach(keys: Weights, weights: Weights, target: float) -> tuple[float, float]:
    """The smallest key for which the weights of the keys up to it add up to `target` (else the largest), and the sum of
    those of smaller keys. Nothing but the bin in which the target lies is sorted.
    """
    before = 0.0
    while keys.size > FEW:
        low, high = keys.min(), keys.max()
        if low == high:
            return float(low), before
        places = np.minimum((keys - low) * (BINS / min(high - low, SPAN)), BINS).astype(np.intp)
        edges = before + np.cumsum(np.bincount(places, weights))
        bin_ = min(int(np.searchsorted(edges, target)), edges.size - 1)
        before = float(edges[bin_ - 1]) if bin_ else before
        inside = np.flatnonzero(places == bin_)
        keys, weights = keys[inside], weights[inside]
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    edges = before + np.cumsum(weights[order])
    cut = keys[min(int(np.searchsorted(edges, target)), keys.size - 1)]
    first = int(np.searchsorted(keys, cut))
    return float(cut), float(edges[first - 1]) if first else before
