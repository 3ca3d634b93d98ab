"""Exchanging files for others, all or none."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
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


_KILLED = """
import json, os, signal, sys
from pathlib import Path
from orchestrator.local import swap
home, fresh, old, moves, number = json.loads(sys.argv[1])
count, real = 0, os.rename
def rename(source, target):
    global count
    if count == number:
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    real(source, target)
os.rename = rename
swap.sync_folder = lambda folder: count == number and os.kill(os.getpid(), signal.SIGKILL)
swap.exchange(Path(home), [(Path(a), Path(b)) for a, b in moves], [Path(fresh)], [Path(old)])
"""


def killed(base: Path, moves: list[Move], number: int) -> None:
    """An exchange by a process that is killed after so many renames."""
    names = [str(base / name) for name in ("home", "fresh", "old")]
    given = json.dumps([*names, [[str(path) for path in move] for move in moves], number])
    done = subprocess.run([sys.executable, "-c", _KILLED, given], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (base / "home" / swap.NOTE).exists()


def test_everything_is_exchanged(tmp_path: Path) -> None:
    """What was there is kept, what is new is there, and no note is left."""
    swap.exchange(tmp_path / "home", prepared(tmp_path), [tmp_path / "fresh"], [tmp_path / "old"])
    assert texts(tmp_path) == {
        "home/a": "fresh/a", "home/b": "fresh/b", "home/c": "fresh/c", "old/a": "home/a", "old/b": "home/b",
        "old/gone": "home/gone",
    }  # fmt: skip
    assert swap.recover(tmp_path / "home") is None


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
    killed(tmp_path, moves, number)
    assert swap.recover(tmp_path / "home") == []
    assert texts(tmp_path) == before and not (tmp_path / "fresh").exists() and not (tmp_path / "old").exists()
    assert swap.recover(tmp_path / "home") is None


@pytest.mark.parametrize("number", range(1, 6))
def test_what_was_made_in_the_meantime(tmp_path: Path, number: int) -> None:
    """Where something had been moved away and somebody has made another, the first comes back, the other is kept."""
    moves = prepared(tmp_path)
    killed(tmp_path, moves, number)
    made = [path for path in (tmp_path / "home" / name for name in ("a", "b", "gone")) if not path.exists()]
    for path in made:
        path.mkdir()
        (path / "new").write_text(path.name)
    aside = swap.recover(tmp_path / "home")
    assert aside is not None and [(path.parent, (path / "new").read_text()) for path in aside] == [
        (tmp_path / "home", path.name) for path in reversed(made)
    ]
    assert all(path.name.startswith(".") for path in aside), "a model repository would take it for a model"
    found = {name: text for name, text in texts(tmp_path / "home").items() if not name.startswith(".")}
    assert found == {"a": "home/a", "b": "home/b", "gone": "home/gone"}


@pytest.mark.parametrize("number", range(7))
def test_staging_that_was_cleared_away(tmp_path: Path, number: int) -> None:
    """What was half exchanged is undone although the folder that it came from is gone; nothing old is taken for new."""
    moves = prepared(tmp_path)
    killed(tmp_path, moves, number)
    shutil.rmtree(tmp_path / "fresh")
    assert swap.recover(tmp_path / "home") == []
    assert texts(tmp_path / "home") == {"a": "home/a", "b": "home/b", "gone": "home/gone"}
