"""The jobs as `truthgpt jobs list` and `history` show them."""

from __future__ import annotations

from typing import Any

import redis

from orchestrator.jobs.ledger import Known, Ledger, Run
from orchestrator.jobs.table import JOBS, Job, schedules
from orchestrator.ops.jobrun import name_found
from orchestrator.settings import Settings


def rows(settings: Settings, client: redis.Redis | None, now: float) -> list[dict[str, Any]]:
    """Every job that these settings have; times are Unix seconds or None, also where there is no Redis to ask.

    Raises ScheduleError and redis.RedisError.
    """
    crons = schedules(settings)
    names = _names(settings, [JOBS[name] for name in crons])
    known = (
        [Known()] * len(names) if client is None else Ledger(client).known([(name, job.name) for job, name in names])
    )
    found = []
    for (job, _), one in zip(names, known, strict=True):
        cron, last = crons[job.name], one.last
        since = now if one.mark is None else min(now, one.mark)
        found.append({
            "name": job.name, "schedule": None if cron is None else cron.text,
            "last_run": None if last is None else last.started, "last_result": None if last is None else last.result,
            "next_run": None if cron is None or one.paused else cron.after(since),
            "last_success": one.success, "paused": one.paused, "running": bool(one.holder),
            "holder": one.holder or None, "error": last.error if last is not None and last.result != "ok" else None,
            "help": job.help,
        })  # fmt: skip
    return found


def history(settings: Settings, client: redis.Redis, job: Job | None, limit: int) -> list[Run]:
    """The last runs of a job, or of all, newest first. Raises redis.RedisError."""
    wanted = list(JOBS.values()) if job is None else [job]
    found = [run for _, name in _names(settings, wanted) for run in Ledger(client).history(name)]
    return sorted(found, key=lambda run: run.started, reverse=True)[:limit]


def _names(settings: Settings, jobs: list[Job]) -> list[tuple[Job, str]]:
    """Each job with its ledger name; one whose folder has none yet was never run, and has nobody's name."""
    return [(job, name_found(settings, job) or f"{job.name}.none") for job in jobs]
