"""Publishing is all or nothing, whoever else is at work and whenever the exporter dies."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.errors import RepositoryError
from export.repository import CONFIG, Repository, Staging, check_name, translated

_CONTRACT = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")


def _fill(staging: Staging, content: str = "weights", config: str = "config") -> None:
    (staging.folder / "model.onnx").write_text(content)
    (staging.model / CONFIG).write_text(config)


def _publish(root: Path, name: str = "m", content: str = "weights", config: str = "config") -> Path:
    repository = Repository(root)
    with repository.staging(name) as staging:
        _fill(staging, content, config)
        return repository.publish(staging)


def snapshot(root: Path) -> dict[str, bytes | None]:
    """Every path below the root but the hidden staging area, with its content."""
    paths = (path for path in root.rglob("*") if ".staging" not in path.relative_to(root).parts)
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in paths}


@given(st.text(max_size=120) | st.from_regex(_CONTRACT))
def test_names_are_the_contract(name: str) -> None:
    """A name is accepted exactly if it matches the contract's pattern: no slash, no newline, no leading dot."""
    if _CONTRACT.fullmatch(name):
        assert check_name(name) == name
    else:
        with pytest.raises(RepositoryError):
            check_name(name)


def test_versions_count_up(tmp_path: Path) -> None:
    """Each export becomes the version after the highest, also when lower ones have been removed."""
    assert _publish(tmp_path) == tmp_path / "m" / "1"
    assert _publish(tmp_path) == tmp_path / "m" / "2"
    (tmp_path / "m" / "10").mkdir()
    (tmp_path / "m" / "notes").mkdir()
    assert _publish(tmp_path) == tmp_path / "m" / "11"
    assert Repository(tmp_path).versions("m") == [1, 2, 10, 11]
    assert not (tmp_path / ".staging").exists()


def test_later_versions_leave_the_others_alone(tmp_path: Path) -> None:
    """A second version adds its folder and replaces the configuration only when it differs."""
    _publish(tmp_path, content="one")
    before = (tmp_path / "m" / CONFIG).stat().st_ino
    _publish(tmp_path, content="two")
    assert (tmp_path / "m" / CONFIG).stat().st_ino == before
    _publish(tmp_path, content="three", config="other")
    assert (tmp_path / "m" / CONFIG).read_text() == "other"
    assert [(tmp_path / "m" / str(version) / "model.onnx").read_text() for version in (1, 2, 3)] == [
        "one",
        "two",
        "three",
    ]


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    """An exception or Ctrl-C inside the staging block takes the staging folder away and publishes nothing."""
    _publish(tmp_path)
    before = snapshot(tmp_path)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), Repository(tmp_path).staging("m") as staging:
            _fill(staging)
            raise error
    assert snapshot(tmp_path) == before
    assert not (tmp_path / ".staging").exists()


def test_one_export_of_a_name_at_a_time(tmp_path: Path) -> None:
    """A second export of the same name is refused while the first runs; another name is not."""
    repository = Repository(tmp_path)
    with repository.staging("m") as first:
        with pytest.raises(RepositoryError, match="Another export of m"), Repository(tmp_path).staging("m"):
            pytest.fail("two exports of one name")
        with Repository(tmp_path).staging("n") as other:
            assert other.root != first.root
        assert first.folder.is_dir()
    with repository.staging("m"):
        pass


_DIE = """
import os, signal, sys
from pathlib import Path
from export.repository import CONFIG, Repository
root, where = Path(sys.argv[1]), sys.argv[2]
def step(text):
    if text == where:
        os.kill(os.getpid(), signal.SIGKILL)
repository = Repository(root)
with repository.staging("m") as staging:
    (staging.folder / "model.onnx").write_text("new")
    (staging.model / CONFIG).write_text("new config")
    step("staged")
    repository.publish(staging, step)
"""


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("where", ["staged", "renaming", "configuring"])
def test_killed_while_publishing(tmp_path: Path, where: str, first: bool) -> None:
    """Killed at any step, the old state or the complete new version is there, and the next export cleans up."""
    if not first:
        _publish(tmp_path)
    before = snapshot(tmp_path)
    died = subprocess.run([sys.executable, "-c", _DIE, str(tmp_path), where], check=False, timeout=60)
    if first and where == "configuring":
        assert died.returncode == 0  # a first version is one rename: there is no such step
        assert set(snapshot(tmp_path)) == {"m", "m/1", "m/1/model.onnx", f"m/{CONFIG}"}
        return
    assert died.returncode == -signal.SIGKILL
    after = snapshot(tmp_path)
    if where == "configuring":  # behind the commit point: the version is whole, the configuration the old one
        assert after == before | {"m/2": None, "m/2/model.onnx": b"new"}
    else:
        assert after == before
    assert any((tmp_path / ".staging").iterdir())
    _publish(tmp_path, "other")
    assert list((tmp_path / ".staging").glob("m-*")) == []


def test_a_living_owner_keeps_its_staging(tmp_path: Path) -> None:
    """Cleaning removes the folders of the dead, never those of another export that is running, nor foreign files."""
    with Repository(tmp_path).staging("alive") as staging:
        dead = tmp_path / ".staging" / "dead-1-0123abcd"
        (dead / "dead" / "1").mkdir(parents=True)
        foreign = tmp_path / ".staging" / "keep"
        foreign.mkdir()
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (tmp_path / ".staging" / "link-1-0123abcd").symlink_to(elsewhere)
        _publish(tmp_path)
        assert staging.folder.is_dir() and foreign.is_dir() and elsewhere.is_dir()
        assert not dead.exists()


def test_what_a_removal_has_left_is_cleared_away(tmp_path: Path) -> None:
    """A model that was removed on a full disk by a command that died goes with the next export; nothing else does."""
    left, kept = tmp_path / ".removed-m-77-0123abcd", tmp_path / ".removed-m"
    for folder in (left, kept):
        (folder / "1").mkdir(parents=True)
    _publish(tmp_path)
    assert not left.exists() and kept.exists() and Repository(tmp_path).versions("m") == [1]


def test_no_space_is_said_before(tmp_path: Path) -> None:
    """What cannot fit is refused with both sizes, before anything is written."""
    with pytest.raises(RepositoryError, match=r"needs .* GB .* only"):
        Repository(tmp_path).require_space(1 << 60)
    Repository(tmp_path).require_space(1)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EROFS, "cannot be written"),
        (errno.ENOTDIR, "is not a folder"),
        (errno.EIO, "cannot be used"),
    ],
)
def test_the_file_systems_refusals_become_sentences(tmp_path: Path, code: int, sentence: str) -> None:
    """Whatever the file system says while publishing arrives as one sentence of ours."""
    with pytest.raises(RepositoryError, match=sentence), translated(tmp_path):
        raise OSError(code, os.strerror(code))


def test_a_full_disk_while_writing(tmp_path: Path) -> None:
    """The kernel's own "no space left" (from /dev/full) is translated."""
    with pytest.raises(RepositoryError, match="no space left"), translated(tmp_path), open("/dev/full", "wb") as full:
        full.write(b"x" * 100_000)
