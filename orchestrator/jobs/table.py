"""Which jobs there are, and when each is due by itself."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.jobs.cron import Cron, CronError
from orchestrator.settings import Settings

OFF = "off"
# What a job's state belongs to. One that cleans a folder has a state for each folder, by the folder's identity
# (identity.py): replicas with disks of their own clean each its own, and those that share one clean it once.
HOME, REPOSITORY, DEPLOYMENT = "home", "repository", "deployment"


class ScheduleError(Exception):
    """The setting `schedules` names no job, or no time; `hint` says what is right."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Job:
    """One job. `cron` is its time in UTC; a run that takes longer than `deadline_s` seconds is ended and has failed."""

    name: str
    cron: str
    help: str
    deadline_s: float
    scope: str = HOME
    wanted: Callable[[Settings], bool] = lambda settings: True


def _backups(settings: Settings) -> bool:
    return settings.backup


JOBS: dict[str, Job] = {
    job.name: job
    for job in (
        Job("logs", "0 2 * * *", "Remove rotated logs older than log_days.", 600.0),
        Job("cache", "0 */6 * * *", "Remove files in home/cache older than cache_file_age_s.", 1800.0),
        Job("temporary", "0 * * * *", "Remove what interrupted work has left, after temporary_age_s.", 1800.0),
        Job("metrics", "0 3 * * *", "Remove metric history older than metrics_days.", 600.0),
        Job("models", "30 3 * * *", "Remove model versions beyond the newest keep_versions; none in use.", 1800.0,
            REPOSITORY),
        Job("shared_memory", "15 * * * *", "Remove shared memory that crashed model processes have left.", 300.0),
        Job("audit", "45 3 * * *", "Remove whole files of the audit log older than audit_days.", 1800.0),
        Job("cache_ttls", "20 * * * *", "Fit how long answers are cached to how often they are asked.", 300.0,
            DEPLOYMENT),
        Job("backup", "0 4 * * *", "Make a backup and remove those that are too old.", 14_400.0, wanted=_backups),
        Job("backup_check", "0 5 * * *", "Verify the newest backup.", 14_400.0, wanted=_backups),
    )
}  # fmt: skip


def job(name: str) -> Job:
    """Raises ScheduleError for a name that no job has."""
    if name not in JOBS:
        raise ScheduleError(f"there is no job {name}{_nearest(name)}", f"the jobs are {', '.join(JOBS)}")
    return JOBS[name]


def schedules(settings: Settings) -> dict[str, Cron | None]:
    """When each job that these settings have is due, by name; None for one that is switched off.

    Raises ScheduleError where the setting `schedules` names no job, one twice, or what is no time.
    """
    given: dict[str, str] = {}
    for part in filter(str.strip, (settings.schedules or "").split(";")):
        name, _, text = (piece.strip() for piece in part.partition("="))
        if job(name).name in given:
            raise ScheduleError(f"schedules says twice when {name} is due", "leave one of them out")
        given[name] = text
    found: dict[str, Cron | None] = {}
    for row in JOBS.values():
        text = given.get(row.name, row.cron)
        try:
            cron = None if text == OFF else Cron(text)
        except CronError as error:
            hint = "it is minute, hour, day, month and weekday, in UTC, such as `0 2 * * *`; or off"
            raise ScheduleError(f"schedules: {text!r} is no time for {row.name}: {error}", hint) from error
        if row.wanted(settings):
            found[row.name] = cron
    return found


def _nearest(name: str) -> str:
    match = difflib.get_close_matches(name, list(JOBS), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""
