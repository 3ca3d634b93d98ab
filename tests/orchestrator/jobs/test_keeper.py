"""The loop that starts jobs, with a real Redis and real processes."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import redis

from orchestrator.jobs import process
from orchestrator.jobs.identity import identity
from orchestrator.jobs.keeper import Keeper
from orchestrator.jobs.ledger import Ledger, ledger_name
from orchestrator.jobs.table import JOBS as TABLE
from orchestrator.jobs.table import Job, ScheduleError
from orchestrator.local import modelset
from orchestrator.settings import Settings
from orchestrator.store import JOBS, REGISTRY, Store
from tests.orchestrator.conftest import until
from tests.redis import RealRedis

ROOT = Path(__file__).resolve().parents[3]
HOUR = 3600.0


@pytest.fixture
def settings(tmp_path: Path, server: RealRedis, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A home and a repository on a real, empty Redis; only cache_ttls and logs are switched on."""
    for name in [name for name in os.environ if name.startswith("TRUTHGPT_")]:
        monkeypatch.delenv(name)
    (tmp_path / "home" / "logs").mkdir(parents=True)
    (tmp_path / "repository").mkdir()
    off = ";".join(f"{name}=off" for name in TABLE if name not in ("cache_ttls", "logs"))
    return replace(
        Settings(), home=tmp_path / "home", model_repository=tmp_path / "repository", redis_url=server.url,
        redis_timeout_s=2.0, schedules=off,
    )  # fmt: skip


@asynccontextmanager
async def keeping(settings: Settings, count: int = 1, **more: object) -> AsyncIterator[list[Keeper]]:
    """Keepers with a store each, as `count` replicas are; they look ten times a second."""
    assert settings.redis_url is not None
    tasks, keepers = [], []
    for _ in range(count):
        store = Store(settings.redis_url, settings.redis_timeout_s)
        keepers.append(Keeper(settings, store, look_s=0.1, **more))  # type: ignore[arg-type]
        tasks += [asyncio.create_task(store.run()), asyncio.create_task(keepers[-1].run())]
    try:
        yield keepers
    finally:
        for task in reversed(tasks):
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results), results


def make_due(client: redis.Redis, name: str, since_s: float = 2 * HOUR) -> None:
    client.hset(JOBS, f"{name}:due", str(time.time() - since_s))


def logs_of(settings: Settings) -> str:
    return ledger_name("logs", identity(settings.home))


async def test_several_replicas_run_a_due_job_once(settings: Settings, client: redis.Redis) -> None:
    """Five keepers on one Redis find a job due at the same moment: one process does it, nobody complains."""
    make_due(client, "cache_ttls")
    async with keeping(settings, 5) as keepers:
        await until(lambda: Ledger(client).history("cache_ttls") != [], 60)
        await until(lambda: all(keeper._running is None or keeper._running.done() for keeper in keepers), 60)
        await until(lambda: all(keeper.rows[-1]["last_run"] is not None for keeper in keepers if keeper.rows), 20)
        (run,) = Ledger(client).history("cache_ttls")
        assert (run.result, run.manual) == ("ok", False)
        assert run.did.startswith("text_generation 3600 s to 1800 s, ")  # halved, and not a second time
        row = next(row for row in keepers[0].rows if row["name"] == "cache_ttls")
        assert row == {
            "name": "cache_ttls", "failing": False, "last_run": run.started, "error": "",
            "last_success": pytest.approx(run.started + run.seconds, abs=0.01),
        }  # fmt: skip


async def test_what_a_replica_cleans_is_its_own(settings: Settings, client: redis.Redis, tmp_path: Path) -> None:
    """Replicas with a home each clean each its own, and those that share one clean it once."""
    other = replace(settings, home=tmp_path / "other")
    (other.home / "logs").mkdir(parents=True)
    for home in (settings.home, other.home):
        old = home / "logs" / "gateway.log.1"
        old.touch()
        os.utime(old, (1.0, 1.0))
        make_due(client, ledger_name("logs", identity(home)), 30 * HOUR)
    async with keeping(settings, 2), keeping(other):
        for one in (settings, other):
            await until(lambda one=one: Ledger(client).history(logs_of(one)) != [], 60)  # type: ignore[misc]
        await asyncio.sleep(0.5)
    for one in (settings, other):
        (run,) = Ledger(client).history(logs_of(one))
        assert run.did == "1 removed, 0 bytes" and list((one.home / "logs").iterdir()) == []


async def test_a_fresh_installation_runs_nothing(settings: Settings, client: redis.Redis) -> None:
    """Jobs that are seen for the first time are due at their next time, not at once."""
    started: list[str] = []
    async with keeping(settings, start_job=_noting(started)) as (keeper,):
        await until(lambda: len(keeper.rows) == 2)
        await until(lambda: client.hget(JOBS, "cache_ttls:due") is not None)
        await asyncio.sleep(0.5)
    assert started == [] and keeper.rows[0]["last_run"] is None


async def test_what_redis_kept_from_running_is_caught_up_once(settings: Settings, client: redis.Redis) -> None:
    """While Redis does not answer nothing starts and nothing fails; afterwards a day of missed times is one run."""
    make_due(client, "cache_ttls", 24 * HOUR)
    with RealRedis() as own:
        with redis.Redis.from_url(own.url) as there:
            make_due(there, "cache_ttls", 24 * HOUR)
            own.stop_answering()
            async with keeping(replace(settings, redis_url=own.url, redis_timeout_s=0.2)) as (keeper,):
                await asyncio.sleep(1.0)
                assert keeper.rows == [] and keeper._running is None
                own.go_on()
                await until(lambda: Ledger(there).history("cache_ttls") != [], 60)
                await until(lambda: keeper._running is not None and keeper._running.done(), 60)
                await asyncio.sleep(0.5)
                assert len(Ledger(there).history("cache_ttls")) == 1
                own.kill()  # away for good: the loop goes on, and ends in order
                await asyncio.sleep(0.5)


async def test_a_paused_job_does_not_run(settings: Settings, client: redis.Redis) -> None:
    """A paused job stays due; resumed, it runs once."""
    make_due(client, "cache_ttls")
    Ledger(client).pause("cache_ttls", time.time())
    started: list[str] = []
    async with keeping(settings, start_job=_noting(started)) as (keeper,):
        await until(lambda: len(keeper.rows) == 2)
        await asyncio.sleep(0.5)
        assert started == []
        Ledger(client).resume("cache_ttls")
        await until(lambda: "cache_ttls" in started)


async def test_one_at_a_time_the_longest_due_first(settings: Settings, client: redis.Redis) -> None:
    """Two due jobs are not two processes at once."""
    make_due(client, "cache_ttls", 2 * HOUR)
    make_due(client, logs_of(settings), 60 * HOUR)
    started: list[str] = []
    go = asyncio.Event()

    async def start(settings: Settings, job: Job) -> bool:
        started.append(job.name)
        await go.wait()
        client.hset(JOBS, f"{logs_of(settings) if job.name == 'logs' else job.name}:due", str(time.time()))
        return True

    async with keeping(settings, start_job=start):
        await until(lambda: started != [], 30)
        await asyncio.sleep(0.5)
        assert started == ["logs"]
        go.set()
        await until(lambda: started == ["logs", "cache_ttls"], 30)


async def test_what_cannot_be_started_is_tried_again_ever_more_rarely(
    settings: Settings, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that cannot be had is logged and waited for; the loop, and what it knows, goes on."""
    make_due(client, "cache_ttls")
    now, tried = [time.time()], list[float]()

    async def start(settings: Settings, job: Job) -> bool:
        tried.append(now[0])
        raise OSError("no more processes")

    async with keeping(settings, start_job=start, clock=lambda: now[0]):
        for count in (1, 2, 3):
            await until(lambda count=count: len(tried) == count)  # type: ignore[misc]
            await asyncio.sleep(0.3)
            assert len(tried) == count
            now[0] += 10.0 * 2 ** (count - 1) + 1
    assert "could not be started: no more processes" in caplog.text


async def test_one_that_ran_and_failed_is_not_one_that_could_not_begin(
    settings: Settings, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A real run that fails is written down and waits for its next time, with no pause of its own before it."""
    client.hset(REGISTRY, "fence", "99999999999999")  # so that the job is overtaken, and fails
    make_due(client, "cache_ttls")
    async with keeping(settings) as (keeper,):
        for count in (1, 2):
            await until(lambda count=count: len(Ledger(client).history("cache_ttls")) == count, 60)  # type: ignore[misc]
            await until(lambda: keeper._running is not None and keeper._running.done(), 20)
            assert keeper._again == {}
            make_due(client, "cache_ttls")  # its next time has come, at once
    assert {run.result for run in Ledger(client).history("cache_ttls")} == {"failed"}
    assert f"the job cache_ttls ended with {process.RAN_AND_FAILED}" in caplog.text


async def test_a_success_elsewhere_ends_the_pause(settings: Settings, client: redis.Redis) -> None:
    """A job that could not begin here, and then was run by hand, begins without a pause when it is due again."""
    make_due(client, "cache_ttls")
    tried: list[str] = []

    async def start(settings: Settings, job: Job) -> bool:
        tried.append(job.name)
        return False

    async with keeping(settings, start_job=start):
        await until(lambda: len(tried) == 1)
        client.hset(JOBS, mapping={"cache_ttls:due": str(time.time()), "cache_ttls:success": str(time.time())})
        await asyncio.sleep(0.5)
        make_due(client, "cache_ttls")
        await until(lambda: len(tried) == 2)


async def test_a_fault_in_a_look_ends_nothing(
    settings: Settings, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """What makes no sense in Redis is logged once, and the loop works again when it is gone."""
    client.set(JOBS, "not a hash")
    async with keeping(settings) as (keeper,):
        await asyncio.sleep(0.6)
        assert keeper.rows == []
        client.delete(JOBS)
        await until(lambda: len(keeper.rows) == 2)
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) <= 1


async def test_what_this_home_serves_is_told(settings: Settings, client: redis.Redis) -> None:
    """The models of the home's model set stand in Redis, for whoever cleans the repository that they share."""
    modelset.write(settings.home, {"demo": 3})
    async with keeping(settings):
        repository = identity(settings.model_repository)
        await until(lambda: Ledger(client).served(repository, time.time()) == {("demo", 3)})
        modelset.write(settings.home, {"demo": 4, "other": 1})  # not a minute later but at the next look
        await until(lambda: Ledger(client).served(repository, time.time()) == {("demo", 4), ("other", 1)})


async def test_a_killed_job_is_taken_over(settings: Settings, client: redis.Redis, tmp_path: Path) -> None:
    """kill -9 in the middle: when the lease has ended another replica does the work, and the time is done once."""
    make_due(client, "cache_ttls")
    folder = tmp_path / "work"
    folder.mkdir()
    processes: list[asyncio.subprocess.Process] = []

    async def start(settings: Settings, job: Job) -> bool:
        made = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.orchestrator.jobs.working", job.name, "2.0", str(folder),
            env={**os.environ, **settings.child_environ()}, cwd=ROOT,
        )  # fmt: skip
        processes.append(made)
        return await made.wait() == 0

    def notes(what: str) -> list[str]:
        path = folder / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split()[1] for line in lines if line.startswith(what)]

    try:
        async with keeping(settings, 3, start_job=start):
            await until(lambda: len(notes("begun")) == 1, 60)
            first = notes("begun")[0]
            os.kill(int(first), signal.SIGKILL)
            await until(lambda: len(notes("begun")) == 2, 60)
            (folder / "go").touch()
            await until(lambda: Ledger(client).history("cache_ttls") != [], 60)
            await asyncio.sleep(1.0)
    finally:
        for one in processes:
            if one.returncode is None:
                one.kill()
            await one.wait()
    assert notes("done") == [notes("begun")[1]] != [first]
    (run,) = Ledger(client).history("cache_ttls")
    assert run.did == "worked" and run.result == "ok"
    assert Ledger(client).known([("cache_ttls", "cache_ttls")])[0].holder == ""


async def test_a_suspended_holder_does_no_harm(settings: Settings, client: redis.Redis, tmp_path: Path) -> None:
    """A holder that stood still until another had taken over does nothing when it goes on, and writes nothing."""
    make_due(client, "cache_ttls")
    folder = tmp_path / "work"
    folder.mkdir()
    command = [sys.executable, "-m", "tests.orchestrator.jobs.working", "cache_ttls", "1.5", str(folder)]
    environ = {**os.environ, **settings.child_environ()}

    def begun() -> int:
        return (folder / "log").read_text().count("begun") if (folder / "log").exists() else 0

    stalled = await asyncio.create_subprocess_exec(*command, env=environ, cwd=ROOT, stderr=asyncio.subprocess.PIPE)
    await until(lambda: begun() == 1, 60)
    os.kill(stalled.pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(2.0)
        other = await asyncio.create_subprocess_exec(*command, env=environ, cwd=ROOT)
        await until(lambda: begun() == 2, 60)
        (folder / "go").touch()
        assert await other.wait() == 0
    finally:
        os.kill(stalled.pid, signal.SIGCONT)
    _, said = await stalled.communicate()
    assert stalled.returncode == 1 and b"LeaseLost" in said
    assert (folder / "log").read_text().count("done") == 1
    assert len(Ledger(client).history("cache_ttls")) == 1


async def test_a_job_ends_with_the_keeper(settings: Settings, client: redis.Redis, tmp_path: Path) -> None:
    """The gateway stops while a job runs: the process ends, its lease is free at once, and the time stays due."""
    make_due(client, "cache_ttls")
    before = client.hget(JOBS, "cache_ttls:due")
    pids: list[int] = []

    async def start(settings: Settings, job: Job) -> bool:
        made = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.orchestrator.jobs.working", job.name, "15", str(tmp_path),
            env={**os.environ, **settings.child_environ()}, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        pids.append(made.pid)
        try:
            return await made.wait() == 0
        finally:
            await process._ended(made)

    async with keeping(settings, start_job=start):
        await until(lambda: (tmp_path / "log").exists(), 60)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    (known,) = Ledger(client).known([("cache_ttls", "cache_ttls")])
    assert known.holder == "" and known.last is None and client.hget(JOBS, "cache_ttls:due") == before


async def test_a_process_that_does_not_end_is_killed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, client: redis.Redis
) -> None:
    """Beyond its deadline a job's process is killed whatever it does, and that is in the log."""
    monkeypatch.setattr(process, "GRACE_S", 0.0)
    monkeypatch.setattr(process, "END_S", 0.1)
    job = replace(TABLE["cache_ttls"], deadline_s=0.05)
    assert await process.run_job(settings, job) is False
    assert "the job cache_ttls does not end: it is killed" in caplog.text
    assert not [child for child in psutil.Process().children() if "orchestrator.cli" in " ".join(child.cmdline())]


async def test_a_job_dies_with_its_parent(settings: Settings, client: redis.Redis, tmp_path: Path) -> None:
    """The gateway is killed: its job's process gets SIGTERM from the kernel; one that comes too late ends by itself."""
    script = (
        "import subprocess, sys, os, time\n"
        "from orchestrator.jobs.process import become_child_of\n"
        "code = 'import os, sys, time; from orchestrator.jobs.process import become_child_of; '"
        "       'become_child_of(int(sys.argv[1])); print(os.getpid(), os.nice(0), flush=True); time.sleep(60)'\n"
        "subprocess.run([sys.executable, '-c', code, str(os.getpid())])\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    assert parent.stdout is not None
    pid, nice = map(int, (await parent.stdout.readline()).split())
    assert nice >= 10
    parent.kill()
    await parent.wait()
    await until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 20)
    late = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from orchestrator.jobs.process import become_child_of as b; b(1 << 22); print('alive')",
        stdout=asyncio.subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    out, _ = await late.communicate()
    assert out == b"" and late.returncode == 0


def test_wrong_schedules_are_told_at_once(settings: Settings) -> None:
    """Whoever makes a keeper with schedules that are none is told, not the log every five seconds."""
    with pytest.raises(ScheduleError):
        Keeper(replace(settings, schedules="lgos=off"), Store("unix:///nowhere", 0.1))


def _noting(started: list[str]) -> Callable[[Settings, Job], Awaitable[bool]]:
    async def start(settings: Settings, job: Job) -> bool:
        started.append(job.name)
        await asyncio.sleep(3600)
        return True

    return start
