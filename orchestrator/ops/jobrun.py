"""Running one job in this process, under its lease."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import redis

from orchestrator.jobs.identity import find, identity
from orchestrator.jobs.lease import Lease, LeaseLost, boottime
from orchestrator.jobs.ledger import CLAIMED, DONE, LEASE_S, Claim, Ledger, Run, ledger_name
from orchestrator.jobs.table import HOME, REPOSITORY, Job, schedules
from orchestrator.ops.cleanwork import as_text
from orchestrator.ops.jobbodies import Task, body
from orchestrator.settings import Settings

FINISH_S = 30.0  # that Redis may be away when a run ends
FINISH_STEP_S = 0.5


class _Ended(BaseException):
    """Not an error that a body could take for its own."""


class DeadlinePassed(_Ended):
    """The job took longer than it may."""


class Stopped(_Ended):
    """The process was told to end (SIGTERM)."""


def name_of(settings: Settings, job: Job) -> str:
    """A job's name in the ledger; its folder gets an identity by it. Raises OSError where that is not there."""
    folder = _folder(settings, job)
    return ledger_name(job.name, "" if folder is None else identity(folder))


def name_found(settings: Settings, job: Job) -> str | None:
    """The same for whoever only looks: None where its folder has no identity yet, so that it was never run."""
    folder = _folder(settings, job)
    if folder is None:
        return job.name
    try:
        found = find(folder)
        # one that cannot be written has one on this machine, and is not written by asking for it
        found = identity(folder) if found is None and not os.access(folder, os.W_OK) else found
    except OSError:
        return None
    return None if found is None else ledger_name(job.name, found)


def _folder(settings: Settings, job: Job) -> Path | None:
    return {HOME: settings.home, REPOSITORY: settings.model_repository}.get(job.scope)


def run(
    settings: Settings, job: Job, client: redis.Redis, *, scheduled: bool = False, force: bool = False,
    do: Callable[[Task], str] | None = None, lease_s: float = LEASE_S,
) -> Run | Claim:  # fmt: skip
    """Run a job now; how it ended, or why it did not begin. `scheduled`: only if it is due; `force`: also if paused.

    Raises OSError, LeaseLost, Stopped after SIGTERM, and redis.RedisError where Redis is away when it begins or ends.
    Whatever is raised but LeaseLost, the lease is given back where Redis can be reached.
    """
    ledger, name, now = Ledger(client), name_of(settings, job), time.time()
    expected = None
    if scheduled:
        expected = _due(settings, job, ledger, name, now)
        if expected is None:
            return Claim(DONE)
    holder, since = f"{platform.node() or 'unknown'}:{os.getpid()}", boottime()
    claim = ledger.claim(name, job.name, holder, now, expected, force, lease_s)
    if claim.outcome != CLAIMED:
        return claim
    with Lease(ledger, name, claim.token, holder, since, lease_s) as lease:
        try:
            with limited(job.deadline_s) as check_time:

                def guard() -> None:
                    check_time()
                    lease.check()

                result, did, error = _worked(do or body(job.name), Task(settings, client, guard, claim.token))
        except LeaseLost:
            raise
        except BaseException:
            with contextlib.suppress(redis.RedisError):  # then it ends by itself
                ledger.release(name, claim.token, holder)
            raise
        ended = Run(job.name, now, round(time.time() - now, 3), result, did, error, holder, not scheduled)
        if not _finished(ledger, name, claim.token, ended, now):
            raise LeaseLost(name)
    return ended


def _due(settings: Settings, job: Job, ledger: Ledger, name: str, now: float) -> str | None:
    """The mark for which a job is due; None where it is not."""
    cron = schedules(settings).get(job.name)
    ledger.baseline(now, [name])
    (known,) = ledger.known([(name, job.name)])
    if cron is None or known.mark is None or cron.due(known.mark, now) is None:
        return None
    return known.raw_mark


def _worked(do: Callable[[Task], str], task: Task) -> tuple[str, str, str]:
    """Result, what was done, and the error."""
    try:
        return "ok", do(task), ""
    except LeaseLost:
        raise
    except DeadlinePassed as error:
        return "failed", "", str(error)
    except Exception as error:
        said = str(error).strip() or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            said = f"{os.fsdecode(error.filename or 'the operating system')}: {error.strerror}"
        elif not hasattr(error, "hint"):
            said = f"{type(error).__name__}: {said}"
        return "failed", str(getattr(error, "did", "")), as_text(said)


def _finished(ledger: Ledger, name: str, token: str, ended: Run, mark: float) -> bool:
    """Write down how a run ended, also where Redis is away for a moment. Raises redis.RedisError."""
    deadline = time.monotonic() + FINISH_S
    while True:
        try:
            return ledger.finish(name, token, ended, mark)
        except (redis.ConnectionError, redis.TimeoutError):
            if time.monotonic() > deadline:
                raise
            time.sleep(FINISH_STEP_S)


@contextmanager
def limited(deadline_s: float = 0.0) -> Iterator[Callable[[], None]]:
    """Raise DeadlinePassed inside after so many seconds (0: never), and Stopped at SIGTERM. For a main thread.

    What is raised where a signal finds the program may be lost: an event loop reports what its callbacks raise, and
    goes on, and so does Python with finalizers. What is yielded raises it again, from then on.
    """
    ended: list[_Ended] = []
    outer = signal.getsignal(signal.SIGTERM)

    def late(number: int, frame: FrameType | None) -> None:
        ended.append(DeadlinePassed(f"it took longer than {deadline_s:g} s"))
        raise ended[0]

    def told(number: int, frame: FrameType | None) -> None:
        ended.append(Stopped())
        if callable(outer):  # whoever called this knows it as well then
            outer(number, frame)
        raise ended[0]

    def check() -> None:
        if ended:
            raise ended[0]

    before = {signal.SIGALRM: signal.signal(signal.SIGALRM, late), signal.SIGTERM: signal.signal(signal.SIGTERM, told)}
    signal.setitimer(signal.ITIMER_REAL, deadline_s)
    try:
        yield check
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in before.items():
            signal.signal(number, handler)
