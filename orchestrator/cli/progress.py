"""Progress of a long command on standard error: a timed line for each step, and on a terminal a spinner below them."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.status import Status


class Progress:
    """A context manager; `step` starts the next step, `line` writes in between, leaving it ends the spinner."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._status: Status | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.status import Status

            self._status = Status("", console=Console(stderr=True))
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the spinner; steps are plain lines from now on."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def step(self, text: str) -> None:
        """One step begins: `[  1.2 s] text`."""
        self.line(f"[{time.monotonic() - self._began:5.1f} s] {text}")
        if self._status is not None:
            self._status.update(f"{text} …")

    def line(self, text: str) -> None:
        """A line as it is."""
        if self._status is not None:
            self._status.console.print(text, markup=False, highlight=False)
        else:
            click.echo(text, err=True)
