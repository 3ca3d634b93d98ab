"""How often a failed call may be tried again: a few times each, and together a tenth of what is asked."""

from __future__ import annotations

import random

SHARE = 0.1
RESERVE = 10.0
FIRST_PAUSE_S = 0.05


class RetryBudget:
    """A bucket that every request fills a little and every retry empties by one.

    When everything fails, retries stop multiplying the load (the retry budget of Google's SRE book, chapter 22).
    """

    def __init__(self, attempts: int) -> None:
        self.attempts = attempts
        self._tokens = RESERVE

    def asked(self) -> None:
        """A request came."""
        self._tokens = min(RESERVE, self._tokens + SHARE)

    def take(self, attempt: int) -> bool:
        """Whether a retry may be made after this many attempts; it is counted."""
        if attempt > self.attempts or self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    @staticmethod
    def pause_s(attempt: int) -> float:
        """Exponential back-off with full jitter, in seconds."""
        return random.uniform(0.2, 1.0) * FIRST_PAUSE_S * 2.0 ** (attempt - 1)  # noqa: S311 (spreads retries, hides nothing)
