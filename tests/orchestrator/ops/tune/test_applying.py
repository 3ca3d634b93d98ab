"""Another config.pbtxt in place and served, or everything as it was: whatever fails, and wherever a process dies."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from orchestrator.ops.modelserver import ControlError
from orchestrator.ops.tune import applying, guard, undoing
from orchestrator.ops.tune.applying import Change, Say, apply, recover, undoing_of
from orchestrator.ops.tune.errors import TuneError
from orchestrator.settings import Settings
from tests.disks import small_disk

BEFORE, AFTER = "# ours\nslots: 4\r\n", "# ours\nslots: 8\r\n"


@dataclass
class Stack:
    """Serves what the file says, unless a reload fails as `fails` says. It answers as the model's running stack."""

    path: Path
    serves: str = BEFORE
    fails: list[BaseException | None] = field(default_factory=list)
    reloads: int = 0

    def find(self, settings: Settings, model: str) -> Stack:
        return self

    def reload(self, say: Say) -> None:
        self.reloads += 1
        error = self.fails.pop(0) if self.fails else None
        if error is not None:
            self.serves = "half of it"
            raise error
        self.serves = self.path.read_bytes().decode()


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    (tmp_path / "repository" / "demo").mkdir(parents=True)
    (tmp_path / "repository" / "demo" / "config.pbtxt").write_bytes(BEFORE.encode())
    made = replace(Settings(), home=tmp_path / "home", model_repository=tmp_path / "repository")
    with applying.held(made.home):
        yield made


@pytest.fixture
def path(settings: Settings) -> Path:
    return settings.model_repository / "demo" / "config.pbtxt"


def change(path: Path, before: str = BEFORE, after: str = AFTER) -> Change:
    return Change("demo", path, before, after)


def left(settings: Settings) -> list[str]:
    """What is in home/tune and beside config.pbtxt that is to be there only while something happens."""
    folders = (settings.home / "tune", settings.model_repository / "demo")
    return [p.name for folder in folders for p in folder.iterdir() if p.name not in ("lock", "undo", "config.pbtxt")]


def test_it_is_written_and_served_and_can_be_undone(settings: Settings, path: Path) -> None:
    """Byte for byte, with the file's mode; undone one after the other, the last one first."""
    path.chmod(0o640)
    stack = Stack(path)
    assert apply(settings, change(path), find=stack.find)
    assert path.read_bytes() == AFTER.encode() and stack.serves == AFTER and stack.reloads == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and left(settings) == []
    third = AFTER.replace("8", "16")
    assert apply(settings, change(path, AFTER, third), find=stack.find)
    for wanted in (AFTER, BEFORE):
        assert apply(settings, undoing_of(settings, "demo", path, force=False), find=stack.find)
        assert stack.serves == wanted and path.read_bytes() == wanted.encode()
    with pytest.raises(TuneError, match="nothing to undo for demo"):
        undoing_of(settings, "demo", path, force=False)


def test_where_nobody_serves_it_the_file_is_written(settings: Settings, path: Path) -> None:
    """No stack is needed."""
    assert apply(settings, change(path)) is False
    assert path.read_bytes() == AFTER.encode() and left(settings) == []


def test_a_link_stays_a_link(settings: Settings, path: Path, tmp_path: Path) -> None:
    """What it points to is replaced, where it lies."""
    target = tmp_path / "elsewhere.pbtxt"
    path.rename(target)
    path.symlink_to(target)
    apply(settings, change(path.resolve()))
    assert path.is_symlink() and target.read_bytes() == AFTER.encode()
    assert undoing_of(settings, "demo", path, force=False).after == BEFORE


@pytest.mark.parametrize("error", [ControlError("no memory", "lower slots"), KeyboardInterrupt(), OSError(5, "broken")])
def test_a_reload_that_fails_leaves_everything_as_it_was(settings: Settings, path: Path, error: BaseException) -> None:
    """The former file is back and served again, also after Ctrl-C, and there is nothing to undo or to recover."""
    stack = Stack(path, fails=[error])
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else TuneError
    with pytest.raises(expected):
        apply(settings, change(path), find=stack.find)
    assert path.read_bytes() == BEFORE.encode() and stack.serves == BEFORE and stack.reloads == 2
    assert left(settings) == [] and recover_now(settings, stack) is None
    with pytest.raises(TuneError, match="nothing to undo"):
        undoing_of(settings, "demo", path, force=False)


def recover_now(settings: Settings, stack: Stack) -> str | None:
    return applying.recover_held(settings, find=stack.find)


def test_where_the_former_ones_cannot_be_served_again_the_next_one_tries(settings: Settings, path: Path) -> None:
    """The file is as it was, what may be wrong is said, and the note stays until it has been put right."""
    stack = Stack(path, fails=[ControlError("Triton hangs", "wait"), ControlError("it still hangs", "wait")])
    with pytest.raises(TuneError, match="may be served with other settings: it still hangs") as refused:
        apply(settings, change(path), find=stack.find)
    assert "truthgpt models reload demo" in refused.value.hint
    assert path.read_bytes() == BEFORE.encode() and left(settings) == [applying.NOTE]
    told = recover_now(settings, stack)
    assert told is not None and "is undone" in told and stack.serves == BEFORE and left(settings) == []


def test_a_file_that_was_changed_meanwhile_is_left_alone(settings: Settings, path: Path) -> None:
    """By an export or a person, while it was measured, or since; --force undoes all the same."""
    with pytest.raises(TuneError, match="was changed meanwhile"):
        apply(settings, change(path, "what it was when it was measured"))
    apply(settings, change(path))
    path.write_text("by hand")
    with pytest.raises(TuneError, match="was changed after the tuning") as refused:
        undoing_of(settings, "demo", path, force=False)
    assert "--force" in refused.value.hint and path.read_text() == "by hand"
    apply(settings, undoing_of(settings, "demo", path, force=True))
    assert path.read_bytes() == BEFORE.encode()


def note(settings: Settings, path: Path, **changes: object) -> None:
    """As a process that was killed leaves it."""
    document = {
        "format": 1, "model": "demo", "path": str(path), "before": BEFORE, "after": AFTER, "undoes": None,
        "record": undoing.document(path, BEFORE, AFTER, 1.0), "done": False, **changes,
    }  # fmt: skip
    (settings.home / "tune" / applying.NOTE).write_text(json.dumps(document))


@pytest.mark.parametrize("renamed", [False, True])
def test_what_a_killed_process_left_half_done_is_undone(settings: Settings, path: Path, renamed: bool) -> None:
    """Before and after the rename, with the reload under way: the former file is there, and served."""
    note(settings, path)
    if renamed:
        path.write_bytes(AFTER.encode())
    stack = Stack(path, serves="one or the other")
    told = recover_now(settings, stack)
    assert told is not None and "is undone" in told
    assert path.read_bytes() == BEFORE.encode() and stack.serves == BEFORE and left(settings) == []


def test_what_another_has_written_since_stays(settings: Settings, path: Path) -> None:
    """An export that came after the kill is not undone with it."""
    note(settings, path)
    path.write_text("a new version's")
    stack = Stack(path)
    recover_now(settings, stack)
    assert path.read_text() == stack.serves == "a new version's" and left(settings) == []


def test_what_was_done_but_for_its_record_is_finished(settings: Settings, path: Path) -> None:
    """The settings stay, and can be undone."""
    note(settings, path, done=True)
    path.write_bytes(AFTER.encode())
    stack = Stack(path, serves=AFTER)
    told = recover_now(settings, stack)
    assert told is not None and "its settings stay" in told and stack.serves == AFTER and left(settings) == []
    assert undoing_of(settings, "demo", path, force=False).after == BEFORE


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 9}', "\x00"])
def test_a_note_that_cannot_be_read_is_refused(settings: Settings, path: Path, text: str) -> None:
    """Nothing is guessed: the file that says it is named, and what to look at."""
    (settings.home / "tune" / applying.NOTE).write_text(text)
    with pytest.raises(TuneError, match=applying.NOTE) as refused:
        recover_now(settings, Stack(path))
    assert "remove that file" in refused.value.hint and path.read_bytes() == BEFORE.encode()


def test_one_tuning_of_a_home_at_a_time(settings: Settings, path: Path) -> None:
    """The second is refused, and nobody recovers what another one is at work on."""
    with pytest.raises(TuneError, match="another tuning runs"), applying.held(settings.home):
        pass
    note(settings, path)
    assert recover(settings) is None and left(settings) == [applying.NOTE]


def test_old_records_go(settings: Settings, path: Path) -> None:
    """A model has no more than so many former files, and the newest are kept."""
    for number in range(undoing.KEPT + 5):
        undoing.push(settings.home, "demo", undoing.document(path, str(number), AFTER, number))
    assert len([*(settings.home / "tune" / "undo" / "demo").iterdir()]) == undoing.KEPT
    assert undoing.top(settings.home, "demo", path).before == str(undoing.KEPT + 4)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 7}'])
def test_a_record_that_cannot_be_read_is_named(settings: Settings, path: Path, text: str) -> None:
    """Damaged ones and those of another format."""
    undoing.push(settings.home, "demo", undoing.document(path, BEFORE, AFTER, 1.0))
    record = settings.home / "tune" / "undo" / "demo" / "000001.json"
    record.write_text(text)
    with pytest.raises(TuneError, match=record.name):
        undoing_of(settings, "demo", path, force=False)


@contextmanager
def unwritable(path: Path) -> Iterator[None]:
    """A file in a folder that cannot be written, by root neither."""
    if os.geteuid() != 0:
        path.parent.chmod(0o500)
        try:
            yield
        finally:
            path.parent.chmod(0o700)
        return
    data = path.read_bytes()
    with small_disk(path.parent, "64k"):
        path.write_bytes(data)
        subprocess.run(["mount", "-o", "remount,ro", path.parent], check=True)
        yield


def test_a_repository_that_cannot_be_written_is_found_out_before(settings: Settings, path: Path) -> None:
    """Before an hour of measuring; and if it becomes so meanwhile, nothing is left behind."""
    with unwritable(path):
        with pytest.raises(TuneError, match="cannot be replaced"):
            applying.require_writable(path)
        with pytest.raises(TuneError, match="cannot be replaced"):
            apply(settings, change(path))
        assert path.read_bytes() == BEFORE.encode() and left(settings) == []


KILLED = """
import os, sys
from pathlib import Path
from orchestrator.ops.tune import applying
from orchestrator.settings import Settings
class Stack:
    def reload(self, say):
        os.kill(os.getpid(), 9)
with applying.held(Settings.load().home):
    path = Path(sys.argv[1])
    applying.apply(Settings.load(), applying.Change("demo", path, path.read_bytes().decode(), sys.argv[2]),
                   find=lambda settings, model: Stack())
"""


def test_the_guard_undoes_what_a_killed_process_was_at(tmp_path: Path) -> None:
    """`kill -9` in the reload: a moment later the former file is back, without anybody's doing."""
    path = tmp_path / "repository" / "demo" / "config.pbtxt"
    path.parent.mkdir(parents=True)
    path.write_bytes(BEFORE.encode())
    settings = replace(Settings(), home=tmp_path / "home", model_repository=tmp_path / "repository")
    env = {**os.environ, **settings.child_environ()}
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), AFTER], env=env, timeout=60)
    assert done.returncode == -9
    deadline = time.monotonic() + 30
    while (settings.home / "tune" / applying.NOTE).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert path.read_bytes() == BEFORE.encode()


def test_the_guard_ends_with_the_word(settings: Settings, path: Path) -> None:
    """It waits no longer than it is needed, and touches nothing then."""
    note(settings, path)
    with guard.watching(settings):
        pass
    assert left(settings) == [applying.NOTE]
