"""The retry budget."""

from __future__ import annotations

from orchestrator.retries import FIRST_PAUSE_S, RESERVE, RetryBudget


def test_attempts_are_bounded() -> None:
    """A request is tried again as often as the setting says, and never with 0."""
    assert [RetryBudget(2).take(attempt) for attempt in (1, 2, 3)] == [True, True, False]
    assert not RetryBudget(0).take(1)


def test_when_everything_fails_a_tenth_is_tried_again() -> None:
    """A thousand failing requests make about a hundred retries, not a thousand."""
    budget, retries = RetryBudget(1), 0
    for _ in range(1000):
        budget.asked()
        retries += budget.take(1)
    assert 90 <= retries <= 100 + RESERVE


def test_pauses_grow_and_differ() -> None:
    """Each further attempt waits up to twice as long, and clients do not come back in step."""
    pauses = [[RetryBudget.pause_s(attempt) for _ in range(50)] for attempt in (1, 2, 3)]
    assert all(0 < pause <= FIRST_PAUSE_S * 2**index for index, row in enumerate(pauses) for pause in row)
    assert all(len(set(row)) > 40 for row in pauses)
