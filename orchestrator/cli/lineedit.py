"""Lines from a person at a terminal, edited with readline where this Python has it, and remembered between chats."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from types import ModuleType

import click

LINES = 1000  # that the history keeps

readline: ModuleType | None
try:
    import readline
except ImportError:  # a Python that was built without it reads plain lines
    readline = None


class Lines:
    """Reads lines. `history` is a file of its own, for this user alone; None remembers nothing."""

    def __init__(self, history: Path | None) -> None:
        self._history = history if readline is not None else None
        if readline is not None:
            readline.clear_history()
            readline.set_history_length(LINES)
            with contextlib.suppress(OSError):  # there is none yet, or none that can be read
                if self._history is not None:
                    readline.read_history_file(self._history)

    def read(self, prompt: str) -> str:
        """One line without its end. Raises EOFError at the end of input (Ctrl-D) and KeyboardInterrupt (Ctrl-C)."""
        line = input(prompt)
        self.keep()  # now: a terminal may be closed at any moment
        return line

    def keep(self) -> None:
        """Write the history, whole or not at all. That it cannot be written is told once, and stops no chat."""
        if self._history is None or readline is None:
            return
        fresh = self._history.with_name(f".{self._history.name}-{secrets.token_hex(4)}")
        try:
            self._history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            readline.write_history_file(fresh)
            fresh.replace(self._history)
        except OSError as error:
            click.echo(f"warning: {self._history} cannot be written: {error.strerror}", err=True)
            self._history = None
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
