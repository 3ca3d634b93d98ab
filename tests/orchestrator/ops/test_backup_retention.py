"""Which backups are kept, and whose files are left alone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.ops import backup
from orchestrator.ops.backup import names, retention
from orchestrator.settings import Settings
from tests.orchestrator.ops.deployments import archive

NOW = 1_800_000_000.0
DAY = 86_400.0


def made(folder: Path, age_days: float, whole: bool = True, encrypted: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / names.file_name(names.new_id(NOW - age_days * DAY), encrypted)
    data = b"age-encryption.org/v1\n..." if encrypted else archive([])
    path.write_bytes(data if whole else data[:10])
    return path


def settings(folder: Path, days: int, keep: int) -> Settings:
    found = Settings.load({"home": folder / "home", "backup_dir": folder / "b"}, {"TRUTHGPT_CONFIG": ""})
    return replace(found, backup_days=days, backup_keep=keep)


def test_old_ones_and_too_many_go(tmp_path: Path) -> None:
    """Older than backup_days, or beyond the newest backup_keep; 0 keeps all."""
    paths = [made(tmp_path / "b", age) for age in (0.5, 1, 2, 10, 40)]
    for days, keep, left in ((0, 0, 5), (30, 0, 4), (0, 2, 2), (5, 4, 3), (30, 10, 4)):
        removed = retention.prune(settings(tmp_path, days, keep), dry_run=True, now=NOW)
        assert sorted(removed) == sorted(paths[left:])
    assert all(path.exists() for path in paths)
    assert set(retention.prune(settings(tmp_path, 5, 4), now=NOW)) == set(paths[3:])
    assert [path.exists() for path in paths] == [True, True, True, False, False]


@pytest.mark.parametrize("encrypted", [False, True])
def test_the_newest_one_that_looks_complete_stays(tmp_path: Path, encrypted: bool) -> None:
    """However old it is, and although newer ones that are cut off are there."""
    broken = made(tmp_path / "b", 50, whole=False, encrypted=encrypted)
    good, older = made(tmp_path / "b", 60, encrypted=encrypted), made(tmp_path / "b", 70, encrypted=encrypted)
    assert retention.prune(settings(tmp_path, 30, 1), now=NOW) == [broken, older]
    assert good.exists()
    assert retention.prune(settings(tmp_path, 30, 1), now=NOW) == []


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    """Files of other names, folders and links of ours' names are neither listed nor removed."""
    folder = tmp_path / "b"
    made(folder, 1)
    for name in ("notes.txt", "truthgpt-x.tar", "truthgpt-20200101T000000Z-1a2b3c4d.tar.gz", ".hidden",
                 "truthgpt-20209999T000000Z-1a2b3c4d.tar"):  # fmt: skip
        (folder / name).write_bytes(b"")
    (folder / "truthgpt-20200101T000000Z-1a2b3c4d.tar").mkdir()
    (folder / "truthgpt-20200101T000000Z-1a2b3c4e.tar").symlink_to(folder / "notes.txt")
    before = sorted(os.listdir(folder))
    assert retention.prune(settings(tmp_path, 1, 1), now=NOW + 100 * DAY) == []
    assert sorted(os.listdir(folder)) == before and len(backup.infos(folder)) == 1


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """There is nothing to list, nothing newest and nothing to remove."""
    assert backup.infos(tmp_path / "b") == [] and backup.newest(tmp_path / "b") is None
    assert backup.prune(settings(tmp_path, 1, 1)) == []


def test_abandoned_parts_go(tmp_path: Path) -> None:
    """A part goes once nobody holds its lock, or nobody has written to it for a day; one at work stays."""
    folder = tmp_path / "b"
    with names.part(folder, names.new_id(NOW), False) as (_, at_work):
        dead = folder / f".{names.file_name(names.new_id(NOW), True)}.part"
        dead.write_bytes(b"")
        hung = folder / f".{names.file_name(names.new_id(NOW), False)}.part"
        with hung.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.utime(hung, (time.time() - 2 * DAY,) * 2)
            assert set(backup.prune(settings(tmp_path, 1, 1))) == {dead, hung}
        assert at_work.exists() and not dead.exists() and not hung.exists()
    assert list(folder.iterdir()) == []


def test_dates_in_the_future(tmp_path: Path) -> None:
    """The backup that was made just now stays, whatever dates others have; those from the future go first."""
    future = [made(tmp_path / "b", -age) for age in (400, 300, 2)]
    new, old = made(tmp_path / "b", 0), made(tmp_path / "b", 5)
    soon = made(tmp_path / "b", -0.5)  # a clock that goes a bit wrong, or another time zone
    assert [info.path for info in backup.infos(tmp_path / "b") if info.ahead(NOW)] == future
    plan = retention.prune(settings(tmp_path, 0, 3), dry_run=True, now=NOW)
    assert sorted(plan) == sorted(future)
    just = made(tmp_path / "b", 30)
    removed = retention.prune(settings(tmp_path, 20, 1), now=NOW, made=just)
    assert just.exists() and just not in removed and set(removed) == {*future, new, old, soon}


def test_a_backup_of_a_newer_version_counts_as_complete(tmp_path: Path) -> None:
    """Retention does not take it for one that was cut off."""
    new, old = made(tmp_path / "b", 1), made(tmp_path / "b", 2)
    new.write_bytes(new.read_bytes().replace(b"truthgpt-backup 1 ", b"truthgpt-backup 12 "))
    assert retention.prune(settings(tmp_path, 0, 1), now=NOW) == [old] and new.exists()


def test_a_part_is_locked_although_a_cleaner_looks_at_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who holds it for an instant is waited for: only then it is taken. Locks that fail otherwise are errors."""
    id, real, calls = names.new_id(NOW), fcntl.flock, 0
    path = tmp_path / f".{names.file_name(id, False)}.part"
    path.write_bytes(b"")
    with path.open("rb") as cleaner:
        fcntl.flock(cleaner, fcntl.LOCK_EX)

        def flock(handle: int, how: int) -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                cleaner.close()
            real(handle, how)

        monkeypatch.setattr(fcntl, "flock", flock)
        with names.part(tmp_path, id, False) as (_, found):
            assert calls == 3 and found == path
            monkeypatch.setattr(fcntl, "flock", real)
            assert names.remove_abandoned(tmp_path, time.time()) == []  # it is locked now
    for number, passes in ((errno.ENOLCK, True), (errno.ENOTSUP, True), (errno.EIO, False)):

        def fails(handle: int, how: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", fails)
        with contextlib.nullcontext() if passes else pytest.raises(OSError, match="Input/output"):
            with names.part(tmp_path, names.new_id(NOW), False):
                pass
        assert list(tmp_path.iterdir()) == [] or not passes


def test_infos_are_what_names_say(tmp_path: Path) -> None:
    """Newest first, with time, size and whether encrypted."""
    old, new = made(tmp_path, 2, encrypted=True), made(tmp_path, 1)
    found = backup.infos(tmp_path)
    assert [info.path for info in found] == [new, old]
    assert [(info.created, info.encrypted) for info in found] == [(NOW - DAY, False), (NOW - 2 * DAY, True)]
    assert backup.newest(tmp_path) == found[0] and found[1].bytes == old.stat().st_size
