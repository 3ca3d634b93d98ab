"""Walking and removing folders: never out of them, whatever happens to them meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.ops import folders
from orchestrator.ops.folders import listed, opened, remove_tree, walked

ROOT = Path(__file__).resolve().parents[3]


def fail(path: str, error: OSError) -> None:
    raise AssertionError(f"{path}: {error}")


def paths(folder: Path) -> list[str]:
    with opened(folder) as fd:
        assert fd is not None
        return [found.path.removeprefix(f"{folder}/") for found in walked(fd, str(folder), fail)]


def test_a_folder_comes_after_what_is_in_it(tmp_path: Path) -> None:
    """Every name below comes once, hidden ones and links too, and a folder last."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/b/x", "a/.y", "z"):
        (tmp_path / name).touch()
    (tmp_path / "a" / "link").symlink_to("/etc")
    found = paths(tmp_path)
    assert sorted(found) == ["a", "a/.y", "a/b", "a/b/x", "a/link", "z"]
    assert found.index("a") > max(found.index(name) for name in ("a/b", "a/.y", "a/link"))
    assert found.index("a/b") == found.index("a/b/x") + 1


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A link in the place of the folder itself is no folder, one inside is a name, and its target stays."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    (tmp_path / "cache").symlink_to(outside)
    with opened(tmp_path, "cache") as fd:
        assert fd is None
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(outside)
    with opened(tmp_path) as fd:
        assert fd is not None
        found = next(one for one in listed(fd, str(tmp_path), fail) if one.name == "inside")
        remove_tree(found, fail)
    assert not inside.exists() and (outside / "precious").exists()


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    """A missing folder, and a file in its place, are no error."""
    (tmp_path / "file").touch()
    for names in (("missing",), ("file",), ("missing", "below")):
        with opened(tmp_path, *names) as fd:
            assert fd is None


@pytest.mark.parametrize("times", [30])
def test_a_folder_that_is_exchanged_for_a_link_leads_nowhere(tmp_path: Path, times: int) -> None:
    """While a tree is removed its folders are exchanged for links to another one, over and over: that loses nothing."""
    outside = tmp_path / "outside"
    for name in ("a", "b"):
        (outside / name).mkdir(parents=True)
        for number in range(20):
            (outside / name / f"precious{number}").touch()
    errors: list[OSError] = []
    for _ in range(times):
        victim = tmp_path / "cache"
        for name in ("a", "b"):
            (victim / name).mkdir(parents=True, exist_ok=True)
            for number in range(20):
                (victim / name / f"precious{number}").touch()
        stop = threading.Event()

        def exchange(victim: Path = victim, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                for name in ("a", "b"):
                    try:
                        (victim / name).rename(tmp_path / f"was-{name}")
                        (victim / name).symlink_to(outside / name)
                        (victim / name).unlink()
                        (tmp_path / f"was-{name}").rename(victim / name)
                    except OSError:
                        continue

        thread = threading.Thread(target=exchange)
        thread.start()
        try:
            with opened(tmp_path, "cache") as fd:
                assert fd is not None
                for found in walked(fd, str(victim), lambda path, error: errors.append(error)):
                    try:
                        found.remove()
                    except OSError as error:
                        errors.append(error)
        finally:
            stop.set()
            thread.join()
        subprocess.run(["rm", "-rf", victim, tmp_path / "was-a", tmp_path / "was-b"], check=True)
    assert sorted(p.name for p in (outside / "a").iterdir()) == sorted(f"precious{n}" for n in range(20))
    assert len(list((outside / "b").iterdir())) == 20


def test_exactly_the_found_place_is_meant(tmp_path: Path) -> None:
    """Between finding a file and removing it its folder is exchanged for a link: the link's target is not touched."""
    (tmp_path / "cache" / "deep").mkdir(parents=True)
    (tmp_path / "cache" / "deep" / "x").touch()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").touch()
    with opened(tmp_path, "cache") as fd:
        assert fd is not None
        walk = walked(fd, str(tmp_path / "cache"), fail)
        found = next(walk)
        (tmp_path / "cache" / "deep").rename(tmp_path / "moved")
        (tmp_path / "cache" / "deep").symlink_to(tmp_path / "outside")
        found.remove()
        walk.close()
    assert (tmp_path / "outside" / "x").exists() and not (tmp_path / "moved" / "x").exists()


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A folder in which another one of the same file system, with a file in it, is mounted as `mount`."""
    (tmp_path / "tree" / "mount").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    mount = ["mount", "--bind", tmp_path / "elsewhere", tmp_path / "tree" / "mount"]
    try:
        subprocess.run(mount, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount")
    yield tmp_path / "tree"
    subprocess.run(["umount", "-l", tmp_path / "tree" / "mount"], check=True)


def test_a_mount_is_not_entered(mounted: Path) -> None:
    """Not even one of the same file system, and not as the folder that is to be removed itself."""
    (mounted / "old").touch()
    assert paths(mounted) == ["old"]
    with opened(mounted) as fd:
        assert fd is not None
        found = next(one for one in listed(fd, str(mounted), fail) if one.name == "mount")
        remove_tree(found, fail)
    assert (mounted / "mount" / "precious").exists()


def test_folders_in_each_other_without_end_are_bounded(tmp_path: Path) -> None:
    """Deeper than a hundred is an error of that folder, not of the process's open files; all of it is closed again."""
    folder = tmp_path
    for _ in range(folders.MAX_DEPTH + 5):
        folder = folder / "d"
    folder.mkdir(parents=True)
    before, errors = len(os.listdir("/proc/self/fd")), list[str]()
    with opened(tmp_path) as fd:
        assert fd is not None
        names = [found.path for found in walked(fd, str(tmp_path), lambda path, error: errors.append(path))]
    assert len(errors) == 1 and len(names) == folders.MAX_DEPTH
    with opened(tmp_path) as fd:
        assert fd is not None
        walk = walked(fd, str(tmp_path), lambda path, error: None)
        next(walk)
        walk.close()  # half-way
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_cannot_be_removed_is_told_and_the_rest_goes(tmp_path: Path) -> None:
    """One name that cannot be removed is told by its path, and everything beside it goes."""

    (tmp_path / "tree" / "sub").mkdir(parents=True)
    for name in ("tree/a", "tree/sub/b"):
        (tmp_path / name).touch()
    errors: list[str] = []
    with opened(tmp_path) as fd:
        assert fd is not None
        (found,) = listed(fd, str(tmp_path), fail)

        def guard() -> None:  # somebody puts something there while it is being removed
            if not (tmp_path / "tree" / "sub" / "b").exists() and (tmp_path / "tree" / "sub").exists():
                (tmp_path / "tree" / "sub" / "new").touch()

        with pytest.raises(OSError, match="not empty"):
            remove_tree(found, lambda path, error: errors.append(path), guard)
    assert errors == [str(tmp_path / "tree" / "sub")] and not (tmp_path / "tree" / "a").exists()


_CHILD = """
import os, sys
from pathlib import Path
from dataclasses import replace
from orchestrator.ops.cleanup import clean
from orchestrator.ops.cleanwork import Work
from orchestrator.settings import Settings
home, count, dry = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "plan"
settings = replace(Settings(), home=home)
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
clean(replace(settings, home=home / "none"), Work(), ["cache"])
for number in range(count):
    folder = home / "cache" / f"{number % 10}" / f"{number // 10000}"
    if number % 10000 < 10:
        folder.mkdir(parents=True, exist_ok=True)
    os.close(os.open(f"{folder}/{number}", os.O_CREAT | os.O_WRONLY))
    os.utime(f"{folder}/{number}", (1, 1))
made = peak()
work = Work(dry=dry)
(tally,) = clean(settings, work, ["cache"])
print(tally.count, tally.failed, len(work.items), work.omitted, peak() - made, sum(len(f) for _, _, f in os.walk(home)))
"""


def _measure(folder: Path, count: int, what: str) -> list[int]:
    (folder / "cache").mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder), str(count), what], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize("count", [5_000, pytest.param(1_000_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_memory_does_not_grow_with_the_number_of_files(tmp_path: Path, count: int) -> None:
    """A plan of so many files and their removal take less than 4 MiB more than none, and leave no file."""
    counted, failed, items, omitted, grown_kib, left = _measure(tmp_path, count, "plan")
    assert (counted, failed, items, omitted, left) == (count, 0, 1000, count - 1000, count)
    assert grown_kib < 4096
    counted, failed, _, _, grown_kib, left = _measure(tmp_path, 0, "run")
    assert (counted, failed, left) == (count, 0, 0)
    assert grown_kib < 4096
