"""`truthgpt metrics history` on a history that the real writer has written."""

from __future__ import annotations

import csv
import io
import os
import pty
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.monitor.history import History, file_of, stamp
from orchestrator.ops.metrichistory import COLUMNS, ROWS, STEPS_S, sparkline, step_for, steps

NOON = datetime(2026, 11, 26, 12, tzinfo=UTC).timestamp()


def figures(minute: int, **changes: Any) -> dict[str, Any]:
    return {
        "window_s": 300.0, "requests": 600, "errors": 60, "error_rate": 0.1, "requests_per_s": 2.0,
        "tokens_per_s": 30.0 + minute, "latency_s": {"p50": 0.1, "p95": 0.25, "p99": 0.5}, "ttft_s": None,
        "in_flight": 2, "active_users": 5, "cache": {"hits": 1, "misses": 9, "hit_rate": 0.1},
        "memory": {"gateway_bytes": 5, "used_bytes": 50, "total_bytes": 100}, "triton_up": True, "redis_up": None,
        "alerts": {"firing": 0, "critical": 0}, **changes,
    }  # fmt: skip


@pytest.fixture
def home(place: Any) -> Path:
    """Two gateways' lines of half an hour, with some garbage between."""
    for number in (1, 2):
        writer = History(place.home, f"here:{number}")
        for minute in range(30):
            slow = {"latency_s": {"p50": 0.1, "p95": 3.5, "p99": 4.0}} if (number, minute) == (2, 25) else {}
            writer.write(figures(minute, **slow), NOON + 60 * minute)
        with file_of(place.home, NOON).open("ab") as file:
            file.write(b'{"half\n')
    return Path(place.home)


BETWEEN = ("--since", "2026-11-26T12:00:00Z", "--until", "2026-11-26T12:30:00Z")


def test_the_course_as_a_table(place: Any, home: Path) -> None:
    """A row a step: rates are the means of each gateway's lines, summed; piped, there is no drawing."""
    done = place.run("metrics", "history", *BETWEEN, "--step", "10m")
    assert done.exit_code == 0
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["time", "(UTC)", "requests/s", "errors", "p95", "tokens/s", "memory"],
        ["2026-11-26", "12:00", "4.00", "10.0%", "250", "ms", "69.0", "50%"],
        ["2026-11-26", "12:10", "4.00", "10.0%", "250", "ms", "89.0", "50%"],
        ["2026-11-26", "12:20", "4.00", "10.0%", "3.50", "s", "109.0", "50%"],
    ]


def test_every_line_as_json_and_as_csv(place: Any, home: Path) -> None:
    """--json is one list of the lines as they were written, --csv their main figures under their names."""
    rows = place.json("metrics", "history", *BETWEEN)
    assert len(rows) == 60
    assert rows[0] == {**figures(0), "time": "2026-11-26T12:00:00.000Z", "instance": "here:1"}
    done = place.run("metrics", "history", *BETWEEN, "--csv")
    table = list(csv.DictReader(io.StringIO(done.stdout)))
    assert len(table) == 60 and list(table[0]) == list(COLUMNS)
    assert table[0]["latency_p95_s"] == "0.25" and table[0]["ttft_p95_s"] == "" and table[0]["triton_up"] == "true"
    assert table[0]["redis_up"] == "" and table[59]["tokens_per_s"] == "59.0"
    assert place.json("metrics", "history", "--since", "1m") == []


def test_a_drawing_at_a_terminal(place: Any, home: Path) -> None:
    """People at a terminal see the course of each figure below the table."""
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "orchestrator.cli", "metrics", "history", *BETWEEN, "--step", "5m"]
    environ = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    with open(ours, "rb", buffering=0) as terminal:
        process = subprocess.Popen(argv, stdout=theirs, stdin=subprocess.DEVNULL, env=environ)
        os.close(theirs)
        said = b""
        while True:
            try:
                piece = terminal.read(65536)
            except OSError:  # how a terminal ends
                break
            if not piece:
                break
            said += piece
        assert process.wait() == 0
    lines = said.decode().splitlines()
    assert len(lines) == 1 + 6 + 1 + 5
    assert lines[-4].startswith("errors ") and lines[-3] == "p95              ▁▁▁▁▁█  at most 3.50 s"
    assert "at most 114.0" in lines[-2]


def test_what_is_not_there(place: Any, home: Path) -> None:
    """Without a history the command says so and fails; with none in this time it says so and does not."""
    done = place.run("metrics", "history", "--since", "1m")
    assert (done.exit_code, done.stdout) == (0, "nothing was written in this time\n")
    assert "no metric history" in place.refused("metrics", "history", "--home", str(home / "elsewhere"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--since", "yesterday"), ("--step", "10s"), ("--step", "0m"), ("--csv", "--json"),
        ("--since", "2026-11-26", "--until", "2026-11-25"), ("--until", "999999999999999d"),
    ],
)  # fmt: skip
def test_wrong_usage(place: Any, home: Path, arguments: tuple[str, ...]) -> None:
    """Times, steps and forms that make no sense are refused with exit code 2."""
    place.refused("metrics", "history", *arguments, code=2)


_ROW = st.fixed_dictionaries(
    {"time": st.floats(0, 3e9).map(stamp), "instance": st.sampled_from(["a", "b"])},
    optional={
        "requests_per_s": st.none() | st.floats(0, 1e6) | st.text(), "error_rate": st.floats(0, 1) | st.none(),
        "tokens_per_s": st.integers(0, 10**400), "latency_s": st.none() | st.just({"p95": 1.5}) | st.just([]),
        "memory": st.just({"used_bytes": 5, "total_bytes": 0}) | st.just({"used_bytes": 5, "total_bytes": 10}),
    },
)  # fmt: skip


@given(st.lists(_ROW, max_size=20), st.sampled_from(STEPS_S))
def test_any_lines_make_steps(rows: list[dict[str, Any]], step_s: int) -> None:
    """Whatever is in the lines, steps are in order and aligned, rates are not negative and parts are at most one."""
    found = steps(rows, step_s)
    assert [step.at for step in found] == sorted({step.at for step in found}) and bool(found) == bool(rows)
    for step in found:
        assert step.at % step_s == 0
        assert step.errors is None or -1e-9 <= step.errors <= 1 + 1e-9
        assert step.requests_per_s is None or step.requests_per_s >= 0
        assert step.memory in (None, 0.5) and step.p95_s in (None, 1.5)


def test_minutes_without_a_rate_of_errors_do_not_raise_it() -> None:
    """An idle minute, of which nobody can tell what failed, is no part of what the others' errors are measured by."""
    busy = {"time": stamp(0.0), "instance": "a", "requests_per_s": 1.0, "error_rate": 1.0}
    idle = {"time": stamp(60.0), "instance": "a", "requests_per_s": 0.0, "error_rate": None}
    (step,) = steps([busy, idle], 300)
    assert step.errors == 1.0 and step.requests_per_s == 0.5


@given(st.floats(1, STEPS_S[-1] * ROWS))
def test_the_step_fits_a_screen(duration_s: float) -> None:
    """Any time up to half a year is shown in at most some 24 rows."""
    assert duration_s / step_for(duration_s) <= ROWS


@given(st.lists(st.none() | st.floats(0, 1e300), max_size=50))
def test_a_sparkline_has_a_character_a_value(values: list[float | None]) -> None:
    """The largest is the highest bar, and what nobody could tell is a blank."""
    drawn = sparkline(values)
    assert len(drawn) == len(values)
    for value, letter in zip(values, drawn, strict=True):
        assert (letter == " ") == (value is None)
    known = [value for value in values if value]
    assert not known or drawn[values.index(max(known))] == "█"
