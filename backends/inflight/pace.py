"""How much a step may prefill, so that running streams get their next token in time and prompts are not forgotten.

Pure policy, no clock of its own.
"""

from __future__ import annotations

from .costs import Costs
from .scheduler import Scheduler

LEAST = 16  # tokens that a step prefills whatever its target
PATIENCE_S = 2.0  # a prompt that could have been prefilled for longer than this goes by whole chunks


class Pace:
    """Keeps steps within `target_s`; 0: no target."""

    def __init__(self, target_s: float) -> None:
        self._target_s = target_s
        self._full_at = float("-inf")

    def limit(self, scheduler: Scheduler, costs: Costs, now: float) -> int | None:
        """How many prompt tokens the next step may prefill beside running streams; None: as many as there are."""
        if not self._target_s:
            return None
        prefilling, waiting = scheduler.prefilling, scheduler.first_waiting
        if len(scheduler.active) >= scheduler.bound:
            self._full_at = now  # who waits, waits for a slot
        if prefilling is not None and now - prefilling.started_at > PATIENCE_S:
            return None
        if waiting is not None and now - max(waiting.queued_at, self._full_at) > PATIENCE_S:
            return None
        return costs.chunk(len(scheduler.active), self._target_s, LEAST, scheduler.chunk)
