"""What runs beside the workers: assembled from the settings, begun again where it fails, gone when it is cancelled."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import psutil
import pytest
import redis

from orchestrator import upkeep
from orchestrator.jobs import process
from orchestrator.jobs.identity import identity
from orchestrator.jobs.ledger import Ledger
from orchestrator.jobs.table import ScheduleError
from orchestrator.local import modelset
from orchestrator.local.process import alive
from orchestrator.metrics import Metrics
from orchestrator.metrics_table import TABLE
from orchestrator.scrape import Scrape
from orchestrator.settings import Settings
from orchestrator.store import JOBS
from orchestrator.upkeep import Upkeep, job_readings
from tests.clock import awake
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
    """monitoring off: neither alerts nor history; maintenance off: no figures of jobs, although there is a Redis."""
    parts, metrics = assembled(tmp_path, monitoring=False, maintenance=False, redis_url="unix:///nowhere")
    assert set(parts._parts) == {"summary", "store", "shared", "jobs"}  # the last one to tell what is served here
    assert "jobs" not in parts.figures() and "truthgpt_job_failing" not in metrics.readings
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


async def test_without_maintenance_it_tells_what_is_served_and_starts_nothing(
    tmp_path: Path, server: RealRedis, client: redis.Redis
) -> None:
    """A replica whose own jobs are off: those of others learn what it serves; a job that is due is left to them."""
    (tmp_path / "models").mkdir()
    modelset.write(tmp_path, {"demo": 3})
    client.hset(JOBS, "cache_ttls:due", "1")
    parts, _ = assembled(tmp_path, monitoring=False, maintenance=False, redis_url=server.url)
    running = asyncio.create_task(parts.run())
    repository = identity(tmp_path / "models")
    await until(lambda: Ledger(client).served(repository, time.time()) == {("demo", 3)}, 20)
    await asyncio.sleep(0.5)
    assert not [child for child in psutil.Process().children() if "jobs" in child.cmdline()]
    running.cancel()
    await asyncio.wait([running], timeout=10)
    assert running.done() and client.hget(JOBS, "cache_ttls:due") == b"1"


async def test_a_job_that_does_not_end_is_killed_with_all_it_started(
    tmp_path: Path, server: RealRedis, client: redis.Redis
) -> None:
    """Cancelled while a job stands still: it is killed after its moment of grace, and nobody waits for longer."""
    (tmp_path / "models").mkdir()
    client.hset(JOBS, "cache_ttls:due", "1")
    parts, _ = assembled(tmp_path, monitoring=False, redis_url=server.url, schedules="logs=off")
    running = asyncio.create_task(parts.run())
    children = psutil.Process().children
    await until(lambda: any("cache_ttls" in child.cmdline() for child in children()), 20)
    (job,) = (child for child in children() if "cache_ttls" in child.cmdline())
    job.suspend()
    await until(lambda: job.status() == psutil.STATUS_STOPPED)
    await asyncio.sleep(0.5)  # that it has begun is known by now
    began = awake()
    running.cancel()
    await asyncio.wait([running])
    assert process.END_S * 0.9 < awake() - began < upkeep.END_S
    assert not alive(job.pid)


async def test_what_does_not_end_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A part that takes longer than it may after its cancellation is left behind; each is cancelled once."""
    monkeypatch.setattr(upkeep, "END_S", 0.3)
    parts, _ = assembled(tmp_path, monitoring=False)
    ended, cancelled = asyncio.Event(), []

    async def stubborn() -> None:
        while not ended.is_set():
            try:
                await ended.wait()
            except asyncio.CancelledError:
                cancelled.append(1)

    parts._parts["stubborn"] = stubborn
    running = asyncio.create_task(parts.run())
    await asyncio.sleep(0.1)
    running.cancel()
    await asyncio.wait([running], timeout=10)
    assert running.done() and cancelled == [1] and "stubborn does not end and is left behind" in caplog.text
    ended.set()
    await asyncio.sleep(0.1)


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
