"""What was measured before: kept, bounded, and never in the way."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.ops.tune import history as module
from orchestrator.ops.tune.errors import TuneError
from orchestrator.ops.tune.figures import Figures
from orchestrator.ops.tune.history import History, Row, Subject, histories

SUBJECT = Subject("demo", "entry", "a machine", 8, 128, 64)


def row(number: int = 1, **changes: object) -> Row:
    made = Row({"slots": str(number), "preferred": "8,16"}, Figures(float(number), 1.0, 0.5, 0.1, 9), "run", 12.5)
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def opened(tmp_path: Path, notes: list[str]) -> Iterator[History]:
    yield History(tmp_path, SUBJECT, notes.append)


def again(tmp_path: Path, notes: list[str]) -> list[Row]:
    return History(tmp_path, SUBJECT, notes.append).load()


def test_what_was_measured_is_there_the_next_time(opened: History, tmp_path: Path, notes: list[str]) -> None:
    """Figures and failures, in their order; for another subject there is nothing."""
    assert opened.load() == [] and not opened.path.exists()
    rows = [row(1), row(2, figures=None, error="no memory"), row(3, figures=Figures(1, 2))]
    for one in rows:
        opened.add(one)
    assert again(tmp_path, notes) == rows and notes == []
    assert [*histories(tmp_path, "demo")] == [(SUBJECT, rows)] and [*histories(tmp_path, "dem")] == []
    assert History(tmp_path, replace(SUBJECT, concurrency=9)).load() == []


def test_a_later_run_adds_to_it(opened: History, tmp_path: Path, notes: list[str]) -> None:
    """Loading and adding goes on in the same file."""
    opened.add(row(1))
    later = History(tmp_path, SUBJECT, notes.append)
    later.load()
    later.add(row(2))
    assert again(tmp_path, notes) == [row(1), row(2)]


@pytest.mark.parametrize("damage", [
    lambda data: b"\x00\xff" * 300,
    lambda data: data[: len(data) // 2] + b"{}\n" + data[len(data) // 2 :],
    lambda data: b"",
    lambda data: data.replace(b'"slots"', b'"sl\xffts"'),
    lambda data: data.replace(b'"throughput":1.0', b'"throughput":"much"'),
])  # fmt: skip
def test_a_damaged_file_is_set_aside(damage, opened: History, tmp_path: Path, notes: list[str]) -> None:  # type: ignore[no-untyped-def]
    """It is never fatal: its bytes are kept under another name, that is said, and a new one begins."""
    opened.add(row(1))
    data = damage(opened.path.read_bytes())
    opened.path.write_bytes(data)
    later = History(tmp_path, SUBJECT, notes.append)
    assert later.load() == [] and [*histories(tmp_path, "demo")] == []
    assert len(notes) == 1 and "set aside" in notes[0]
    (aside,) = opened.path.parent.glob("*.damaged-*")
    assert data.startswith(aside.read_bytes())
    later.add(row(2))
    assert again(tmp_path, notes) == [row(2)]


def test_a_write_that_was_cut_off_costs_one_row_and_no_other(opened: History, tmp_path: Path, notes: list[str]) -> None:
    """What a killed process has left, half a line and the library's lock, is mended, and the rest is read at once."""
    for number in (1, 2):
        opened.add(row(number))
    data = opened.path.read_bytes()
    opened.path.write_bytes(data[:-20])
    opened.path.with_name(f"{opened.path.name}.lock").touch()
    later = History(tmp_path, SUBJECT, notes.append)
    assert later.load() == [row(1)] and notes == []
    later.add(row(3))
    assert again(tmp_path, notes) == [row(1), row(3)]


def test_another_format_is_refused(opened: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the file's name and what to do; it is left as it is, and no figures are taken for others."""
    monkeypatch.setattr(module, "FORMAT", 0)
    opened.add(row(1))
    monkeypatch.undo()
    before = opened.path.read_bytes()
    with pytest.raises(TuneError, match="format 0, this version of truthgpt reads 1") as refused:
        History(tmp_path, SUBJECT).load()
    assert str(opened.path) in str(refused.value) and "move it away" in refused.value.hint
    assert opened.path.read_bytes() == before


def test_a_history_does_not_grow_for_ever(
    opened: History, tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of too many rows the newest stay, of too many files as well."""
    monkeypatch.setattr(module, "MAX_ROWS", 10)
    monkeypatch.setattr(module, "KEPT_ROWS", 6)
    monkeypatch.setattr(module, "MAX_FILES", 3)
    for number in range(12):
        opened.add(row(number))
    assert again(tmp_path, notes) == [row(number) for number in range(6, 12)]
    assert again(tmp_path, notes) == [row(number) for number in range(6, 12)]
    os.utime(opened.path, (1, 1))
    for number in range(4):
        other = History(tmp_path, replace(SUBJECT, concurrency=number + 100))
        other.add(row(1))
        os.utime(other.path, (number + 2, number + 2))
    assert len([*opened.path.parent.glob("*.journal")]) == 3 and not opened.path.exists()


def test_a_full_disk_is_told_of_once(opened: History, notes: list[str]) -> None:
    """The tuning goes on without a history."""
    opened.add(row(1))
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (opened.path.stat().st_size + 100, former[1]))
    try:
        for number in range(3):
            opened.add(row(number))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert len(notes) == 1 and "not written any more" in notes[0]
