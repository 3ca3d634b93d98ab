"""The tables of all commands: no name is broken in two, and what reads a pipe finds a row in a line."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence

import click

_NARROW = 12  # columns that what is folded needs at least, to be read
_WIDE = 100_000  # wider than any row


def show(
    titles: Sequence[str], rows: Iterable[Sequence[str]], folds: Collection[str] = (), right: Collection[str] = ()
) -> None:
    """Print a table on standard output. At a terminal the columns in `folds` take the lines that they need.

    Those in `right` have their text at the right. What does not fit a terminal all the same is for it to break.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table

    table, cells = Table(box=None, pad_edge=False), [titles, *rows]
    fixed = 2 * (len(titles) - 1) + _NARROW * len(folds)
    for index, title in enumerate(titles):
        if title not in folds:
            fixed += max(cell_len(row[index]) for row in cells)
        justify = "right" if title in right else "left"
        table.add_column(title, justify=justify, overflow="fold", no_wrap=title not in folds)  # type: ignore[arg-type]
    for row in cells[1:]:
        table.add_row(*row)
    console = Console(markup=False, highlight=False, emoji=False)
    if sys.stdout.isatty() and fixed <= console.width:
        console.print(table)
        return
    console.width = _WIDE
    with console.capture() as text:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in text.get().splitlines()))
