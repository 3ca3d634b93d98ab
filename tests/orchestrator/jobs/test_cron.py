"""When a job is due: the times of cron expressions, and that what was missed is done once."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.jobs.cron import Cron, CronError
from tests.clock import awake

MOMENTS = st.floats(1_600_000_000, 2_500_000_000, allow_nan=False)
CRONS = st.sampled_from([
    "0 2 * * *", "0 */6 * * *", "* * * * *", "30 3 * * 1-5", "15 * * * *", "0 0 1 * *", "5,35 8-18 * * mon,sun",
    "0 12 13 * 5", "0 0 29 2 *", "@hourly", "@weekly", "*/7 */5 */3 * *",
])  # fmt: skip


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("cron", "after", "expected"),
    [
        ("0 2 * * *", "2026-11-26 01:59:59", "2026-11-26 02:00:00"),
        ("0 2 * * *", "2026-11-26 02:00:00", "2026-11-27 02:00:00"),
        ("0 */6 * * *", "2026-11-26 06:00:00.5", "2026-11-26 12:00:00"),
        ("0 0 29 2 *", "2026-11-26 00:00:00", "2028-02-29 00:00:00"),
        # 2026-11-26 is a Thursday
        ("0 0 * * 0", "2026-11-26 00:00:00", "2026-11-29 00:00:00"),
        ("0 0 * * 7", "2026-11-26 00:00:00", "2026-11-29 00:00:00"),
        ("0 0 * * sun", "2026-11-26 00:00:00", "2026-11-29 00:00:00"),
        ("0 0 * * 1-5", "2026-11-27 00:00:00", "2026-11-30 00:00:00"),
        ("0 0 * * fri-sun", "2026-11-28 00:00:00", "2026-11-29 00:00:00"),
        ("0 0 * * */2", "2026-11-26 00:00:00", "2026-11-28 00:00:00"),
        # day and weekday: either
        ("0 0 13 * 5", "2026-11-26 00:00:00", "2026-11-27 00:00:00"),
        ("0 0 30 * 1", "2026-11-27 00:00:00", "2026-11-30 00:00:00"),
        ("0 0 28 * 1", "2026-11-27 00:00:00", "2026-11-28 00:00:00"),
        ("@daily", "2026-11-26 00:00:00", "2026-11-27 00:00:00"),
    ],
)
def test_the_next_time_by_example(cron: str, after: str, expected: str) -> None:
    """Times are UTC; weekdays count from Sunday, and day and weekday are alternatives, as crontab(5) says."""
    assert Cron(cron).after(at(after)) == at(expected)


@pytest.mark.parametrize(
    "text",
    ["", "* * * *", "* * * * * *", "61 * * * *", "* 24 * * *", "* * 32 * *", "* * * 13 *", "* * * * 8", "x * * * *",
     "*/0 * * * *", "* * * * */0", "5-1 * * * *", "* * * * 5-1", "0 0 31 2 *", "0 0 last * *", "0 0 1st * *",
     "@reboot", "1-2-3 * * * *", "٣ * * * *", "* * * * " + "1," * 200 + "1", "-1 * * * *"],
)  # fmt: skip
def test_what_is_no_time_is_refused(text: str) -> None:
    """Fields too few, too many or out of range, and days that never come, are errors and no schedules."""
    with pytest.raises(CronError):
        Cron(text)


def test_a_day_that_never_comes_is_looked_for_once() -> None:
    """That one takes a tenth of a second to find out; each look at a schedule that has one beside another is quick."""
    for text in ("0 0 31 2 *", "0 0 31 2 1"):
        with contextlib.suppress(CronError):
            Cron(text)
        began = awake()
        for moment in range(100):
            with contextlib.suppress(CronError):
                Cron(text).after(moment * 1e7)
        assert awake() - began < 1.0


@given(text=st.text(max_size=30))
def test_no_text_is_more_than_refused(text: str) -> None:
    """Whatever is written there is a schedule or a CronError."""
    try:
        Cron(text)
    except CronError:
        return


@given(cron=CRONS, moment=MOMENTS)
def test_the_next_time_is_later_and_nothing_lies_between(cron: str, moment: float) -> None:
    """The time after a moment is beyond it, on a whole minute, and is also the time after any moment in between."""
    made = Cron(cron)
    found = made.after(moment)
    assert found > moment and found % 60 == 0
    assert made.after((moment + found - 1) / 2) == found or (moment + found - 1) / 2 < moment
    assert made.after(found - 1) == found


@given(cron=CRONS, mark=MOMENTS, away_s=st.floats(0, 40 * 86_400), looks=st.lists(st.floats(0, 3600), max_size=8))
def test_what_was_missed_is_done_once(cron: str, mark: float, away_s: float, looks: list[float]) -> None:
    """However many times passed while nobody looked, one run does them, and the next is due at the next time only."""
    made, now = Cron(cron), mark + away_s
    missed = made.after(mark) <= now
    assert (made.due(mark, now) is not None) is missed
    if missed:
        mark, runs = now, 1
        for pause_s in looks:
            due = made.due(mark, now := now + pause_s)
            assert (due is not None) is (made.after(mark) <= now)
            if due is not None:
                assert due > mark
                mark, runs = now, runs + 1
        assert runs <= len(looks) + 1
