"""Full disks and kill -9 in the middle of a backup and of a restore, for real."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.local import state, swap
from orchestrator.ops import backup
from orchestrator.ops.backup import redissource
from orchestrator.settings import Settings
from tests.disks import small_disk
from tests.orchestrator.gateway import write_state
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
    with small_disk(tmp_path / "small", "24m") as folder:
        yield folder


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


@contextmanager
def bound(source: Path, folder: Path) -> Iterator[None]:
    """The same file system seen at another place."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["mount", "--bind", source, folder], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_home_and_a_repository_that_are_bind_mounts(tmp_path: Path) -> None:
    """They are on their parents' device, and nothing can be renamed out of them: what was there is kept inside."""
    settings = deployment(tmp_path)
    made = backup.create(settings)
    places = tmp_path / "places"
    with bound(settings.home, places / "home"), bound(settings.model_repository, places / "repository"):
        mounted = replace(settings, home=places / "home", model_repository=places / "repository")
        assert mounted.home.stat().st_dev == places.stat().st_dev
        changed(mounted)
        result = backup.restore(mounted, made.path, lambda *_: True)
        assert [kept.parent for kept in result.kept] == [mounted.home, mounted.model_repository]
        assert (mounted.home / "alerts.json").read_bytes() == b"{}"
        assert (result.kept[0] / "alerts.json").read_bytes() == b"[1]"
        assert (result.kept[1] / "later").is_dir() and not (mounted.model_repository / "later").exists()
        assert not [name for folder in (places, *mounted.home.parents, mounted.home, mounted.model_repository)
                    for name in os.listdir(folder) if "restoring" in name]  # fmt: skip


@pytest.mark.parametrize("name", ["home/metrics", "repository/demo"])
def test_something_mounted_in_what_is_to_be_moved(tmp_path: Path, name: str) -> None:
    """A mount point cannot be moved: the error names it, and everything is as it was."""
    settings = deployment(tmp_path)
    made = backup.create(settings)
    (tmp_path / "elsewhere").mkdir(exist_ok=True)
    with bound(tmp_path / "elsewhere", tmp_path / name):
        before = tree(tmp_path)
        with pytest.raises(backup.BackupError, match=f"{name} cannot be moved.*mounted") as failed:
            backup.restore(settings, made.path, lambda *_: True)
        assert "unmount" in failed.value.hint and tree(tmp_path) == before


def test_a_note_that_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done is reported as done, and nobody undoes it later, although the note stays there."""
    settings = deployment(tmp_path)
    made = backup.create(settings)
    changed(settings)
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == swap.NOTE:
            raise OSError(errno.EIO, "Input/output error", str(path))
        real(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", unlink)
        assert backup.restore(settings, made.path, lambda *_: True).done
        assert (settings.home / swap.NOTE).exists() and not swap.pending(settings.home)
        with redissource.held(settings.home) as recovered:
            assert recovered is None
    assert (settings.home / "alerts.json").read_bytes() == b"{}"
    assert backup.create(settings).files and not (settings.home / swap.NOTE).exists()
    assert (settings.home / "alerts.json").read_bytes() == b"{}"


def test_a_note_that_cannot_be_read(tmp_path: Path) -> None:
    """It is an error that names the file and says what to do, for a backup and for a restore."""
    settings = deployment(tmp_path)
    made = backup.create(settings)
    for text in ("{", "[]", '{"moves": 1}', '{"moves": [["a", 1]], "inodes": [1], "staging": [], "kept": []}', "\xff"):
        (settings.home / swap.NOTE).write_text(text, encoding="latin-1")
        for act in (lambda: backup.create(settings), lambda: backup.restore(settings, made.path, lambda *_: True)):
            with pytest.raises(swap.NoteError, match=r"restore\.json") as failed:
                act()
            assert "before-TIME" in failed.value.hint


def test_the_folder_for_what_was_there_is_on_the_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is moved into it the folder that it is in was synced."""
    settings = deployment(tmp_path)
    made = backup.create(settings)
    real, rename, done = swap.sync_folder, os.rename, list[str]()

    def synced(folder: Path) -> None:
        if folder == tmp_path and any(".before-" in path.name for path in folder.iterdir()):
            done.append("synced")
        real(folder)

    def renamed(source: Path, target: Path) -> None:
        done.append("renamed")
        rename(source, target)

    monkeypatch.setattr(swap, "sync_folder", synced)
    monkeypatch.setattr(os, "rename", renamed)
    assert backup.restore(settings, made.path, lambda *_: True).done
    assert done[:2] == ["synced", "synced"] and "renamed" in done


def test_empty_folders_of_a_restore_that_was_killed(tmp_path: Path) -> None:
    """The next one removes those for what was there before, if nothing is in them; others stay."""
    settings = deployment(tmp_path)
    made = backup.create(settings)
    empty = [tmp_path / f"{name}.before-20260101T000000Z" for name in ("home", "repository")]
    kept = [tmp_path / "home.before-20260102T000000Z", tmp_path / "home.before-mine", tmp_path / "homebefore"]
    for folder in (*empty, *kept):
        folder.mkdir()
    (kept[0] / "alerts.json").write_bytes(b"")
    assert backup.restore(settings, made.path, lambda *_: True).done
    assert [folder.exists() for folder in (*empty, *kept)] == [False, False, True, True, True]


def test_the_redis_of_a_killed_stack(tmp_path: Path) -> None:
    """While it runs it keeps its files; a process that has got its number since, and is another, keeps nothing."""
    settings = deployment(tmp_path)
    with redissource.held(settings.home), redissource.started(settings, settings.home) as client:
        client.set("truthgpt:{acme}:c:abc", b"x")
        pid = int(client.info()["process_id"])
        write_state(settings.home, "http://127.0.0.1:1", processes={"redis": pid})
        with pytest.raises(backup.BackupError, match=f"process {pid}"), redissource.started(settings, settings.home):
            pass
    dead = subprocess.Popen(["true"])
    dead.wait()
    other = subprocess.Popen(["sleep", "600"])
    try:
        for argv_of in (os.getpid(), other.pid):
            found = write_state(settings.home, "http://127.0.0.1:1", processes={"redis": argv_of})
            state.write(settings.home, replace(found, pid=dead.pid))
            assert backup.create(settings).redis == "stopped"
    finally:
        other.kill()
        other.wait()
