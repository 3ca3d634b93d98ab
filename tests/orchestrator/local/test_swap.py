"""Exchanging files for others, all or none."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from orchestrator.local import swap
from orchestrator.local.swap import Move


def prepared(base: Path) -> list[Move]:
    """Two that replace others, one that is new, one that only goes."""
    for name in ("home/a", "home/b", "home/gone", "fresh/a", "fresh/b", "fresh/c"):
        path = base / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    (base / "old").mkdir()
    home, fresh, old = base / "home", base / "fresh", base / "old"
    return [
        (home / "a", old / "a"), (fresh / "a", home / "a"), (home / "b", old / "b"), (fresh / "b", home / "b"),
        (fresh / "c", home / "c"), (home / "gone", old / "gone"),
    ]  # fmt: skip


def texts(base: Path) -> dict[str, str]:
    return {str(path.relative_to(base)): path.read_text() for path in base.rglob("*") if path.is_file()}


def test_everything_is_exchanged(tmp_path: Path) -> None:
    """What was there is kept, what is new is there, and no note is left."""
    swap.exchange(tmp_path / "home", prepared(tmp_path), [tmp_path / "fresh"], [tmp_path / "old"])
    assert texts(tmp_path) == {
        "home/a": "fresh/a", "home/b": "fresh/b", "home/c": "fresh/c", "old/a": "home/a", "old/b": "home/b",
        "old/gone": "home/gone",
    }  # fmt: skip
    assert not swap.recover(tmp_path / "home")


@pytest.mark.parametrize("number", range(6))
def test_a_rename_that_fails(tmp_path: Path, number: int) -> None:
    """Everything is where it was, and no note is left."""
    moves = prepared(tmp_path)
    before = texts(tmp_path)
    source, target = moves[number]
    moves[number] = (source, tmp_path / "nowhere" / target.name)
    with pytest.raises(OSError):
        swap.exchange(tmp_path / "home", moves, [], [])
    assert texts(tmp_path) == before


@pytest.mark.parametrize("number", range(7))
def test_what_a_killed_process_left(tmp_path: Path, number: int) -> None:
    """After any number of renames a note has everything undone, staging removed, and an empty folder of old ones."""
    moves = prepared(tmp_path)
    before = {name: text for name, text in texts(tmp_path).items() if not name.startswith("fresh/")}
    note = {
        "moves": [[str(path) for path in move] for move in moves], "staging": [str(tmp_path / "fresh")],
        "kept": [str(tmp_path / "old")],
    }  # fmt: skip
    (tmp_path / "home" / swap.NOTE).write_text(json.dumps(note))
    for source, target in moves[:number]:
        os.rename(source, target)
    assert swap.recover(tmp_path / "home")
    assert texts(tmp_path) == before and not (tmp_path / "fresh").exists() and not (tmp_path / "old").exists()
    assert not swap.recover(tmp_path / "home")


def test_staging_that_was_cleared_away(tmp_path: Path) -> None:
    """What was half exchanged is undone although the folder that it came from is gone."""
    moves = prepared(tmp_path)
    note = {"moves": [[str(path) for path in move] for move in moves], "staging": [str(tmp_path / "fresh")], "kept": []}
    (tmp_path / "home" / swap.NOTE).write_text(json.dumps(note))
    for source, target in moves[:2]:
        os.rename(source, target)
    shutil.rmtree(tmp_path / "fresh")
    assert swap.recover(tmp_path / "home")
    assert texts(tmp_path / "home") == {"a": "home/a", "b": "home/b", "gone": "home/gone"}
