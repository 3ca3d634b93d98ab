"""When a job is due: a cron expression of five fields, in UTC, whose next time APScheduler computes.

APScheduler differs from cron in two ways, which are mended here: it counts weekdays from Monday, and it demands day and
weekday both where cron (crontab(5)) takes either if both are restricted.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

FIELDS = ("minute", "hour", "day", "month", "day_of_week")
WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_ALIASES = {
    "@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *", "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *",
}  # fmt: skip
_MAX_CHARS = 200
_PART = r"(\*|[a-z0-9]+(-[a-z0-9]+)?)(/[0-9]+)?"
_FIELD = re.compile(rf"{_PART}(,{_PART})*")


class CronError(ValueError):
    """The text is no cron expression, or one for a time that never comes."""


class Cron:
    """A cron expression. Raises CronError for one that is none."""

    def __init__(self, text: str) -> None:
        self.text = " ".join(text.split())
        if _fires(self.text, 0.0) is None:
            raise CronError("this time never comes")

    def after(self, moment: float) -> float:
        """The first time after this one; both are Unix seconds."""
        found = _fires(self.text, moment)
        if found is None:  # beyond the year 9999
            raise CronError("this time never comes")
        return found

    def due(self, mark: float, now: float) -> float | None:
        """The time that is due where all up to `mark` are done: the first that was missed. None where none is."""
        first = self.after(mark)
        return first if first <= now else None


@lru_cache(maxsize=256)
def _fires(text: str, moment: float) -> float | None:
    after = datetime.fromtimestamp(int(moment) + 1, UTC)  # whole seconds: cron has minutes
    times = [trigger.get_next_fire_time(None, after) for trigger in _triggers(text)]
    return min((time.timestamp() for time in times if time is not None), default=None)


@lru_cache(maxsize=64)
def _triggers(text: str) -> tuple[Any, ...]:
    """Those of it that ever fire. To find that one never does takes a tenth of a second: once for each cron."""
    from apscheduler.triggers.cron import CronTrigger  # here: a command that has no jobs to do has no use for it

    parts = _ALIASES.get(text, text).split()
    if len(text) > _MAX_CHARS or len(parts) != len(FIELDS):
        raise CronError(f"it has {len(parts)} fields instead of {len(FIELDS)}")
    fields = dict(zip(FIELDS, (part.lower() for part in parts), strict=True))
    for name, field in fields.items():
        # what APScheduler takes beyond cron, "last" or "1st mon", is not offered: these five fields are everyone's
        if _FIELD.fullmatch(field) is None or "last" in field:
            raise CronError(f"the {name.replace('_', ' ')} {field!r} is not understood")
    either = not fields["day"].startswith("*") and not fields["day_of_week"].startswith("*")
    fields["day_of_week"] = _weekdays(fields["day_of_week"])
    wanted = [fields]
    if either:
        wanted = [{**fields, "day": "*"}, {**fields, "day_of_week": "*"}]
    try:
        triggers = [CronTrigger(**one, second=0, timezone=UTC) for one in wanted]
    except ValueError as error:
        raise CronError(str(error)) from error
    began = datetime.fromtimestamp(0, UTC)
    return tuple(trigger for trigger in triggers if trigger.get_next_fire_time(None, began) is not None)


def _weekdays(field: str) -> str:
    """The weekdays of a field as names; cron counts from Sunday, which is 0 and 7."""
    if field == "*":
        return field
    days: set[int] = set()
    for part in field.split(","):
        span, _, step = part.partition("/")
        low, dash, high = span.partition("-")
        first = 0 if low == "*" else _weekday(low)
        last = 6 if low == "*" else _weekday(high) if dash else 6 if step else first
        if dash and last == 0:  # fri-sun
            last = 7
        if last < first or (step and int(step) == 0):
            raise CronError(f"the day of week {part!r} is not understood")
        days |= {day % 7 for day in range(first, last + 1, int(step or 1))}
    return ",".join(WEEKDAYS[day] for day in sorted(days))


def _weekday(text: str) -> int:
    if text in WEEKDAYS:
        return WEEKDAYS.index(text)
    if text.isdigit() and int(text) <= 7:
        return int(text)
    raise CronError(f"there is no day of week {text!r}")
