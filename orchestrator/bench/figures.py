"""The figures of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    """Figures of one run; times in seconds."""

    concurrency: int | None
    errors: int

    def to_json(self) -> dict[str, Any]:
        """One element of `runs` of `truthgpt bench --json`."""
        raise NotImplementedError
