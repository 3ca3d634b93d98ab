"""The loop in the gateway's first process that tells what its home serves, and starts jobs when they are due.

It tells in any case, so that no replica that cleans a shared repository removes what is served from here, and starts
jobs where `maintenance` is on. It only looks and starts: a job is a process of its own, `truthgpt jobs run NAME
--scheduled`, which takes the lease. Of several replicas that find a job due at once one gets it, and the others'
processes end without a word. While Redis is away nothing starts; what was due meanwhile is done once, afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.jobs import ledger
from orchestrator.jobs.cron import Cron
from orchestrator.jobs.identity import identity
from orchestrator.jobs.ledger import Known, ledger_name
from orchestrator.jobs.process import JOB_END_S, run_job
from orchestrator.jobs.table import HOME, JOBS, REPOSITORY, Job, schedules
from orchestrator.local import modelset
from orchestrator.settings import Settings
from orchestrator.store import JOBS as HASH
from orchestrator.store import Store, StoreAway, StoreError, lease_key

log = logging.getLogger(__name__)

LOOK_S = 5.0
FOLDERS_S = 10.0  # that a file system may take to say which folder it is
AGAIN_S = 10.0  # before this process starts a job again that it could not do, doubled each time
AGAIN_MOST_S = 600.0
SEEN_S = 60.0  # between two times that what this home serves is said, where it has not changed
END_S = JOB_END_S + 2.0  # in which a job's process has ended, or is given up, once the loop is cancelled

_Folders = tuple[dict[str, str], dict[str, int]]  # identity of each scope's folder; version of each model to serve
StartJob = Callable[[Settings, Job], Awaitable[bool]]  # whether it was run, or need not be any more


@dataclass(frozen=True)
class _Again:
    """A job that could not begin: when it is tried again, Unix seconds, how often that was so in a row, and when it
    had last ended well by then.
    """

    not_before: float = 0.0
    failures: int = 0
    success: float | None = None


class Keeper:
    """`run` starts jobs until it is cancelled. `rows` is what is known of each job, for metrics and alerts.

    `start_job` runs a job's process to its end; False where the job could not even begin, and is still due. `clock`
    tells Unix seconds. Raises ScheduleError where the settings' schedules are wrong.
    """

    def __init__(
        self, settings: Settings, store: Store, start_job: StartJob = run_job, clock: Callable[[], float] = time.time,
        look_s: float = LOOK_S,
    ) -> None:  # fmt: skip
        self.rows: list[dict[str, Any]] = []
        self._settings, self._store, self._start_job, self._clock = settings, store, start_job, clock
        self._look_s = look_s
        wanted = schedules(settings) if settings.maintenance else {}
        self._crons: dict[str, Cron] = {name: cron for name, cron in wanted.items() if cron is not None}
        self._identities: dict[str, str] = {}  # scope -> identity of its folder
        self._serves: dict[str, int] = {}
        self._seen_at = 0.0
        self._seen_what: _Folders | None = None  # what was said then
        self._asking: asyncio.Future[_Folders] | None = None
        self._running: asyncio.Task[None] | None = None
        self._again: dict[str, _Again] = {}  # jobs that could not begin
        self._told = ""

    async def run(self) -> None:
        """Never ends by itself, and raises nothing but that it was cancelled; a job that runs then is ended."""
        try:
            while True:
                try:
                    if await self._look():
                        self._told = ""
                except (StoreAway, StoreError) as error:
                    self._say(f"jobs wait: {error}", logging.DEBUG)
                except Exception as error:
                    self._say(f"jobs wait: {type(error).__name__}: {error}", logging.ERROR)
                await asyncio.sleep(self._look_s * random.uniform(0.8, 1.2))  # noqa: S311 (replicas do not all look at once)
        finally:
            if self._running is not None:
                self._running.cancel()
                await asyncio.wait([self._running], timeout=END_S)

    async def _look(self) -> bool:
        """Whether all is well."""
        well, now = await self._ask_folders(), self._clock()
        await self._seen(now)
        jobs = self._jobs()
        if not jobs:
            return well
        names = [(name, job.name) for name, job in jobs]
        values = await self._store.call("HMGET", HASH, *ledger.fields(names))
        leases = await self._store.call("MGET", *(lease_key(name) for name, _ in names))
        known = ledger.known(values, leases)
        # one that was never seen has nothing to catch up; nor has one whose mark was made by a clock that was wrong
        new = [name for (name, _), one in zip(names, known, strict=True)
               if one.mark is None or one.mark > now + ledger.AHEAD_S]  # fmt: skip
        if new:
            await self._store.run_script(*ledger.baseline(now, new))
        self.rows = [_row(job, one) for (_, job), one in zip(jobs, known, strict=True)]
        for (_, job), one in zip(jobs, known, strict=True):
            if job.name in self._again and self._again[job.name].success != one.success:  # by hand, or elsewhere
                del self._again[job.name]
        if self._running is not None and not self._running.done():
            return well
        due = [
            (at, job, one) for (_, job), one in zip(jobs, known, strict=True)
            if not one.paused and not one.holder
            and not 0 < self._again.get(job.name, _Again()).not_before - now <= AGAIN_MOST_S  # a clock may go back
            and one.mark is not None and (at := self._crons[job.name].due(one.mark, now)) is not None
        ]  # fmt: skip
        if due:
            _, job, one = min(due, key=lambda row: row[0])  # one at a time, the one that waits longest first
            self._running = asyncio.create_task(self._start(job, one), name=f"job {job.name}")
        return well

    async def _start(self, job: Job, known: Known) -> None:
        try:
            begun = await self._start_job(self._settings, job)
        except Exception as error:
            log.error("the job %s could not be started: %s", job.name, error)
            begun = False
        before = self._again.pop(job.name, _Again())
        if not begun:
            pause_s = min(AGAIN_MOST_S, AGAIN_S * 2 ** min(before.failures, 10))
            self._again[job.name] = _Again(self._clock() + pause_s, before.failures + 1, known.success)

    def _jobs(self) -> list[tuple[str, Job]]:
        """The jobs that can run here, each with its ledger name: their folders are there."""
        jobs = []
        for name in self._crons:
            job = JOBS[name]
            if job.scope not in (HOME, REPOSITORY):
                jobs.append((name, job))
            elif job.scope in self._identities:
                jobs.append((ledger_name(name, self._identities[job.scope]), job))
        return jobs

    async def _seen(self, now: float) -> None:
        """Tell the others what this home serves, so that nobody who shares the repository removes it."""
        home, what = self._identities.get(HOME), (self._identities, self._serves)
        if home is not None and not (0 <= now - self._seen_at < SEEN_S and what == self._seen_what):
            await self._store.run_script(*ledger.seen(now, home, self._identities.get(REPOSITORY, ""), self._serves))
            self._seen_at, self._seen_what = now, what

    async def _ask_folders(self) -> bool:
        """Look into the folders; whether they answer. In a thread that nobody waits for: a file system may hang."""
        if self._asking is None:
            settings = self._settings
            self._asking = _in_thread(lambda: _look_into(settings))
        done, _ = await asyncio.wait([self._asking], timeout=FOLDERS_S)
        if not done:
            self._say("jobs wait: the home's or the repository's file system does not answer", logging.WARNING)
            return False
        asked, self._asking = self._asking, None
        self._identities, self._serves = asked.result()
        return True

    def _say(self, text: str, level: int) -> None:
        if text != self._told:  # once, not every five seconds
            self._told = text
            log.log(level, "%s", text)


def _row(job: Job, known: Known) -> dict[str, Any]:
    """A job as the figures have it; times are Unix seconds."""
    last = known.last
    failing = last is not None and last.result != "ok"
    return {
        "name": job.name, "failing": failing, "last_run": last.started if last is not None else None,
        "last_success": known.success,
        "error": last.error.partition("\n")[0] if last is not None and failing else "",
    }  # fmt: skip


def _look_into(settings: Settings) -> _Folders:
    found = {}
    for scope, folder in ((HOME, settings.home), (REPOSITORY, settings.model_repository)):
        try:
            found[scope] = identity(folder)
        except OSError as error:
            log.debug("no jobs for %s: %s", folder, error)
    return found, modelset.read(settings.home)


def _in_thread(work: Callable[[], _Folders]) -> asyncio.Future[_Folders]:
    """Its result, from a thread that keeps no process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Folders] = loop.create_future()

    def done(result: _Folders | Exception) -> None:
        if future.done():
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    def target() -> None:
        try:
            result: _Folders | Exception = work()
        except Exception as error:
            result = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(done, result)

    threading.Thread(target=target, name="folders", daemon=True).start()
    return future
