"""The table of jobs and the setting that changes its times."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.jobs.table import JOBS, ScheduleError, schedules
from orchestrator.ops.cleanup import TARGETS
from orchestrator.ops.jobbodies import body
from orchestrator.settings import Settings
from orchestrator.store import lease_key


def test_the_defaults_are_times_and_backups_are_asked_for() -> None:
    """Every job has a time that comes; those of backups are there where backups are made."""
    plain = schedules(Settings())
    assert set(JOBS) - set(plain) == {"backup", "backup_check"}
    full = schedules(replace(Settings(), backup=True))
    assert list(full) == list(JOBS) and all(cron is not None and cron.after(0) > 0 for cron in full.values())


def test_every_job_does_something_and_every_target_is_a_job() -> None:
    """There is a body for each job, each target of cleaning up is one, and its name can be part of a key."""
    assert set(TARGETS) <= set(JOBS) and all(callable(body(name)) for name in JOBS)
    assert all("%" not in lease_key(name) for name in JOBS)


def test_the_setting_changes_times_and_switches_off() -> None:
    """`schedules` gives some jobs other times, leaves one out by `off`, and leaves the others as they are."""
    text = " logs = 0 1 * * * ; models=off;cache=@hourly; "
    found = schedules(replace(Settings(), schedules=text))
    assert found["models"] is None
    assert found["logs"] is not None and found["logs"].text == "0 1 * * *"
    assert found["cache"] is not None and found["cache"].after(0) == 3600
    assert found["metrics"] is not None and found["metrics"].text == JOBS["metrics"].cron
    Settings.load({"schedules": text}, {})  # the settings' own pattern takes it


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lgos=0 1 * * *", "there is no job lgos; did you mean logs?"),
        ("nothing=off", "there is no job nothing"),
        ("logs=0 25 * * *", "schedules: '0 25 * * *' is no time for logs"),
        ("logs=never", "schedules: 'never' is no time for logs: it has 1 fields instead of 5"),
        ("logs=off; logs=0 1 * * *", "schedules says twice when logs is due"),
        ("backup=0 0 31 2 *", "this time never comes"),
    ],
)
def test_a_wrong_setting_is_told(text: str, said: str) -> None:
    """A name that no job has and a time that is none are one error with a hint, also of a job that is not wanted."""
    with pytest.raises(ScheduleError) as caught:
        schedules(replace(Settings(), schedules=text))
    assert said in str(caught.value) and caught.value.hint
