"""Workers for which the system has no process: as those that end at once, and never lost."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from orchestrator import parent

from .conftest import until
from .test_parent import run, stand_in


async def test_a_first_worker_without_a_process_ends_the_gateway(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the system starts no process at all the parent says so and exits with 1 instead of waiting for ever."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    assert await run() == 1
    assert "worker 1 cannot be started" in caplog.text and "giving up" in caplog.text


async def test_a_worker_that_has_no_process_for_a_while_is_started_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that the system does not start counts as one that ended: after a pause the worker is tried again."""
    monkeypatch.setattr(parent, "backoff_s", lambda failures: 0.2)
    script, away = tmp_path / "worker", tmp_path / "away"
    body = (
        "say(b'alive')\n"
        f"if sys.argv[3] == '2' and not os.path.exists({str(away)!r} + '.back'):\n"
        f"    os.rename({str(script)!r}, {str(away)!r})\n"
        "    sys.exit(7)\n"
        "time.sleep(60)"
    )
    starts = stand_in(monkeypatch, tmp_path, body)
    running = asyncio.create_task(run())
    await until(lambda: "worker 2 cannot be started" in caplog.text, 10)
    (tmp_path / "away.back").touch()
    away.rename(script)
    await until(lambda: sorted(starts.read_text().split()) == ["1", "2", "2"], 10)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0
