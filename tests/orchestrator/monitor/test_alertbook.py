"""The alert book on the disk: written whole, changed by one at a time, bounded, and begun anew where it is spoilt."""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.monitor import alertbook
from orchestrator.monitor.alertbook import BookError
from orchestrator.monitor.alerts import Acknowledged, Document, from_json, to_json
from tests.disks import small_disk
from tests.orchestrator.monitor.looking import Looker


def some() -> Document:
    """A document with an alert that fires, is acknowledged and was told, and one that was resolved."""
    looker = Looker()
    looker.look(1000, audit_up=False)
    looker.looks(1010, 1080)
    looker.look(1090, models=[{"name": "demo", "fallback": True}])
    for alert in looker.document.alerts.values():
        if alert.firing:
            alert.acknowledged = Acknowledged("ana", 1100.0, "a new card comes")
    return looker.document


def put(home: Path, document: Document) -> None:
    alertbook.update(home, lambda before: (document, None))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """The book survives being written and read, is its owner's alone, and leaves nothing beside it and its lock."""
    home = tmp_path / "home"
    document = some()
    put(home, document)
    assert to_json(alertbook.read(home)) == to_json(document)
    assert sorted(path.name for path in home.iterdir()) == ["alerts.json", "alerts.lock"]
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in home.iterdir()} == {0o600}


def test_no_book_is_an_empty_one(tmp_path: Path) -> None:
    """Where nothing was ever written there are no alerts, and neither reading nor editing makes a folder."""
    home = tmp_path / "nowhere"
    assert alertbook.read(home) == Document()
    assert alertbook.change(home, lambda document: len(document.alerts)) == 0
    assert not home.exists()


def test_an_unchanged_book_is_not_written(tmp_path: Path) -> None:
    """An edit that changes nothing leaves the file as it is."""
    put(tmp_path, some())
    before = (tmp_path / "alerts.json").stat().st_ino
    alertbook.update(tmp_path, lambda document: (document, None))
    assert (tmp_path / "alerts.json").stat().st_ino == before
    alertbook.change(tmp_path, lambda document: document.alerts.clear())
    assert (tmp_path / "alerts.json").stat().st_ino != before


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"\xff", b'{"version": 2}', b'{"version": 1, "watchers": {}, "alerts": [{}]}', b"[" * 100_000],
    ids=["empty", "cut", "list", "bytes", "version", "fields", "deep"],
)
def test_a_spoilt_book_is_moved_aside(tmp_path: Path, text: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """A command says that it cannot read it; the watcher keeps it under another name, says so and begins anew."""
    (tmp_path / "alerts.json").write_bytes(text)
    with pytest.raises(BookError) as caught:
        alertbook.read(tmp_path)
    assert caught.value.hint
    with caplog.at_level(logging.ERROR):
        put(tmp_path, some())
    assert len(caplog.records) == 1 and "alerts.json.corrupt" in caplog.text
    assert (tmp_path / "alerts.json.corrupt").read_bytes() == text
    assert len(alertbook.read(tmp_path).alerts) == 2


def test_a_huge_book_is_not_read(tmp_path: Path) -> None:
    """A file larger than any book may be is spoilt, too, and not taken into memory."""
    with (tmp_path / "alerts.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BookError):
        alertbook.read(tmp_path)
    put(tmp_path, some())
    assert len(alertbook.read(tmp_path).alerts) == 2


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.data())
def test_any_field_may_be_spoilt(data: st.DataObject) -> None:
    """Whatever stands in place of any field, the document is either understood or refused with ValueError."""
    document = json.loads(json.dumps(to_json(some())))
    place: object = document
    while True:
        assert isinstance(place, (dict, list))
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(list(keys)))
        inner = place[key]  # type: ignore[call-overload]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            place[key] = data.draw(_JSON)  # type: ignore[call-overload]
            break
        place = inner
    try:
        understood = from_json(document)
    except ValueError:
        return
    assert to_json(from_json(to_json(understood))) == to_json(understood)


def test_a_lock_that_is_held_is_not_waited_for_without_end(tmp_path: Path) -> None:
    """Past its deadline an update fails as a full disk would, and a command with a hint."""
    put(tmp_path, some())
    with (tmp_path / "alerts.lock").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError):
            alertbook.update(tmp_path, lambda document: (document, None), lock_s=0.05)
        with pytest.raises(BookError, match="somebody else has held"):
            alertbook.change(tmp_path, lambda document: document.alerts.clear())
    assert len(alertbook.read(tmp_path).alerts) == 2


def _add(home: Path, times: int) -> None:
    for _ in range(times):

        def edit(document: Document) -> tuple[Document, None]:
            (alert,) = [alert for alert in document.alerts.values() if alert.firing]
            alert.value = (alert.value or 0.0) + 1.0
            return document, None

        alertbook.update(home, edit, lock_s=60.0)


def test_processes_change_it_one_at_a_time(tmp_path: Path) -> None:
    """Of what several processes change at once nothing is lost."""
    put(tmp_path, some())
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_add, args=(tmp_path, 25)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
        assert process.exitcode == 0
    assert [alert.value for alert in alertbook.read(tmp_path).alerts.values() if alert.firing] == [75.0]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    with small_disk(tmp_path / "small", "64k") as folder:
        yield folder


def test_a_full_disk_leaves_the_book_as_it_was(small: Path) -> None:
    """A book for which there is no room is not half written: the one before stays, and the next one replaces it."""
    put(small, some())
    ballast = small / "ballast"
    with ballast.open("wb") as file, pytest.raises(OSError, match="No space left"):
        while True:
            os.write(file.fileno(), b"x" * 4096)
    with pytest.raises(BookError, match="No space left"):
        alertbook.change(small, lambda document: document.alerts.clear())
    assert len(alertbook.read(small).alerts) == 2
    ballast.unlink()
    alertbook.change(small, lambda document: document.alerts.clear())
    assert alertbook.read(small).alerts == {}
    assert sorted(path.name for path in small.iterdir()) == ["alerts.json", "alerts.lock"]
