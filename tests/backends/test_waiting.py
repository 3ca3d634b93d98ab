"""The waiting queue: order, deadlines, those who were given up, and what a step costs with ten thousand waiting."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backends.inflight.sequence import Sequence
from backends.inflight.waiting import SLACK, SWEEP_S, Waiting

from .fakes import sequence


def queue_of(*sequences: Sequence) -> Waiting:
    waiting = Waiting()
    for number, s in enumerate(sequences):
        s.number = number
        waiting.push(s)
    return waiting


def emptied(waiting: Waiting) -> list[Sequence]:
    order = []
    while (first := waiting.first()) is not None:
        waiting.remove(first)
        order.append(first)
    return order


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(0, 20), st.booleans()), max_size=40), st.floats(0, 20))
def test_the_order_is_priority_then_arrival_without_those_who_are_gone(given_, now):
    """Whoever is late or was given up never comes up, and is not counted; the others come in order."""
    everybody = [sequence([1], priority=urgent, deadline=deadline) for urgent, deadline, _ in given_]
    waiting = queue_of(*everybody)
    for s, (_, _, cancel) in zip(everybody, given_, strict=True):
        s.cancelled = cancel
    late = {s for s in everybody if s.deadline <= now}
    gone = set(waiting.drop_gone(now))
    assert late <= gone and all(s.cancelled for s in gone - late)
    left = [s for s in everybody if s not in late and not s.cancelled]
    assert len(waiting) >= len(left)
    assert emptied(waiting) == sorted(left, key=lambda s: (s.params.priority, s.number))
    assert len(waiting) == 0


def test_who_was_given_up_leaves_within_the_sweep_however_long_the_queue() -> None:
    """Of ten thousand waiting, those given up are found by steps that each look at a part of them."""
    everybody = [sequence([1]) for _ in range(10_000)]
    waiting = queue_of(*everybody)
    now = 0.0
    waiting.drop_gone(now)
    for s in everybody[::100]:
        s.cancelled = True
    found = 0
    while now < 2 * SWEEP_S:
        now += 0.01
        before = len(waiting._unswept)
        found += len(waiting.drop_gone(now))
        looked = before - len(waiting._unswept)
        assert looked <= 0.02 * 10_000 + 2  # a step of 10 ms looks at a fiftieth of the queue
    assert found == 100 and len(waiting) == 9_900


def test_entries_of_those_who_left_do_not_pile_up() -> None:
    """Requests that come and are given up behind one that stays leave nothing in the heaps."""
    first = sequence([1], priority=-1, deadline=1e9)
    waiting = queue_of(first)
    for number in range(1, 5_000):
        s = sequence([1], deadline=1e9 + number)
        s.number, s.cancelled = number, True
        waiting.push(s)
        waiting.drop_gone(number * 1.0)
    assert len(waiting) <= 2 and waiting.first() is first
    assert max(len(waiting._order), len(waiting._deadlines)) <= 2 * 2 + SLACK + 1


def test_draining_empties_it_in_order_of_arrival() -> None:
    """Everybody is given back once, and nobody comes up later."""
    everybody = [sequence([1], priority=-i) for i in range(5)]
    waiting = queue_of(*everybody)
    assert waiting.drain() == everybody
    assert waiting.first() is None and len(waiting) == 0
