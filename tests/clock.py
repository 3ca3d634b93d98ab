"""A clock for tests that say how long something may take: it stands still while the machine does.

Where a host gives its processors to others for half a second, everything here stands still, and what was to take a
tenth of a second takes six. `awake` leaves such gaps out: a thread looks at the time every few milliseconds, and of
what passed between two looks no more than `MOST_S` counts. What blocks the event loop, waits or computes is counted as
before, but for one long call that keeps the interpreter to itself: that is measured in processor time. How long
something takes at least is for `time.monotonic`, as deadlines pass while the machine stands still.
"""

from __future__ import annotations

import threading
import time

TICK_S = 0.003
MOST_S = 0.03  # a gap this long between two looks is a processor that was not ours
STILL_S = 0.2  # and one this long is a host that stood still


class Awake:
    """Seconds in which this process could have run. `stood_still` counts the long gaps."""

    def __init__(self) -> None:
        self.stood_still = 0
        self._passed_s = 0.0
        self._looked = time.monotonic()
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="awake", daemon=True).start()

    def __call__(self) -> float:
        with self._lock:
            now = time.monotonic()
            gap_s = now - self._looked
            self._passed_s += min(gap_s, MOST_S)
            self.stood_still += gap_s > STILL_S
            self._looked = now
            return self._passed_s

    def _run(self) -> None:
        while True:
            time.sleep(TICK_S)
            self()


awake = Awake()
