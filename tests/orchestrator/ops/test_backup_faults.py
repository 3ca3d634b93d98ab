"""Full disks and kill -9 in the middle of a backup and of a restore, for real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.local import state, swap
from orchestrator.ops import backup
from orchestrator.ops.backup import redissource
from orchestrator.settings import Settings
from tests.orchestrator.ops.deployments import deployment, files

# argv: base folder, backup, number of the rename at which the process is killed (0: as it begins to take out)
_KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from orchestrator.ops import backup
from orchestrator.settings import Settings
base, number = Path(sys.argv[1]), int(sys.argv[3])
settings = Settings.load({"home": base / "home", "model_repository": base / "repository"}, {"TRUTHGPT_CONFIG": ""})
count, real = 0, os.rename
def rename(source, target):
    global count
    count += 1
    if count == number:
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.rename = rename
def progress(done, total):
    if number == 0 and [path for path in base.iterdir() if "restoring" in path.name]:
        os.kill(os.getpid(), signal.SIGKILL)
backup.restore(settings, Path(sys.argv[2]), lambda *_: True, progress=progress)
"""


def tree(base: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(base).items() if name not in ("home/lock", "home/logs/redis.log")}


def changed(settings: Settings) -> None:
    """What is there later than the backup."""
    (settings.home / "alerts.json").write_bytes(b"[1]")
    (settings.home / "metrics" / "later.jsonl").write_bytes(b"")
    (settings.model_repository / "demo" / "1" / "model.onnx").write_bytes(b"later")
    (settings.model_repository / "later" / "1").mkdir(parents=True)


@pytest.mark.parametrize("number", [0, 1, 2, 4, 7, 9, 11, 13])
def test_kill_9_during_a_restore(tmp_path: Path, number: int) -> None:
    """Whoever holds the home next finds all as it was, nothing left over; and the restore goes through after it."""
    settings = deployment(tmp_path)
    made = backup.create(settings)
    changed(settings)
    before = tree(tmp_path)
    argv = [sys.executable, "-c", _KILLED, str(tmp_path), str(made.path), str(number)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if number:
        assert (settings.home / swap.NOTE).exists()
        with redissource.held(settings.home) as recovered:
            assert recovered == []
        assert tree(tmp_path) == before
    else:
        assert {name: tree(tmp_path)[name] for name in before} == before
    result = backup.restore(settings, made.path, lambda *_: True)
    assert result.done and not [path for path in tmp_path.iterdir() if "restoring" in path.name]
    assert (settings.home / "alerts.json").read_bytes() == b"{}"
    assert not (settings.model_repository / "later").exists()


def test_a_stack_and_a_backup_undo_a_restore_that_was_killed(tmp_path: Path) -> None:
    """`backup create` of a home that is half exchanged puts it in order first."""
    settings = deployment(tmp_path)
    made = backup.create(settings)
    changed(settings)
    before = files(settings.home)
    argv = [sys.executable, "-c", _KILLED, str(tmp_path), str(made.path), "5"]
    assert subprocess.run(argv, capture_output=True, timeout=60).returncode == -signal.SIGKILL
    assert files(settings.home) != before
    again = backup.create(settings)
    assert {**files(settings.home), "lock": b""} == {**before, "lock": b""}
    other = replace(settings, home=tmp_path / "other", model_repository=tmp_path / "r2")
    backup.restore(other, again.path, lambda *_: True)
    assert (other.home / "alerts.json").read_bytes() == b"[1]"


@pytest.mark.parametrize("number", range(1, 14, 3))
def test_a_rename_that_fails_has_all_undone(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever rename fails, home and repository are as they were, and no folder is left beside them."""
    settings = deployment(tmp_path)
    made = backup.create(settings)
    changed(settings)
    before = tree(tmp_path)
    real, count = os.rename, 0

    def rename(source: object, target: object) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise PermissionError(1, "Operation not permitted", str(target))
        real(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(PermissionError):
        backup.restore(settings, made.path, lambda *_: True)
    assert tree(tmp_path) == before
    with state.lock(settings.home):
        assert swap.recover(settings.home) is None


def test_kill_9_during_a_backup(tmp_path: Path) -> None:
    """Nothing that looks like a backup is there; the next one removes the part that was left."""
    settings = deployment(tmp_path)
    script = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from orchestrator.ops import backup
from orchestrator.settings import Settings
base = Path(sys.argv[1])
settings = Settings.load({"home": base / "home", "model_repository": base / "repository"}, {"TRUTHGPT_CONFIG": ""})
backup.create(replace(settings, backup_dir=base / "backups"),
              progress=lambda done, total: done > 5000 and os.kill(os.getpid(), signal.SIGKILL))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (part,) = settings.backups.iterdir()
    assert part.name.startswith(".truthgpt-") and part.name.endswith(".part")
    assert backup.infos(settings.backups) == []
    made = backup.create(settings)
    assert list(settings.backups.iterdir()) == [made.path]


@pytest.mark.parametrize("encrypted", [False, True])
def test_ctrl_c_during_a_backup(tmp_path: Path, encrypted: bool) -> None:
    """Nothing is left of it, neither a part nor a thread."""
    import threading

    settings = deployment(tmp_path, backup_key=backup.new_key()[0] if encrypted else None)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backup.create(settings, progress=interrupt)
    assert list(settings.backups.iterdir()) == []
    assert [thread.name for thread in threading.enumerate() if thread.name == "age"] == []


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", folder], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> None:
    """Take all the room there is."""
    with (folder / "ballast").open("ab", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 65536)
        except OSError:
            return


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_disk_that_fills_up_during_a_backup(tmp_path: Path, small: Path, encrypted: bool) -> None:
    """It fails with a sentence about the room, leaves nothing, and the backup before it is as it was."""
    settings = deployment(tmp_path, backup_key=backup.new_key()[0] if encrypted else None)
    settings = replace(settings, backup_dir=small / "backups")
    (settings.model_repository / "demo" / "1" / "model.onnx").write_bytes(os.urandom(3 << 20))
    first = backup.create(settings)
    with pytest.raises(backup.BackupError, match="no room is left") as failed:
        backup.create(settings, progress=lambda done, total: fill(small))
    assert failed.value.hint
    assert list(settings.backups.iterdir()) == [first.path]
    assert backup.verify(first.path, settings.backup_key).manifest.id == first.id


def test_a_disk_that_fills_up_during_a_restore(tmp_path: Path, small: Path) -> None:
    """It fails with a sentence about the room; what was there is as it was, and nothing is left over."""
    settings = deployment(small)
    settings = replace(settings, backup_dir=tmp_path / "backups")
    (settings.model_repository / "demo" / "1" / "model.onnx").write_bytes(os.urandom(3 << 20))
    made = backup.create(settings)
    changed(settings)
    before = tree(small)

    def progress(done: int, total: int) -> None:
        if any("restoring" in path.name for path in small.iterdir()):
            fill(small)

    with pytest.raises(backup.BackupError, match="no room is left"):
        backup.restore(settings, made.path, lambda *_: True, progress=progress)
    after = tree(small)
    assert after.pop("ballast") and after == before


def test_a_home_that_is_a_mount(tmp_path: Path, small: Path) -> None:
    """A home and a repository that are mount points cannot be renamed: what was there is kept hidden in them."""
    settings = deployment(tmp_path)
    made = backup.create(settings)
    (small / "alerts.json").write_bytes(b"[]")
    result = backup.restore(replace(settings, home=small), made.path, lambda *_: True)
    assert (small / "alerts.json").read_bytes() == b"{}"
    (kept, _) = result.kept
    assert kept.parent == small and kept.name.startswith(".before-") and (kept / "alerts.json").read_bytes() == b"[]"
