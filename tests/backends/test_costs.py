"""Running estimates of what steps take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.inflight.costs import Costs, Estimate


def measured(decode: float = 0.010, each: float = 0.001) -> Costs:
    costs = Costs()
    for _ in range(20):
        costs.decoded(1, decode)
        costs.decoded(8, 2 * decode)
        costs.prefilled(101, decode + 100 * each)
    return costs


def test_one_size_says_something_of_all() -> None:
    """From decode steps and chunks of one size follows what other chunks and drafts take."""
    costs = measured()
    assert costs.prefill(11) == pytest.approx(0.020) and costs.verify(5) == pytest.approx(0.014)
    assert costs.decode(2) == pytest.approx(0.010) and costs.decode(100) == pytest.approx(0.020)
    for _ in range(20):
        costs.verified(5, 0.012)
    assert costs.verify(5) == pytest.approx(0.012) and costs.prefill(11) == pytest.approx(0.020)


def test_a_chunk_fits_beside_the_running_rows_and_is_even() -> None:
    """20 ms for eight rows and 10 ms for the weights leave 20 ms of a target of 50: 20 tokens; never less than the
    least, however short the target, nor more than the most.
    """
    costs = measured()
    assert costs.chunk(8, 0.0505, 16, 128) == 20
    assert costs.chunk(8, 0.001, 16, 128) == 16
    assert costs.chunk(1, 10.0, 16, 128) == 128
    assert Costs().chunk(8, 0.05, 16, 128) == 16


@given(st.lists(st.floats(0.009, 0.011), min_size=10, max_size=50), st.floats(0.1, 1000))
def test_a_stall_does_not_move_an_estimate_far(samples, stall):
    """One sample that is ten or a million times too large counts as twice the estimate."""
    estimate = Estimate()
    for sample in samples:
        estimate.add(sample)
    before = estimate.value
    estimate.add(stall)
    assert 0.009 <= before <= 0.011 and estimate.value <= before * 1.11


def test_an_estimate_follows_a_machine_that_changes() -> None:
    """When steps take three times as long from now on, some tens of steps later the estimate says so."""
    estimate = Estimate()
    for seconds in [0.01] * 50 + [0.03] * 60:
        estimate.add(seconds)
    assert estimate.value == pytest.approx(0.03, rel=0.05)


def test_nothing_measured_is_nothing_known() -> None:
    """Without a sample every estimate is 0, which callers take for unknown."""
    costs = Costs()
    assert (costs.decode(4), costs.prefill(1), costs.verify(9)) == (0.0, 0.0, 0.0)
