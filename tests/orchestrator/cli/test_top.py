"""`truthgpt top`, and how figures read for people."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
from collections import deque
from typing import Any

import pytest

from orchestrator.cli import figures
from orchestrator.cli.top import sparkline
from tests.clock import awake
from tests.orchestrator.gateway import write_state

FIGURES = {
    "time": "2026-11-26T18:00:00.000Z", "window_s": 300.0, "requests": 120, "errors": 3, "refused": 2, "cancelled": 0,
    "error_rate": 0.025, "requests_per_s": 0.4, "tokens_per_s": 35.1, "in_flight": 1, "active_users": 7,
    "latency_s": {"p50": 0.04, "p95": 1.5, "p99": None}, "ttft_s": {"p50": None, "p95": None, "p99": None},
    "cache": {"hits": 5, "misses": 15, "hit_rate": 0.25},
    "memory": {"gateway_bytes": 90 << 20, "used_bytes": 6 << 30, "total_bytes": 24 << 30},
    "gpus": [{"gpu": "0", "used_bytes": 1 << 30, "total_bytes": 80 << 30}],
    "disks": [{"folder": "home", "free_bytes": 50 << 30, "total_bytes": 100 << 30}],
    "jobs": [{"name": "logs", "failing": True}, {"name": "cache", "failing": False}],
    "backup": {"wanted": True, "newest_at": 1_795_710_000.0}, "alerts": {"firing": 2, "critical": 1},
    "models": [{"name": "demo", "breaker": "closed"}, {"name": "big", "breaker": "open"},
               {"name": "tiny", "breaker": "half_open"}],
    "minute": {"requests_per_s": 3.5, "error_rate": 0.5, "tokens_per_s": 9.0, "latency_s": {"p95": 0.25}},
}  # fmt: skip


def test_figures_read_for_people() -> None:
    """Each figure is a line with its unit; the approximate one says so."""
    lines = dict(figures.lines(FIGURES))
    assert lines["requests"] == "120 in 5 min, 3 failed (2.5%), 2 refused, 0.4 a second, 1 now"
    assert lines["latency"] == "p50 40 ms, p95 1.5 s, p99 -" and "to token" not in lines
    assert lines["users"] == "about 7 in five minutes" and lines["cache"] == "5 of 20 answers (25.0%)"
    assert lines["memory"] == "gateway 90.0 MiB, machine 6.0 GiB of 24.0 GiB (25%)"
    assert lines["gpu 0"] == "1.0 GiB of 80.0 GiB (1%)" and lines["disk"] == "home 50.0 GiB free"
    assert lines["breaker"] == "big open, tiny half open (`truthgpt breaker show`)"
    assert lines["jobs"] == "logs failed (`truthgpt jobs history`)"
    assert re.fullmatch(r"the newest is \d+ min old", lines["backup"])
    assert lines["alerts"] == "2 firing, 1 critical (`truthgpt alerts list`)"


def test_what_nobody_can_tell_is_left_out() -> None:
    """Null figures, and figures of another version that are missing, are no line and no failure."""
    assert figures.lines({}) == []
    nothing = {name: None for name in FIGURES} | {"requests": 0, "errors": 0, "error_rate": 0.0, "tokens_per_s": 0}
    assert {what for what, _ in figures.lines(nothing | {"requests_per_s": 0, "in_flight": 0})} == {
        "requests", "tokens"
    }  # fmt: skip


def test_once_is_a_document_or_the_lines_of_status(place: Any, gateway: Any) -> None:
    """--once --json is what status prints; --json alone, which would never end, is wrong usage; exit code as status."""
    gateway.summary = FIGURES
    write_state(place.home, gateway.url, ops=gateway.url)
    assert place.json("top", "--once")["figures"]["requests"] == 120
    assert place.json("status")["figures"] == FIGURES
    shown = place.run("top").stdout
    assert "demo version 1: READY" in shown and "120 in 5 min" in shown
    assert place.run("top", "--json").exit_code == 2
    gateway.ready = False
    assert place.run("top", "--once").exit_code == 1


def test_nothing_running_says_how_to_start_it(place: Any) -> None:
    """Without a stack top ends at once with the command that starts one; as JSON it is the empty document."""
    assert "truthgpt up" in place.refused("top")
    assert place.json("top", "--once", code=1)["figures"] is None


def test_at_a_terminal_it_stays_and_ends_with_ctrl_c(place: Any, gateway: Any) -> None:
    """On a real terminal frames follow one another with curves; Ctrl-C ends it with 130 and gives the screen back."""
    gateway.summary = FIGURES
    write_state(place.home, gateway.url, ops=gateway.url)
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "orchestrator.cli", "top", "--interval", "0.5"]
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    with subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=environ, start_new_session=True) as top:
        try:
            text, began = b"", awake()
            while text.count(b"requests a second") < 3:
                assert awake() - began < 30, text
                if select.select([ours], [], [], 1.0)[0]:
                    text += os.read(ours, 65536)
            top.send_signal(2)
            os.set_blocking(ours, False)
            began = awake()
            while top.poll() is None:
                assert awake() - began < 10
                if select.select([ours], [], [], 0.1)[0]:
                    text += os.read(ours, 65536)
        finally:
            top.kill()
            os.close(ours)
            os.close(theirs)
    assert top.returncode == 130 and b"p95" in text and "█".encode() in text
    assert b"\x1b[?1049l" in text, "the screen before it is back"


@pytest.mark.parametrize(("values", "shown"), [([], ""), ([0, 0], "▁▁"), ([1, 2, 4, 8], "▁▂▄█"), ([5], "█")], ids=str)
def test_a_curve_is_scaled_to_its_highest_value(values: list[float], shown: str) -> None:
    """The highest value is the full block, nothing at all the lowest."""
    assert sparkline(deque(values)) == shown
