"""The negative control: a stack that leaks on purpose (leak/sitecustomize.py), which the soak has to see."""

from __future__ import annotations

import os
from pathlib import Path

from . import engine
from .sampling import Figure

FOLDER = Path(__file__).parent / "leak"
SECONDS, RATE = 8.0, 100.0
SETTING = {
    "SOAK_LEAK_BYTES": "16384", "SOAK_LEAK_FILE_EVERY": "60", "SOAK_LEAK_STUB_BYTES": "16384",
    "SOAK_LEAK_REGION_EVERY": "40",
}  # fmt: skip
LEAKS: frozenset[Figure] = frozenset(
    {
        *((f"worker {number}", what) for number in range(1, engine.WORKERS + 1) for what in ("memory", "files")),
        ("stub", "memory"),
        ("shm", "regions"),
    }
)


def leaking(seconds: float = SECONDS, rate: float = RATE) -> engine.Report:
    """A short soak of a stack whose workers and stub keep something of each request."""
    path = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])
    return engine.run(seconds, rate, environ={**SETTING, "PYTHONPATH": path})


def unseen(report: engine.Report) -> list[str]:
    """The leaks that a soak of such a stack has not seen, a line each: then it proves nothing when it finds none."""
    missed = [figure for figure in sorted(LEAKS) if figure not in report.findings or report.findings[figure].flat]
    return [f"a leak was made and not found: {who} {what}" for who, what in missed]
