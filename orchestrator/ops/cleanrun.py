"""Cleaning up by hand: each target under the lease of its job, where there is a Redis, and without one where not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import redis

from orchestrator.jobs.ledger import Claim
from orchestrator.jobs.table import JOBS
from orchestrator.ops import cleanup, jobrun
from orchestrator.ops.cleanwork import Tally, Work
from orchestrator.ops.jobbodies import Task
from orchestrator.ops.redis import NoRedis, connect
from orchestrator.settings import Settings


def run(settings: Settings, names: Iterable[str], warn: Callable[[str], None]) -> list[Tally]:
    """Clean these targets; what each came to. `warn` is told what was left out, or done without a lease.

    Raises LeaseLost.
    """
    wanted = list(names)
    done: list[Tally] = []
    try:
        with connect(settings) as client:
            for name in wanted:
                done.append(_leased(settings, client, name, warn))
    except NoRedis as error:
        if done or settings.redis_url is not None:
            warn(f"{error}: nobody else is kept from cleaning up meanwhile")
        work = Work()
        done += cleanup.clean(settings, work, wanted[len(done) :])
    return done


def _leased(settings: Settings, client: redis.Redis, name: str, warn: Callable[[str], None]) -> Tally:
    work = Work()
    try:
        ended = jobrun.run(settings, JOBS[name], client, force=True, do=partial(_clean, name, work))
    except OSError as error:  # the folder that it is about is not there, or cannot be read
        work.begin(name)
        if not isinstance(error, FileNotFoundError):
            work.failed(str(error.filename), error)
        return work.tally
    if isinstance(ended, Claim):
        warn(f"{name} is being done by {ended.holder}")
        return work.begin(name)
    if ended.result != "ok" and not work.tally.failed:  # it was ended in the middle
        work.tally.failed, work.tally.errors = 1, [ended.error]
    return work.tally


def _clean(name: str, work: Work, task: Task) -> str:
    work.guard, work.elsewhere = task.guard, task.elsewhere
    (tally,) = cleanup.clean(task.settings, work, [name])
    return work.done(tally)
