"""What runs beside the workers: assembled from the settings, begun again where it fails, gone when it is cancelled."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from orchestrator import upkeep
from orchestrator.jobs.table import ScheduleError
from orchestrator.metrics import Metrics
from orchestrator.metrics_table import TABLE
from orchestrator.scrape import Scrape
from orchestrator.settings import Settings
from orchestrator.upkeep import Upkeep, job_readings
from tests.redis import RealRedis

from .conftest import until


def assembled(home: Path, **changes: object) -> tuple[Upkeep, Metrics]:
    settings = Settings.load({"home": home, "model_repository": home / "models", **changes}, {})
    metrics = Metrics(lambda model: False)
    return Upkeep(settings, Scrape(1, metrics.snapshot), metrics), metrics


async def test_it_keeps_figures_and_ends_when_cancelled(tmp_path: Path) -> None:
    """Without Redis there are figures of machine and requests, with series of the table; cancelled, all ends."""
    parts, metrics = assembled(tmp_path)
    running = asyncio.create_task(parts.run())
    await until(lambda: bool(parts.figures()["memory"]["total_bytes"]))
    figures = parts.figures()
    assert figures["requests"] == 0 and figures["minute"]["requests"] == 0 and figures["active_users"] is None
    assert figures["alerts"]["firing"] == 0 and "jobs" not in figures
    assert figures["alerts"]["names"] == [] and "unwritten" in figures["alerts"]
    assert {name for name in metrics.readings} <= set(TABLE)
    running.cancel()
    await asyncio.wait([running], timeout=10)
    assert running.cancelled()
    await until(lambda: not [each for each in threading.enumerate() if "disk" in each.name or "memory" in each.name])


async def test_what_is_switched_off_does_not_run(tmp_path: Path) -> None:
    """monitoring off: neither alerts nor history; maintenance off: no jobs, although there is a Redis."""
    parts, _ = assembled(tmp_path, monitoring=False, maintenance=False, redis_url="unix:///nowhere")
    assert set(parts._parts) == {"summary", "store", "shared"}
    parts, _ = assembled(tmp_path, redis_url="unix:///nowhere")
    assert set(parts._parts) == {"summary", "store", "shared", "jobs", "alerts", "history"}


async def test_without_redis_nobody_knows_the_jobs(tmp_path: Path) -> None:
    """What was known of them is old news and null while Redis is away; their series stay as they were."""
    with RealRedis() as server:
        parts, metrics = assembled(tmp_path, monitoring=False, redis_url=server.url)
        assert parts.figures()["jobs"] is None
        running = asyncio.create_task(parts.run())
        await until(lambda: bool(parts.figures()["jobs"]))
        server.kill()
        await until(lambda: parts.figures()["jobs"] is None)
        assert metrics.readings["truthgpt_job_failing"]()
        running.cancel()
        await asyncio.wait([running], timeout=10)


def test_wrong_schedules_are_told_before_anything_runs(tmp_path: Path) -> None:
    """A schedule that is none is an error with a hint."""
    with pytest.raises(ScheduleError) as wrong:
        assembled(tmp_path, schedules="logs=never", redis_url="unix:///nowhere")
    assert "logs" in str(wrong.value) and wrong.value.hint


async def test_a_part_that_fails_begins_again_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a part raises is logged, and after a pause it runs anew; nobody else notices."""
    monkeypatch.setattr(upkeep, "AGAIN_S", 0.01)
    parts, _ = assembled(tmp_path, monitoring=False)
    runs = []

    async def faulty() -> None:
        runs.append(1)
        if len(runs) < 3:
            raise ValueError("no")
        await asyncio.Event().wait()

    parts._parts["faulty"] = faulty
    running = asyncio.create_task(parts.run())
    await until(lambda: len(runs) == 3)
    assert not running.done() and caplog.text.count("faulty failed and begins again") == 2
    running.cancel()
    await asyncio.wait([running], timeout=10)


def test_series_of_jobs() -> None:
    """A job that never ran has no times; a failing one is 1."""
    rows = [
        {"name": "logs", "failing": True, "last_run": 5.0, "last_success": None},
        {"name": "cache", "failing": False, "last_run": None, "last_success": None},
    ]
    read = {name.removeprefix("truthgpt_job_"): dict(reading()) for name, reading in job_readings(lambda: rows).items()}
    assert read == {
        "last_run_timestamp_seconds": {("logs",): 5.0}, "last_success_timestamp_seconds": {},
        "failing": {("logs",): 1.0, ("cache",): 0.0},
    }  # fmt: skip
