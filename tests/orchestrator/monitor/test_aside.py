"""Blocking work beside the loop, with a deadline."""

from __future__ import annotations

import threading

import pytest

from orchestrator.monitor.aside import Aside
from tests.clock import awake
from tests.orchestrator.conftest import until


async def test_work_that_hangs_is_left_alone() -> None:
    """Past its deadline it is a TimeoutError, the next one at once, until it has ended; what is raised is handed on."""
    aside, go_on = Aside("test"), threading.Event()
    assert await aside.run(lambda: 7, 20) == 7
    with pytest.raises(KeyError):
        await aside.run(lambda: {}["no"], 20)
    with pytest.raises(TimeoutError):
        await aside.run(go_on.wait, 0.05)
    began = awake()
    with pytest.raises(TimeoutError):
        await aside.run(lambda: 7, 20)
    assert awake() - began < 5
    go_on.set()
    await until(lambda: not aside._busy, 20)
    assert await aside.run(lambda: 8, 20) == 8
