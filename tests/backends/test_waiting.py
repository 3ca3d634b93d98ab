"""The waiting queue: order, deadlines, those who were given up, and what a step costs with ten thousand waiting."""

from __future__ import annotations

from typing import NoReturn

from hypothesis import given
from hypothesis import strategies as st

from backends.inflight.sequence import Sequence
from backends.inflight.waiting import SLACK, Waiting

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


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(0, 20), st.integers(0, 2)), max_size=40), st.floats(0, 20))
def test_the_order_is_priority_then_arrival_without_those_who_are_gone(given_, now):
    """Whoever is late or was given up, before or while it waits, goes once and never comes up; others do in order."""
    everybody = [sequence([1], priority=urgent, deadline=deadline) for urgent, deadline, _ in given_]
    for s, (_, _, cancel) in zip(everybody, given_, strict=True):
        s.cancelled = cancel == 1
    waiting = queue_of(*everybody)
    for s, (_, _, cancel) in zip(everybody, given_, strict=True):
        if cancel == 2:
            s.cancelled = True
    gone = waiting.drop_gone(now)
    assert len(gone) == len(set(gone)) and set(gone) == {s for s in everybody if s.deadline <= now or s.cancelled}
    left = [s for s in everybody if s not in gone]
    assert len(waiting) == len(left)
    assert emptied(waiting) == sorted(left, key=lambda s: (s.params.priority, s.number))
    assert len(waiting) == 0


def test_a_step_looks_at_those_who_go_and_not_at_the_queue() -> None:
    """With ten thousand waiting a step reads as many attributes of sequences as with ten: those of whom it concerns."""

    class Watched(dict[int, Sequence]):
        """Counts how often it is asked."""

        asked = 0

        def get(self, *of: object) -> Sequence | None:  # type: ignore[override]
            self.asked += 1
            return super().get(*of)  # type: ignore[call-overload, no-any-return]

        def pop(self, *of: object) -> Sequence | None:  # type: ignore[override]
            self.asked += 1
            return super().pop(*of)  # type: ignore[call-overload, no-any-return]

        def values(self) -> NoReturn:  # type: ignore[override]
            raise AssertionError("the whole queue was read")

    asked = []
    for count in (10, 10_000):
        everybody = [sequence([1], deadline=1.0 + i) for i in range(count)]
        waiting = queue_of(*everybody)
        watched = waiting._members = Watched(waiting._members)
        everybody[5].cancelled = True
        assert waiting.drop_gone(1.0) == [everybody[5], everybody[0]]
        assert waiting.first() is everybody[1]
        asked.append(watched.asked)
    assert asked[0] == asked[1] <= 5


def test_entries_of_those_who_left_do_not_pile_up() -> None:
    """Requests that come and are given up behind one that stays leave nothing in the heaps."""
    first = sequence([1], priority=-1, deadline=1e9)
    waiting = queue_of(first)
    for number in range(1, 5_000):
        s = sequence([1], deadline=1e9 + number)
        s.number, s.cancelled = number, True
        waiting.push(s)
        waiting.drop_gone(number * 1.0)
    assert len(waiting) == 1 and waiting.first() is first
    assert max(len(waiting._order), len(waiting._deadlines)) <= 2 * 2 + SLACK + 1


def test_draining_empties_it_in_order_of_arrival() -> None:
    """Everybody is given back once, and nobody comes up later."""
    everybody = [sequence([1], priority=-i) for i in range(5)]
    waiting = queue_of(*everybody)
    assert waiting.drain() == everybody
    assert waiting.first() is None and len(waiting) == 0
