"""Showing an export's progress on standard error: a bar on a terminal, a line a stage elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class ProgressDisplay:
    """A context manager to be called with ``(stage, fraction | text)``; ``stages`` in the order in which they come."""

    def __init__(self, stages: tuple[str, ...]) -> None:
        self._stages = stages
        self._stage = ""
        self._began = time.monotonic()
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description:<24}"), BarColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=console, transient=True)
        self._task = TaskID(0)

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._task = self._bar.add_task("", total=len(self._stages))
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, state: float | str) -> None:
        text = f"{stage}: {state}" if isinstance(state, str) else stage
        if self._bar is not None:
            done = self._stages.index(stage) + state if isinstance(state, float) else None
            self._bar.update(self._task, description=text, completed=done)
        elif stage != self._stage or isinstance(state, str):
            elapsed = time.monotonic() - self._began
            click.echo(f"{elapsed:6.1f} s  {self._stages.index(stage) + 1}/{len(self._stages)} {text}", err=True)
        self._stage = stage
