from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.inflight.entry import Entry
from backends.inflight.errors import OutOfMemory
from backends.inflight.opening import open_model
from backends.inflight.warmup import warm

from .fakes import FakeRunner, FaultyRunner
from .test_opening import entry

__all__ = ["entry"]  # a fixture


class Shapes(FakeRunner):
    """Remembers what was run: ("decode", rows) or ("prefill", slot, start, stop)."""

    def __init__(self, slots: int, max_len: int) -> None:
        super().__init__(slots, max_len)
        self.run: list[tuple[object, ...]] = []

    def decode(self, tokens, positions):
        self.run.append(("decode", len(tokens)))
        return super().decode(tokens, positions)

    def prefill(self, slot, tokens, start):
        self.run.append(("prefill", slot, start, start + len(tokens)))
        return super().prefill(slot, tokens, start)

    def prefill_fresh(self, first_slot, prompts):
        self.run.append(("fresh", len(prompts)))
        return super().prefill_fresh(first_slot, prompts)

    def verify(self, slot, tokens, start):
        self.run.append(("verify", len(tokens)))
        return super().verify(slot, tokens, start)


@given(slots=st.integers(1, 20), chunk=st.integers(1, 40), max_len=st.integers(1, 40))
@settings(deadline=None)
def test_one_row_all_slots_powers_between_and_the_chunk_are_run(slots: int, chunk: int, max_len: int) -> None:
    """Whatever the entry's sizes: steps of one row, of all and of the powers of two between, each once, and
    whole chunks, nothing beyond the model's length.
    """
    runner = Shapes(slots, max_len)
    assert warm(runner, slots, chunk, max_len) == len(runner.run)
    rows = [shape[1] for shape in runner.run if shape[0] == "decode"]
    assert sorted(rows) == sorted({1, slots, *(n for n in (2, 4, 8, 16) if n < slots)})
    prefills = [shape for shape in runner.run if shape[0] == "prefill"]
    assert ("prefill", 0, 0, min(chunk, max_len)) in prefills
    assert ("fresh", 2) in runner.run or slots == 1
    assert ("verify", min(4, max_len)) in runner.run
    assert all(stop <= max_len for *_, stop in prefills)  # type: ignore[operator]


def test_the_most_frequent_shapes_come_first_and_time_ends_it() -> None:
    """When the time is up no further shape is begun; by then the chunk, one row and all slots have been run."""
    runner, seconds = Shapes(16, 300), iter([0.0, 0.1, 0.2, 0.3, 0.4, 9.0])
    assert warm(runner, 16, 128, 300, budget_s=1.0, clock=lambda: next(seconds)) == 5
    assert runner.run == [
        ("prefill", 0, 0, 1), ("prefill", 0, 0, 128), ("prefill", 0, 128, 256), ("decode", 1), ("decode", 16),
    ]  # fmt: skip
    runner = Shapes(16, 300)
    assert warm(runner, 16, 128, 300, budget_s=0.0, clock=iter([0.0, 0.1]).__next__) == 1


def test_too_little_memory_for_all_slots_at_once_is_no_failure() -> None:
    """The engine can serve with fewer: what does not fit ends the warm-up; a model that cannot run at all raises."""
    runner = FaultyRunner(8, 64)
    runner.capacity = 3
    assert warm(runner, 8, 16, 64) == 4
    runner = FaultyRunner(8, 64)
    runner.short_on = {1}
    with pytest.raises(OutOfMemory):
        warm(runner, 8, 16, 64)


def test_a_model_is_warm_when_it_is_open(entry: Callable[..., Entry]) -> None:
    """Opening an entry has run the real runner with each of these row counts before anybody asks."""
    opened = open_model(entry(slots=5, prefill_chunk=7), 0)
    assert set(opened.runner._decode_bindings) == {1, 2, 4, 5}
