"""What each job does. A body returns what it has done in one sentence, and raises where that is not all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import redis

from orchestrator.ops import auditing, cachetools, cleanup, serving
from orchestrator.ops.cleanwork import Work
from orchestrator.settings import Settings


class JobFailed(Exception):
    """A job found what must not be; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Task:
    """What a body is given. `guard` raises once the run's lease is lost or its time is over, and is called before
    whatever cannot be taken back; `token` is the run's fencing token.
    """

    settings: Settings
    client: redis.Redis
    guard: Callable[[], None]
    token: str


def body(name: str) -> Callable[[Task], str]:
    """What a job of the table does."""
    return _OTHERS.get(name) or _cleaning(name)


def _cleaning(name: str) -> Callable[[Task], str]:
    def clean(task: Task) -> str:
        work = Work(guard=task.guard, elsewhere=serving.elsewhere(task.settings, task.client))
        (tally,) = cleanup.clean(task.settings, work, [name])
        return work.done(tally)

    return clean


def _cache_ttls(task: Task) -> str:
    rows = cachetools.adapt_ttls(task.client, task.guard, int(task.token))
    changed = [
        f"{row['task']} {row['before_s']} s to {row['ttl_s']} s" for row in rows if row["before_s"] != row["ttl_s"]
    ]
    return ", ".join(changed) or "nothing to change"


def _backup(task: Task) -> str:
    from orchestrator.ops import backup

    settings = task.settings
    task.guard()
    # Triton may run elsewhere, with models that are not in a repository here
    here = settings.triton_urls is None or settings.model_repository.is_dir()
    models = settings.backup_models and here
    made = backup.create(settings, models=models, progress=lambda done, total: task.guard())
    auditing.note(settings, "backup create", detail=made.id)
    task.guard()
    removed = backup.prune(settings, made=made.path)
    return f"made {made.path.name}, removed {len(removed)} that are too old"


def _backup_check(task: Task) -> str:
    from orchestrator.ops import backup

    settings = task.settings
    made = backup.newest(settings.backups)
    if made is None:
        raise JobFailed(f"there is no backup in {settings.backups}", "`truthgpt jobs run backup` makes one")
    if made.ahead(time.time()):
        hint = "set the clock of this machine; if it is right, remove or rename that file, whose date is wrong"
        raise JobFailed(f"the newest backup, {made.path.name}, is dated in the future", hint)
    age_s = time.time() - made.created
    if age_s > settings.alert_backup_age_s:
        hint = "`truthgpt jobs history backup` says why none was made since"
        raise JobFailed(f"the newest backup, {made.path.name}, is {age_s / 3600:.0f} hours old", hint)
    backup.verify(made.path, settings.backup_key, lambda done, total: task.guard())
    return f"{made.path.name} verifies"


_OTHERS: dict[str, Callable[[Task], str]] = {
    "cache_ttls": _cache_ttls,
    "backup": _backup,
    "backup_check": _backup_check,
}
