"""Pure policy: who runs in the next step. No tensors, no clock of its own, no threads.

Slots are dense: the n admitted sequences hold slots 0..n-1, so that one decode step runs over the first rows of the
cache. A
sequence that ends leaves a hole, which the last slot's sequence is moved into.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .errors import ResourceExhausted
from .sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """Prompt positions start..stop-1 of one sequence, to be prefilled in one go."""

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
    """

    def __init__(self, slots: int, max_queue: int, chunk: int) -> None:
        if min(slots, max_queue, chunk) < 1:
            raise ValueError("slots, max_queue and chunk must be at least 1")
        self._slots, self._max_queue, self._chunk = slots, max_queue, chunk
        self._waiting: deque[Sequence] = deque()
        self._active: list[Sequence] = []  # index = slot
        self._prefilling: list[Sequence] = []  # in order of admission

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def active(self) -> tuple[Sequence, ...]:
        return tuple(self._active)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises ResourceExhausted when `max_queue` sequences wait already."""
        if len(self._waiting) >= self._max_queue:
            raise ResourceExhausted(
                f"{len(self._waiting)} requests are waiting, the limit (max_queue) is {self._max_queue}"
            )
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence, move: Callable[[int, int, int], None]) -> None:
        """Free a sequence's slot; `move(source, target, length)` copies the cache of the one that fills the hole."""
        last = self._active.pop()
        if last is not sequence:
            move(last.slot, sequence.slot, last.done)
            self._active[sequence.slot] = last
            last.slot = sequence.slot
        sequence.slot = -1

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
        while self._waiting and budget > 0 and len(self._active) < self._slots:
            if prefill and min(len(self._waiting[0].prompt), self._chunk) > budget:
                break
            sequence = self._waiting.popleft()
            sequence.slot = len(self._active)
            self._active.append(sequence)
            self._prefilling.append(sequence)
            budget = self._add(prefill, sequence, budget)
        return Plan(decode, tuple(prefill))

    def _add(self, prefill: list[Chunk], sequence: Sequence, budget: int) -> int:
        stop = min(sequence.done + self._chunk, len(sequence.prompt))
        if prefill and stop - sequence.done > budget:
            return 0
        prefill.append(Chunk(sequence, sequence.done, stop))
        return budget - (stop - sequence.done)
