"""Tables of the commands, at real terminals of several widths and in pipes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

NAMES = ("TruthGPTNotificationsFailing", "TruthGPTDiskFull")
WHAT = "95.0% of the disk of the folder backups is in use, and soon there is no room any more"
PROGRAM = f"""
from orchestrator.cli import table
rows = [(name, ":x: [b]critical", "9", {WHAT!r}) for name in {NAMES!r}]
table.show(("NAME", "SEVERITY", "COUNT", "WHAT"), rows, folds=("WHAT",), right=("COUNT",))
"""


def at_a_terminal(columns: int) -> list[str]:
    """The lines that the program writes at a terminal that is so wide."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environ = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environ |= {"TERM": "xterm"}
    argv, text = [sys.executable, "-c", PROGRAM], b""
    with subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=environ) as program:
        os.close(theirs)
        try:
            while part := os.read(ours, 65536):
                text += part
        except OSError:  # it has ended
            pass
    os.close(ours)
    assert program.returncode == 0, text
    return re.sub(r"\x1b\[[0-9;]*m", "", text.decode()).splitlines()


def test_in_a_pipe_a_row_is_a_line() -> None:
    """Whatever COLUMNS says, nothing is folded, and nothing stands at the end of a line."""
    environ = {**os.environ, "COLUMNS": "40"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "NAME                          SEVERITY         COUNT  WHAT",
        f"TruthGPTNotificationsFailing  :x: [b]critical      9  {WHAT}",
        f"TruthGPTDiskFull              :x: [b]critical      9  {WHAT}",
    ]


@pytest.mark.parametrize("columns", [70, 80, 200])
def test_at_a_terminal_only_text_is_folded(columns: int) -> None:
    """Names, states and numbers are whole; the sentence takes as many lines as it needs, none too wide."""
    lines = at_a_terminal(columns)
    assert max(len(line) for line in lines) <= columns and (columns > 80) == (len(lines) == 3)
    text = " ".join(" ".join(lines).split())
    assert all(text.count(name) == 1 for name in NAMES) and text.count("critical 9") == 2
    last = [line[54:].strip() for line in lines[1:]]
    assert " ".join(" ".join(last).split()) == f"{WHAT} {WHAT}"


def test_at_a_narrow_terminal_nothing_is_lost() -> None:
    """Where not even the names fit, the lines are as in a pipe, and the terminal breaks them."""
    assert sum(WHAT in line for line in at_a_terminal(50)) == 2
