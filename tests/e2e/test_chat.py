"""`truthgpt chat` as people have it: at a terminal, with the real stack."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .stack import COMMAND, Stack, wait_until

WAIT_S = 20.0


class Terminal:
    """A command at a pseudo-terminal; what it shows is read until it shows what is waited for."""

    def __init__(self, stack: Stack, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        environ = {**stack.environ, "TERM": "dumb", "INPUTRC": "/dev/null"}
        self.process = subprocess.Popen(
            [*COMMAND, "chat", *arguments], env=environ, stdin=slave, stdout=slave, stderr=slave,
            start_new_session=True, preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(slave)
        self._unread = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, pattern: str) -> str:
        """What was shown up to and with the first match."""
        deadline = time.monotonic() + WAIT_S
        while (found := re.search(pattern, self._unread)) is None:
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} is not in {self._unread!r}"
            try:
                self._unread += os.read(self._master, 65536).decode("utf-8", "replace").replace("\r", "")
            except OSError:  # the other end is closed
                raise AssertionError(f"{pattern!r} is not in {self._unread!r}, and it has ended") from None
        shown, self._unread = self._unread[: found.end()], self._unread[found.end() :]
        return shown

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def _take_terminal() -> None:
    """Make standard input the terminal that controls the session, so that what is typed there interrupts."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(stack: Stack) -> Iterator[Terminal]:
    opened = Terminal(stack, "--max-tokens", "150", "--temperature", "0", "--system", "one")
    yield opened
    opened.close()


def test_a_chat_at_a_terminal(stack: Stack, terminal: Terminal, tmp_path: Path) -> None:
    """Lines are edited, an answer streams, Ctrl-C stops it and the chat goes on, commands do what they
    say, Ctrl-D ends it, and the next chat knows the lines of this one.
    """
    terminal.until(r"counting at http://127\.0\.0\.1:\d+; /help lists what can be typed.*\n")
    terminal.until(r"you> ")
    terminal.type("onX\x7fe\n")  # a letter is taken back
    terminal.until(r"counting> two three one")
    wait_until(lambda: stack.load()["running"] == 1, 5, "it runs")
    terminal.type("\x03")
    terminal.until(r"note: the answer was stopped\n")
    wait_until(lambda: stack.load()["running"] == 0, 2, "its slot is free")
    terminal.until(r"you> ")
    terminal.type("half a line\x03")  # nothing is said by it
    terminal.until(r"you> ")
    terminal.type("/nonsense\n")
    assert "/help" in terminal.until(r"error: there is no /nonsense\nhint: .*\n")
    terminal.type("/system\n")
    terminal.until(r"system message: one\n")
    terminal.type(f"/save {tmp_path}/talk.json\n")
    terminal.until(r"saved to ")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [message["role"] for message in saved["messages"]] == ["system", "user", "assistant"]
    assert saved["messages"][1]["content"] == "one" and saved["messages"][2]["content"].startswith("two three")
    assert (tmp_path / "talk.json").stat().st_mode & 0o777 == 0o600
    terminal.type(f"/save {tmp_path}/talk.json\n")
    terminal.until(r"error: .*talk.json cannot be written: File exists")
    terminal.type("/reset\n")
    terminal.until(r"begins anew\n")
    terminal.type("\x10\x10\x10\x10\x10\x10\n")  # Ctrl-P: six lines back, what was said first
    terminal.until(r"counting> (two three one ?)+\n")
    terminal.until(r"you> ")
    terminal.type(f"/save {tmp_path}/anew.json\n")
    terminal.until(r"saved to .*\n")
    saved = json.loads((tmp_path / "anew.json").read_text())
    assert [message["content"] for message in saved["messages"][:2]] == ["one", "one"] and len(saved["messages"]) == 3
    terminal.until(r"you> ")  # before that the terminal itself, not the line editor, would take what ends the input
    terminal.type("\x04")
    assert terminal.process.wait(WAIT_S) == 0
    history = stack.home / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600 and "/reset" in history.read_text()
    again = Terminal(stack)
    try:
        again.until(r"you> ")
        again.type("\x10\x10\n")  # what was said last there
        again.until(r"counting> two three one")
        again.type("\x03")
        again.until(r"you> ")
        again.type("/exit\n")
        assert again.process.wait(WAIT_S) == 0
    finally:
        again.close()


@pytest.mark.slow
def test_a_chat_outgrows_the_real_context(stack: Stack) -> None:
    """Two turns that are too long together: the refusal is understood, the first turn is left out, and it is told."""
    turn = "a " * 1010  # tokens, of a context of 2000
    done = stack.cli("chat", "--max-tokens", "3", "--json", input=f"{turn}\n{turn}\n")
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["left_out_turns"], second["left_out_turns"]) == (0, 1)
    assert first["usage"]["prompt_tokens"] == second["usage"]["prompt_tokens"] == 1010


def test_a_stack_that_is_not_there(stack: Stack, tmp_path: Path) -> None:
    """Without one, the next step is named."""
    done = stack.cli("chat", "--home", str(tmp_path), input="hola\n")
    assert done.returncode == 1 and "no stack is running" in done.stderr and "truthgpt up" in done.stderr
