"""Which backups are kept, and whose files are left alone."""

from __future__ import annotations

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


def test_infos_are_what_names_say(tmp_path: Path) -> None:
    """Newest first, with time, size and whether encrypted."""
    old, new = made(tmp_path, 2, encrypted=True), made(tmp_path, 1)
    found = backup.infos(tmp_path)
    assert [info.path for info in found] == [new, old]
    assert [(info.created, info.encrypted) for info in found] == [(NOW - DAY, False), (NOW - 2 * DAY, True)]
    assert backup.newest(tmp_path) == found[0] and found[1].bytes == old.stat().st_size
