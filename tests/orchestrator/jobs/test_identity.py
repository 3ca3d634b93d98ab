"""The identity of a folder."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.jobs.identity import FILE, find, identity


def test_all_who_share_a_folder_agree(tmp_path: Path) -> None:
    """Many at once get the same name, it stays, another folder has another, and nothing else is left there."""
    with ThreadPoolExecutor(16) as pool:
        found = set(pool.map(identity, [tmp_path] * 64))
    assert len(found) == 1 and identity(tmp_path) in found
    assert os.listdir(tmp_path) == [FILE]
    (tmp_path / "other").mkdir()
    assert identity(tmp_path / "other") not in found


def test_a_file_that_is_no_name_is_replaced(tmp_path: Path) -> None:
    """What a crash has left empty, or somebody has filled with something else, becomes a name."""
    (tmp_path / FILE).write_text("")
    found = identity(tmp_path)
    assert len(found) == 16 and identity(tmp_path) == found == (tmp_path / FILE).read_text().strip()


def test_a_folder_that_is_not_there_has_none(tmp_path: Path) -> None:
    """A missing folder is an error, and is not made."""
    with pytest.raises(FileNotFoundError):
        identity(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


def test_who_only_looks_makes_none(tmp_path: Path) -> None:
    """What has no name yet, or is not there, has none; what has one has the same for whoever looks."""
    assert find(tmp_path) is None and find(tmp_path / "missing") is None and os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    assert find(tmp_path / "file") is None
    assert identity(tmp_path) == find(tmp_path)


def test_a_folder_that_cannot_be_written_has_one_all_the_same(tmp_path: Path) -> None:
    """A repository that is read-only has the same name each time; nothing is written into it."""
    folder = tmp_path / "readonly"
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        shutil.rmtree(folder)
        pytest.skip("root may write everywhere")
    assert identity(folder) == identity(folder) and os.listdir(folder) == []
