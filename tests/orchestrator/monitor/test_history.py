"""The metric history: whole lines, in the file of their day, whatever happens to the disk and whoever else writes."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.monitor import history
from orchestrator.monitor.history import History, file_of, folder_of, pause_s, read, stamp
from tests.clock import awake
from tests.disks import small_disk

NOON = datetime(2026, 11, 26, 12, tzinfo=UTC).timestamp()
DAY = 86_400.0


def everything(home: Path) -> list[dict[str, Any]]:
    return list(read(home, 0.0, NOON + 1000 * DAY))


def test_a_line_is_in_the_file_of_its_day(tmp_path: Path) -> None:
    """Days are those of UTC, the folder and the files are the owner's alone, and reading gives what was written."""
    midnight = NOON + DAY / 2
    writer = History(tmp_path, "here:1")
    for at in (midnight - 0.001, midnight):
        writer.write({"requests": at}, at)
    folder = folder_of(tmp_path)
    assert sorted(os.listdir(folder)) == ["2026-11-26.jsonl", "2026-11-27.jsonl"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert everything(tmp_path) == [
        {"requests": midnight - 0.001, "time": "2026-11-26T23:59:59.999Z", "instance": "here:1"},
        {"requests": midnight, "time": "2026-11-27T00:00:00.000Z", "instance": "here:1"},
    ]
    assert [row["requests"] for row in read(tmp_path, midnight, midnight + 1)] == [midnight]
    assert [row["requests"] for row in read(tmp_path, 0, midnight)] == [midnight - 0.001]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8,
)  # fmt: skip


@given(st.lists(st.tuples(st.dictionaries(st.text(), _JSON, max_size=4), st.floats(0, 4e9)), min_size=1, max_size=6))
def test_whatever_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, lines: Any) -> None:
    """Any figures that are JSON come back as they were, in the order of their days, each with its time and writer."""
    home = tmp_path_factory.mktemp("home")
    writer = History(home, "here:1")
    for figures, at in lines:
        writer.write(figures, at)
    wanted = [{**figures, "time": stamp(at), "instance": "here:1"} for figures, at in lines]
    wanted.sort(key=lambda row: row["time"][:10])
    assert list(read(home, 0, 4.1e9)) == wanted


_WRITE = """
import sys
from pathlib import Path
from orchestrator.monitor.history import History
writer = History(Path(sys.argv[1]))
for number in range(int(sys.argv[2])):
    writer.write({"number": number, "filling": "x" * (1 + number * 37 % 9000)}, float(sys.argv[3]))
"""


def test_processes_write_whole_lines_at_once(tmp_path: Path) -> None:
    """Four processes into one file: every line of each is there, in its order, and no two are mixed."""
    argv = [sys.executable, "-c", _WRITE, str(tmp_path), "200", str(NOON)]
    writers = [subprocess.Popen(argv, stderr=subprocess.PIPE) for _ in range(4)]
    said = [writer.communicate(timeout=60)[1] for writer in writers]
    assert said == [b""] * 4
    rows = everything(tmp_path)
    assert len(file_of(tmp_path, NOON).read_bytes().splitlines()) == len(rows) == 800
    numbers: dict[str, list[int]] = {}
    for row in rows:
        numbers.setdefault(row["instance"], []).append(row["number"])
        assert row["filling"] == "x" * (1 + row["number"] * 37 % 9000)
    assert len(numbers) == 4 and all(found == list(range(200)) for found in numbers.values())


def test_garbage_is_passed_over(tmp_path: Path) -> None:
    """Half lines, other JSON, endless lines and other files cost only themselves."""
    writer = History(tmp_path, "here:1")
    writer.write({"n": 1}, NOON)
    path = file_of(tmp_path, NOON)
    with path.open("ab") as file:
        for line in (
            b'{"time":"2026-11-26T12:00', b"\xff\x00\n", b"[1]\n", b'{"time":5}\n', b"{}\n", b"[" * 100_000 + b"\n",
            b'{"time":"2026-11-26T12:00:00.000Z","x":"' + b"y" * (3 << 20) + b'"}\n', b'{"time":"2026-11-26T12:0',
        ):  # fmt: skip
            file.write(line)
    (folder_of(tmp_path) / "notes.txt").write_text("{}")
    assert [row["n"] for row in everything(tmp_path)] == [1]
    writer.write({"n": 2}, NOON)  # behind a half line
    assert [row["n"] for row in everything(tmp_path)] == [1, 2]


def test_there_may_be_none(tmp_path: Path) -> None:
    """Where nothing was ever written reading says so instead of showing an empty course."""
    with pytest.raises(FileNotFoundError):
        everything(tmp_path)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    with small_disk(tmp_path / "small", "256k") as folder:
        yield folder


def test_a_full_disk_leaves_no_half_line(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What finds no room is taken back, one line in the log says so, and with room again lines are written again."""
    writer, ballast = History(small, "here:1"), small / "ballast"
    ballast.write_bytes(b"x" * 200_000)
    for number in range(60):  # some of them end in the midst of the last page that there is
        writer.write({"n": number, "filling": "x" * 1500}, NOON)
    data = file_of(small, NOON).read_bytes()
    rows = everything(small)
    assert 10 < len(rows) < 60 and data.endswith(b"}\n") and len(data.splitlines()) == len(rows)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "No space left on device" in caplog.messages[0]
    ballast.unlink()
    writer.write({"n": 99}, NOON)
    assert [row["n"] for row in everything(small)] == [*range(len(rows)), 99]
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


@pytest.mark.parametrize("figures", [{"x": float("nan")}, {"x": object()}, {"x": {1, 2}}])
def test_figures_that_are_no_json(tmp_path: Path, figures: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """They are logged and nothing of them is written: the caller goes on."""
    History(tmp_path).write(figures, NOON)
    assert not folder_of(tmp_path).exists() and len(caplog.records) == 1


def test_a_file_in_the_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder that cannot be made, and a link that leads elsewhere, are one line in the log and no exception."""
    folder_of(tmp_path).touch()
    writer = History(tmp_path)
    writer.write({}, NOON)
    folder_of(tmp_path).unlink()
    folder_of(tmp_path).mkdir()
    (tmp_path / "elsewhere").touch()
    file_of(tmp_path, NOON).symlink_to(tmp_path / "elsewhere")
    writer.write({}, NOON)
    assert (tmp_path / "elsewhere").read_bytes() == b"" and len(caplog.records) == 1


def test_a_writer_that_is_suspended_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While somebody keeps the lock a line is given up after the deadline, and the file is left alone."""
    monkeypatch.setattr(history, "LOCK_S", 0.1)
    writer = History(tmp_path)
    writer.write({}, NOON)
    path = file_of(tmp_path, NOON)
    before = path.read_bytes()
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        writer.write({}, NOON)
        assert path.read_bytes() == before and "another writer" in caplog.messages[0]
    writer.write({}, NOON)
    assert len(everything(tmp_path)) == 2


@given(st.floats(0, 4e9))
def test_lines_are_aligned_to_the_minute(now: float) -> None:
    """The next line is at a full minute, one to sixty-one seconds away: never twice for the same one."""
    pause = pause_s(now)
    assert 1.0 < pause <= 61.0
    assert abs((now + pause) / 60 - round((now + pause) / 60)) < 1e-6


async def test_a_line_every_minute_and_never_a_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Lines come by themselves; while the disk hangs the loop goes on, one thread waits, and later it goes on."""
    monkeypatch.setattr(history, "pause_s", lambda now: 0.02)
    go_on, stalled = threading.Event(), False
    append = History._append

    def slow(self: History, figures: Any, at: float) -> None:
        if stalled:
            go_on.wait()
        append(self, figures, at)

    monkeypatch.setattr(History, "_append", slow)
    count = 0

    def figures() -> dict[str, Any]:
        nonlocal count
        count += 1
        if count == 2:
            raise RuntimeError("not now")
        return {"n": count}

    writer = History(tmp_path, "here:1")
    running = asyncio.create_task(writer.run(figures))
    await until(lambda: folder_of(tmp_path).exists() and len(everything(tmp_path)) >= 3)
    assert [row["n"] for row in everything(tmp_path)][:3] == [1, 3, 4]
    stalled = True
    await until(lambda: "the metric history cannot be written: the disk does not answer" in caplog.messages)
    assert sum(thread.name == "history" for thread in threading.enumerate()) == 1
    lines = len(everything(tmp_path))
    stalled = False
    go_on.set()
    await until(lambda: len(everything(tmp_path)) > lines + 2)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    await until(lambda: not any(thread.name == "history" for thread in threading.enumerate()))
    assert caplog.messages.count("the metric history is written again") == 2


async def until(check: Any, timeout_s: float = 10.0) -> None:
    began = awake()
    while not check():
        assert awake() - began < timeout_s, "it never came"
        await asyncio.sleep(0.01)
