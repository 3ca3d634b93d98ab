"""Which texts run together. Pure policy: lengths in, batches of indices out.

Rows of one run are padded to its longest text, and padding is computed, everywhere or, where the graph skips it, in
attention only; a run of its own costs as much as so many tokens of padding. So texts are sorted by length and cut where
the sum of both is smallest.
"""

from __future__ import annotations

from collections.abc import Sequence

# Padding tokens whose computing takes as long as starting a run: measured on MiniLM-L6, ONNX Runtime, CPU.
RUN_COST = 16
RUN_COST_OF_SKIPPING = 256  # of a graph whose products skip padding

# Lengths that native serving pads to: Triton batches requests of one shape, so there must not be many. Steps of an
# eighth to a quarter keep what is computed on padding below a fifth.
_STEPS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128)


def pack(lengths: Sequence[int], max_tokens: int, run_cost: int) -> list[list[int]]:
    """Batches of indices into ``lengths`` (tokens, at least 1 each): every index once, longest batches first.

    A batch of several rows has at most ``max_tokens`` tokens, padding included; a longer text runs alone. Of all ways
    to cut the sorted texts into such batches, the one with the fewest tokens computed and runs started, weighed by
    ``run_cost``, is taken.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    count = len(order)
    best = [0] * (count + 1)  # the least cost of the texts from this one on
    cut = [count] * count  # where the batch that begins with this one ends
    for first in range(count - 1, -1, -1):
        longest = lengths[order[first]]
        room = min(count - first, max(1, max_tokens // longest))
        best[first], cut[first] = min(
            (run_cost + rows * longest + best[first + rows], first + rows) for rows in range(1, room + 1)
        )
    batches, first = [], 0
    while first < count:
        batches.append(order[first : cut[first]])
        first = cut[first]
    return batches


def bucket(length: int, max_len: int) -> int:
    """The length that native serving pads a text of ``length`` tokens to; at most ``max_len``."""
    for step in _STEPS:
        if length <= step:
            return min(step, max_len)
    quarter = 1 << ((length - 1).bit_length() - 3)  # from there on eighths of the next power of two
    return min(-(-length // quarter) * quarter, max_len)


def by_bucket(lengths: Sequence[int], max_len: int, max_tokens: int) -> list[tuple[int, list[int]]]:
    """(padded length, indices) of texts that may run as one request: every index once, at most ``max_tokens`` each."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(bucket(length, max_len), []).append(index)
    return [
        (padded, indices[at : at + rows])
        for padded, indices in sorted(groups.items(), reverse=True)
        for rows in [max(1, max_tokens // padded)]
        for at in range(0, len(indices), rows)
    ]
