"""Pure policy: who runs in the next step. No tensors, no clock of its own, no threads.

Slots are dense: the n admitted sequences hold slots 0..n-1, so that one decode step runs over the first rows of the
cache. A sequence that ends leaves a hole, which the last slot's sequence is moved into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .errors import ResourceExhausted
from .sequence import Sequence
from .waiting import Waiting

GROW_STEPS = 64  # good steps until one slot more is tried again after a shortage of memory
WASTE = 0.25  # of the tokens of prompts that are prefilled together may be padding,
WASTE_TOKENS = 8  # or so many


@dataclass(frozen=True)
class Chunk:
    """Positions start..stop-1 of one sequence, to be prefilled in one go. Those in front of them are in its cache, or,
    where `reused`, to be taken from the prefix cache.
    """

    sequence: Sequence
    start: int
    stop: int
    reused: bool = False

    @property
    def whole(self) -> bool:
        """It is all that there is to prefill."""
        return self.start == 0 and self.stop == self.sequence.prefill_end


@dataclass(frozen=True)
class Plan:
    """One step: every running sequence decodes one token, and prompts advance by chunks, which go by groups."""

    decode: tuple[Sequence, ...]
    prefill: tuple[Chunk, ...]

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)

    @property
    def groups(self) -> list[tuple[Chunk, ...]]:
        """The chunks, those together that one run takes: whole prompts of similar length in consecutive slots."""
        groups: list[list[Chunk]] = []
        for chunk in self.prefill:
            if groups and _together([*groups[-1], chunk]):
                groups[-1].append(chunk)
            else:
                groups.append([chunk])
        return [tuple(group) for group in groups]


def _together(chunks: list[Chunk]) -> bool:
    first, last = chunks[0], chunks[-1]
    if not (first.whole and last.whole and last.sequence.slot == first.sequence.slot + len(chunks) - 1):
        return False
    tokens = sum(chunk.stop for chunk in chunks)
    padding = len(chunks) * max(chunk.stop for chunk in chunks) - tokens
    return padding <= max(WASTE_TOKENS, WASTE * tokens)


class Scheduler:
    """Lower priorities first, first come, first served within one, over `slots` slots and at most `max_queue` waiting
    sequences.

    A step prefills at most `chunk` prompt tokens beside the running streams, or as few as it is told to (one chunk
    always goes, so no prompt starves). A chunk is as large as the step allows or ends its prompt, so without a smaller
    limit chunks are cut at multiples of `chunk`, whoever else is there.

    When memory runs short, `bound` falls to half of those that were active, and rises by one after each GROW_STEPS good
    steps. It bounds who is admitted: those above it that still fit run to their end.
    """

    def __init__(self, slots: int, max_queue: int, chunk: int) -> None:
        if min(slots, max_queue, chunk) < 1:
            raise ValueError("slots, max_queue and chunk must be at least 1")
        self._slots, self._max_queue, self.chunk = slots, max_queue, chunk
        self._bound, self._good_steps, self._submitted = slots, 0, 0
        self._waiting = Waiting()
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

    @property
    def prefilling(self) -> Sequence | None:
        """Whose prompt is being prefilled, the first of them in order of admission."""
        return next((s for s in self._prefilling if s.prefilling and s.slot >= 0), None)

    @property
    def first_waiting(self) -> Sequence | None:
        """Who gets a slot next."""
        return self._waiting.first()

    def submit(self, *sequences: Sequence) -> None:
        """Queue sequences, all or none. Raises ResourceExhausted if more than `max_queue` would wait."""
        if len(self._waiting) + len(sequences) > self._max_queue:
            raise ResourceExhausted(
                f"{len(self._waiting)} requests are waiting, the limit (max_queue) is {self._max_queue}"
            )
        for sequence in sequences:
            self._submitted += 1
            sequence.number = self._submitted
            self._waiting.push(sequence)

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
        """Memory is short: halve the bound. The sequence whose slot is to be freed: of the last in order the one that
        came last.
        """
        self._bound, self._good_steps = max(1, len(self._active) // 2), 0
        return max(self._active, key=lambda s: (s.params.priority, s.number))

    def grow(self) -> None:
        """A step was good: after enough of them one slot more may be used."""
        if self._bound < self._slots:
            self._good_steps += 1
            if self._good_steps >= GROW_STEPS:
                self._bound, self._good_steps = self._bound + 1, 0

    def restore(self) -> None:
        """The memory is another one now: all slots may be used."""
        self._bound, self._good_steps = self._slots, 0

    def drop_gone(self, now: float) -> list[Sequence]:
        """Take out of the queue whose deadline has passed, and who was given up."""
        return self._waiting.drop_gone(now)

    def drain(self) -> list[Sequence]:
        """Take everybody out of the queue."""
        return self._waiting.drain()

    def plan(self, limit: int | None = None, reuse: Callable[[Sequence], int] = lambda _: 0) -> Plan:
        """Decide the next step and admit from the queue as many as it can start.

        It prefills at most `limit` tokens if running streams would wait for more. `reuse` says how many positions of a
        new sequence need not be computed.
        """
        decode = tuple(s for s in self._active if not s.prefilling)
        size = budget = min(self.chunk, limit or self.chunk) if decode else self.chunk
        prefill: list[Chunk] = []
        self._prefilling = [s for s in self._prefilling if s.prefilling and s.slot >= 0]
        for sequence in self._prefilling:
            stop = min(sequence.done + size, sequence.prefill_end)
            if prefill and stop - sequence.done > budget:
                break
            prefill.append(Chunk(sequence, sequence.done, stop))
            budget -= stop - sequence.done
        while budget > 0 and len(self._active) < self._bound and (first := self._waiting.first()) is not None:
            start = reuse(first)
            stop = min(start + size, first.prefill_end)
            if prefill and stop - start > budget:
                break
            self._waiting.remove(first)
            first.slot = len(self._active)
            self._active.append(first)
            self._prefilling.append(first)
            prefill.append(Chunk(first, start, stop, start > 0))
            budget -= stop - start
        return Plan(decode, tuple(prefill))
