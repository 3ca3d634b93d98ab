"""Pure policy: who runs in the next step. No tensors, no clock of its own, no threads.

Slots are dense: the n admitted sequences hold slots 0..n-1, so that one decode step runs over the first rows of the
cache. A
sequence that ends leaves a hole, which the last slot's sequence is moved into.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .errors import ResourceExhausted
from .sequence import Sequence

GROW_STEPS = 64  # good steps until one slot more is tried again after a shortage of memory


@dataclass(frozen=True)
class Chunk:
    """Positions start..stop-1 of one sequence, to be prefilled in one go."""

    sequence: Sequence
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """One step: every running sequence decodes one token, and prompts advance by whole chunks."""

    decode: tuple[Sequence, ...]
    prefill: tuple[Chunk, ...]

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)


class Scheduler:
    """First come, first served over `slots` slots and at most `max_queue` waiting sequences.

    A step prefills at most `chunk` prompt tokens beside the running streams (one chunk always goes, so no prompt
    starves). Chunks are cut
    at multiples of `chunk` from the prompt's start, whoever else is there: a prompt's arithmetic never depends on its
    company.

    When memory runs short, `bound` falls to half of those that were active, and rises by one after each GROW_STEPS good
    steps. It bounds who is admitted: those above it that still fit run to their end.
    """

    def __init__(self, slots: int, max_queue: int, chunk: int) -> None:
        if min(slots, max_queue, chunk) < 1:
            raise ValueError("slots, max_queue and chunk must be at least 1")
        self._slots, self._max_queue, self._chunk = slots, max_queue, chunk
        self._bound, self._good_steps, self._submitted = slots, 0, 0
        self._waiting: deque[Sequence] = deque()
        self._active: list[Sequence] = []  # index = slot
        self._prefilling: list[Sequence] = []  # in order of admission

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def bound(self) -> int:
        """How many may run at once now: `slots`, or fewer after a shortage of memory."""
        return self._bound

    @property
    def active(self) -> tuple[Sequence, ...]:
        return tuple(self._active)

    def submit(self, *sequences: Sequence) -> None:
        """Queue sequences, all or none. Raises ResourceExhausted if more than `max_queue` would wait."""
        if len(self._waiting) + len(sequences) > self._max_queue:
            raise ResourceExhausted(
                f"{len(self._waiting)} requests are waiting, the limit (max_queue) is {self._max_queue}"
            )
        for sequence in sequences:
            self._submitted += 1
            sequence.number = self._submitted
            self._waiting.append(sequence)

    def remove(self, sequence: Sequence, move: Callable[[int, int, int], None]) -> None:
        """Free a sequence's slot; `move(source, target, length)` copies the cache of the one that fills the hole.

        What `move` raises is raised once all else is done: the one that was moved is without its cache, see `refill`.
        """
        last, hole = self._active.pop(), sequence.slot
        sequence.slot = -1
        if last is not sequence:
            self._active[hole] = last
            source, last.slot = last.slot, hole
            move(source, hole, last.done)

    def refill(self, sequences: Iterable[Sequence]) -> None:
        """The caches of these active sequences are lost: they are prefilled again, in order of admission."""
        again = [s for s in sequences if s.slot >= 0]
        for sequence in again:
            sequence.done = 0
        self._prefilling = sorted({*self._prefilling, *again}, key=lambda s: s.number)

    def shrink(self) -> Sequence:
        """Memory is short: halve the bound. The sequence that came last, whose slot is to be freed."""
        self._bound, self._good_steps = max(1, len(self._active) // 2), 0
        return max(self._active, key=lambda s: s.number)

    def grow(self) -> None:
        """A step was good: after enough of them one slot more may be used."""
        if self._bound < self._slots:
            self._good_steps += 1
            if self._good_steps >= GROW_STEPS:
                self._bound, self._good_steps = self._bound + 1, 0

    def restore(self) -> None:
        """The memory is another one now: all slots may be used."""
        self._bound, self._good_steps = self._slots, 0

    def drop_waiting(self, gone: Callable[[Sequence], bool]) -> list[Sequence]:
        """Take out of the queue whoever is `gone`; the order of the others is kept."""
        dropped = [s for s in self._waiting if gone(s)]
        if dropped:
            drop = set(dropped)
            self._waiting = deque(s for s in self._waiting if s not in drop)
        return dropped

    def plan(self) -> Plan:
        """Decide the next step and admit from the queue as many as it can start."""
        decode = tuple(s for s in self._active if not s.prefilling)
        budget = self._chunk
        prefill: list[Chunk] = []
        self._prefilling = [s for s in self._prefilling if s.prefilling and s.slot >= 0]
        for sequence in self._prefilling:
            budget = self._add(prefill, sequence, budget)
        while self._waiting and budget > 0 and len(self._active) < self._bound:
            if prefill and min(self._waiting[0].prefill_end, self._chunk) > budget:
                break
            sequence = self._waiting.popleft()
            sequence.slot = len(self._active)
            self._active.append(sequence)
            self._prefilling.append(sequence)
            budget = self._add(prefill, sequence, budget)
        return Plan(decode, tuple(prefill))

    def _add(self, prefill: list[Chunk], sequence: Sequence, budget: int) -> int:
        stop = min(sequence.done + self._chunk, sequence.prefill_end)
        if prefill and stop - sequence.done > budget:
            return 0
        prefill.append(Chunk(sequence, sequence.done, stop))
        return budget - (stop - sequence.done)
