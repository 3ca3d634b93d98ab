"""The gate before publishing: figures that are too large, padding that shows, and numbers that are none."""

from __future__ import annotations

import numpy as np
import pytest

from export.encoder_verify import (
    BATCH,
    EncoderReference,
    batches,
    compare,
    judge,
    lengths_to_check,
    most_pairs,
    verify,
)
from export.errors import VerificationError

EXPECTED = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)


class Fake:
    """A runtime that answers the references, changed by ``alone`` and ``together`` (added)."""

    def __init__(self, alone: float = 0.0, together: float = 0.0) -> None:
        self.alone, self.together = alone, together

    def run(self, texts):
        change = self.alone if len(texts) == 1 else self.together
        return np.stack([EXPECTED[text[0]] + np.float32(change) for text in texts])


def references() -> list[EncoderReference]:
    return [EncoderReference((index, *[0] * index), row) for index, row in enumerate(EXPECTED)]


@pytest.mark.parametrize("output", ["embedding", "logits"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_same_numbers_pass(output, precision):
    """No difference is no objection, and every text counts twice."""
    parity = verify(Fake(), references(), output, precision)
    assert parity["max_abs_diff"] == 0 == parity["batch_effect"] and parity["compared"] == 12


@pytest.mark.parametrize(
    ("runtime", "output", "precision", "said"),
    [
        (Fake(1e-3, 1e-3), "logits", "fp32", "differs from transformers"),
        (Fake(1e-4, 1e-4), "embedding", "fp32", "differs from transformers"),
        (Fake(0, 8e-5), "logits", "fp32", "Padding and neighbours"),
        (Fake(0.1, 0.1), "logits", "int8", "int8 moves"),
        (Fake(0, float("nan")), "logits", "fp32", "NaN"),
        (Fake(float("inf"), 0), "embedding", "int8", "NaN"),
    ],
)
def test_what_is_outside_the_tolerances_is_refused(runtime, output, precision, said):
    """Each figure has its own bound and its own sentence."""
    with pytest.raises(VerificationError, match=said):
        verify(runtime, references(), output, precision)


def test_embeddings_are_compared_at_unit_length():
    """A checkpoint whose vectors are a thousand long is held to the same relative tolerance."""
    large = EXPECTED * 1000
    parity = compare(large + 1e-3, large + 1e-3, large, "embedding")
    assert parity["max_abs_diff"] < 1e-6
    judge(parity, "embedding", "fp32")


def test_lengths_reach_both_ends():
    """One token and max_len are always among the lengths, none is beyond, also for the shortest models."""
    for max_len in (1, 2, 48, 512):
        lengths = lengths_to_check(max_len)
        assert lengths[0] == 1 and lengths[-1] == max_len and list(lengths) == sorted(set(lengths))


@pytest.mark.parametrize("longest", [1, 48, 512, 2048, 8192])
def test_no_batch_is_larger_than_announced(longest):
    """Every text is run once, in batches within what memory was asked for; the longest ones have a neighbour."""
    lengths = lengths_to_check(longest)
    order = sorted(range(len(lengths)), key=lambda index: (index % 3, -index))
    made = list(batches(order, lengths))
    assert [index for batch in made for index in batch] == order
    for batch in made:
        assert len(batch) * max(lengths[index] for index in batch) ** 2 <= most_pairs(longest)
    assert longest > 512 or all(len(batch) == BATCH for batch in made[:-1])
    if longest > 1:
        assert min(len(batch) for batch in made if len(lengths) - 1 in batch) >= 2
