"""What several test processes of a run look at is made by the first that wants it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from filelock import FileLock

T = TypeVar("T")
MAKING_S = 300


def once(paths: pytest.TempPathFactory, name: str, make: Callable[[Path], T]) -> T:
    """What `make` says of what it has put into a folder, which is the same for all processes: nobody may change it."""
    base = paths.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once" / name
    folder.mkdir(parents=True, exist_ok=True)
    said = folder / "said"
    with FileLock(folder / "lock", timeout=MAKING_S):
        if not said.exists():
            answer = make(folder)  # a failure leaves no answer, and the next process tries
            said.with_suffix(".new").write_bytes(pickle.dumps(answer))
            said.with_suffix(".new").rename(said)
        return pickle.loads(said.read_bytes())  # noqa: S301 - our own
