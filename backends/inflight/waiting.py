"""The waiting queue: lower priorities first, first come, first served within one. Pure policy, no clock of its own.

What a step costs does not grow with the queue: the next one and those whose deadline has passed are found by heaps,
and whoever is given up says so.
"""

from __future__ import annotations

import heapq
from collections import deque
from functools import partial

from .sequence import Sequence

SLACK = 64  # entries of a heap that may be of sequences that are gone, beside as many as there are others


class Waiting:
    """Sequences without a slot. Entries of heaps are left behind when a sequence goes, and skipped later."""

    def __init__(self) -> None:
        self._members: dict[int, Sequence] = {}
        self._order: list[tuple[int, int]] = []
        self._deadlines: list[tuple[float, int]] = []
        self._given_up: deque[int] = deque()  # numbers; filled by any thread

    def __len__(self) -> int:
        return len(self._members)

    def push(self, sequence: Sequence) -> None:
        """Add a sequence, whose number is its own."""
        self._members[sequence.number] = sequence
        heapq.heappush(self._order, (sequence.params.priority, sequence.number))
        heapq.heappush(self._deadlines, (sequence.deadline, sequence.number))
        sequence.when_cancelled(partial(self._given_up.append, sequence.number))

    def first(self) -> Sequence | None:
        """Who goes next; None when nobody waits."""
        while self._order:
            sequence = self._members.get(self._order[0][1])
            if sequence is not None:
                return sequence
            heapq.heappop(self._order)
        return None

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out."""
        del self._members[sequence.number]

    def drop_gone(self, now: float) -> list[Sequence]:
        """Take out whose deadline has passed by `now` (seconds), and who was given up."""
        gone = []
        while self._given_up:
            if (early := self._members.pop(self._given_up.popleft(), None)) is not None:
                gone.append(early)
        while self._deadlines and self._deadlines[0][0] <= now:
            late = self._members.pop(heapq.heappop(self._deadlines)[1], None)
            if late is not None:
                gone.append(late)
        self._compact()
        return gone

    def drain(self) -> list[Sequence]:
        """Take out everybody, in order of arrival."""
        everybody = list(self._members.values())
        self._members.clear()
        self._compact()
        return everybody

    def _compact(self) -> None:
        most = 2 * len(self._members) + SLACK
        if len(self._order) > most:
            self._order = [entry for entry in self._order if entry[1] in self._members]
            heapq.heapify(self._order)
        if len(self._deadlines) > most:
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._members]
            heapq.heapify(self._deadlines)
