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
from orchestrator.ops.serving import elsewhere
from orchestrator.settings import Settings


def run(settings: Settings, names: Iterable[str], warn: Callable[[str], None], done: list[Tally]) -> None:
    """Clean these targets; what each came to is put into `done`, also of one in whose middle this is ended.

    `warn` is told what was left out, or done without a lease. Raises LeaseLost, and jobrun.Stopped after SIGTERM.
    """
    wanted = list(names)
    with jobrun.limited() as check:
        try:
            with connect(settings) as client:
                for name in wanted:
                    check()
                    _leased(settings, client, name, warn, done)
        except NoRedis as error:
            left = wanted[len(done) :]
            if not left:
                warn(f"{error}: this is not in the history of the jobs")
            elif done or settings.redis_url is not None:
                warn(f"{error}: nobody else is kept from cleaning up meanwhile")
            for name in left:
                work = Work(guard=check, elsewhere=elsewhere(settings, None))
                try:
                    cleanup.clean(settings, work, [name])
                finally:
                    done += work.tallies


def _leased(settings: Settings, client: redis.Redis, name: str, warn: Callable[[str], None], done: list[Tally]) -> None:
    work = Work(elsewhere=elsewhere(settings, client))
    try:
        ended = jobrun.run(settings, JOBS[name], client, force=True, do=partial(_clean, name, work))
        if isinstance(ended, Claim):
            warn(f"{name} is being done by {ended.holder}")
            work.begin(name)
        elif ended.result != "ok" and not work.tally.failed:  # it was ended in the middle
            work.tally.failed, work.tally.errors = 1, [ended.error]
    except OSError as error:  # the folder that it is about is not there, or cannot be read
        if not work.tallies:
            work.begin(name)
        if not isinstance(error, FileNotFoundError):
            work.failed(str(error.filename), error)
    finally:
        done += work.tallies  # none where it did not begin


def _clean(name: str, work: Work, task: Task) -> str:
    work.guard = task.guard
    (tally,) = cleanup.clean(task.settings, work, [name])
    return work.done(tally)
