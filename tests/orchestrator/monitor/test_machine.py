"""The readings of the machine: what hangs is unknown, everything else stays fresh."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.jobs.identity import FILE, identity
from orchestrator.metrics_table import TABLE
from orchestrator.monitor.gpu import Gpu, Gpus
from orchestrator.monitor.machine import Machine, NewestBackup, disk, newest_backup
from orchestrator.ops.backup import names
from orchestrator.settings import Settings
from tests.clock import awake

from .test_gpu import Driver


def until(check: Callable[[], object], timeout_s: float = 10.0) -> None:
    began = awake()
    while not check():
        assert awake() - began < timeout_s, "it never came"
        time.sleep(0.005)


class Place:
    """A home with what a Machine asks; disks below a folder in `stalled` hang until `go_on`."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings.load(
            {
                "home": folder / "home", "model_repository": folder / "models", "backup": True,
                "backup_dir": folder / "nas" / "backups",
            },
            {},
        )  # fmt: skip
        (folder / "home").mkdir()
        (folder / "models").mkdir()
        self.settings.backups.mkdir(parents=True)
        self.driver, self.stalled, self.go_on = Driver(), set[Path](), threading.Event()
        self.machine = Machine(self.settings, 0.02, 0.5, self.statvfs, Gpus(lambda: self.driver))

    def statvfs(self, path: Path) -> os.statvfs_result:
        if path in self.stalled:
            self.go_on.wait()
        return os.statvfs(path)

    def values(self) -> dict[tuple[str, ...], float]:
        """(series, label values) -> value."""
        return {
            (name.removeprefix("truthgpt_"), *labels): value
            for name, read in self.machine.readings().items()
            for labels, value in read().items()
        }


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    made.machine.start()
    yield made
    made.machine.stop()
    made.go_on.set()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("sample ")])


def test_everything_is_read(place: Place) -> None:
    """Every series of the table about the machine has its values and labels, and the figures say the same."""
    (place.settings.backups / "truthgpt-20261126T030000Z-0123abcd.tar").touch()
    until(lambda: len(place.values()) == 2 + 4 + 6 + 1 and place.values()["backup_newest_timestamp_seconds",] > 0)
    values, figures = place.values(), place.machine.figures()
    assert values["gpu_memory_usage_bytes", "1"] == 2 << 30 and values["gpu_memory_total_bytes", "0"] == 80 << 30
    assert 0 < values["disk_free_bytes", "home"] <= values["disk_total_bytes", "home"]
    assert {labels[0] for name, *labels in values if name == "disk_free_bytes"} == {
        "home", "model_repository", "backups",
    }  # fmt: skip
    for name, *labels in values:
        assert len(labels) == len(TABLE[f"truthgpt_{name}"].labels)
    assert set(figures) == {"memory", "gpus", "disks", "backup"}
    assert figures["memory"]["total_bytes"] == values["system_memory_total_bytes",]
    assert figures["gpus"] == [
        {"gpu": "0", "used_bytes": 1 << 30, "total_bytes": 80 << 30},
        {"gpu": "1", "used_bytes": 2 << 30, "total_bytes": 80 << 30},
    ]
    assert [row["folder"] for row in figures["disks"]] == ["home", "model_repository", "backups"]
    assert figures["backup"] == {
        "wanted": True, "newest_at": values["backup_newest_timestamp_seconds",], "since": None,
    }  # fmt: skip


def test_a_disk_that_hangs_is_unknown_and_all_else_fresh(place: Place) -> None:
    """Its values vanish once they are old, the others are still read, asking takes no time, and it comes back."""
    until(lambda: len(place.machine.disks) == 3 and place.machine.memory)
    place.stalled.add(place.settings.backups)
    until(lambda: len(place.machine.disks) == 2)
    place.driver.lost = {0}
    until(lambda: place.machine.gpus[0] == Gpu("0", None, None))  # read after the disk has hung
    assert ("disk_free_bytes", "backups") not in place.values() and ("disk_free_bytes", "home") in place.values()
    assert ("gpu_memory_usage_bytes", "0") not in place.values()
    assert place.machine.figures()["disks"][2] == {"folder": "backups", "free_bytes": None, "total_bytes": None}
    began = awake()
    place.machine.readings(), place.machine.figures()
    assert awake() - began < 0.1
    assert place.machine.memory is not None
    place.stalled.clear()
    place.go_on.set()
    until(lambda: len(place.machine.disks) == 3)


def test_a_driver_that_hangs(tmp_path: Path) -> None:
    """The GPUs that were known are unknown after a while, and not gone; a start that hangs at once holds up nobody."""
    place, hangs = Place(tmp_path), threading.Event()
    count = place.driver.nvmlDeviceGetCount
    place.driver.nvmlDeviceGetCount = lambda: hangs.wait() and 0 if hanging else count()  # type: ignore[method-assign]
    hanging = False
    place.machine.start()
    try:
        until(lambda: len(place.machine.gpus) == 2)
        hanging = True
        until(lambda: place.machine.gpus == (Gpu("0", None, None), Gpu("1", None, None)))
        assert place.machine.memory is not None and len(place.machine.disks) == 3
    finally:
        place.machine.stop()
        hangs.set()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("sample ")])


def test_nothing_is_known_before_the_first_reading(tmp_path: Path) -> None:
    """A machine that was not started has no series, and figures that say so."""
    place = Place(tmp_path)
    assert place.values() == {}
    assert place.machine.figures() == {
        "memory": {"used_bytes": None, "total_bytes": None},
        "gpus": [],
        "disks": [{"folder": name, "free_bytes": None, "total_bytes": None}
                  for name in ("home", "model_repository", "backups")],
        "backup": {"wanted": True},
    }  # fmt: skip


def test_the_newest_backup_by_its_name(tmp_path: Path) -> None:
    """Whole archives count, by the time in their names whatever was done to them since; nothing else in the folder."""
    assert newest_backup(tmp_path / "nowhere") == NewestBackup(None)
    assert newest_backup(tmp_path) == NewestBackup(None)
    for name in (
        "truthgpt-19700101T000140Z-00000000.tar", "truthgpt-19700101T000500Z-0123abcd.tar.age",
        ".truthgpt-20261126T030000Z-00000000.tar.part", "truthgpt-20261126T030000Z-00000000.tar.gz", "truthgpt-a.tar",
        "truthgpt-20261326T030000Z-00000000.tar", "other.tar",
    ):  # fmt: skip
        (tmp_path / name).touch()  # just now
    (tmp_path / "truthgpt-20261126T030000Z-00000000.tar").mkdir()
    assert newest_backup(tmp_path) == NewestBackup(300.0)
    assert names.newest(tmp_path).created == 300.0  # type: ignore[union-attr]


def test_how_old_the_home_is(tmp_path: Path) -> None:
    """As old as its name, which is made once; unknown where it has none yet."""
    assert newest_backup(tmp_path / "backups", tmp_path) == NewestBackup(None, None)
    identity(tmp_path)
    os.utime(tmp_path / FILE, (500, 500))
    identity(tmp_path)
    assert newest_backup(tmp_path / "backups", tmp_path) == NewestBackup(None, 500.0)


def test_backups_that_are_not_wanted_have_no_series(tmp_path: Path) -> None:
    """Where none are made there is nothing to be too old; where they are and there is none the series says 0."""
    for wanted, expected in ((True, {(): 0.0}), (False, {})):
        settings = Settings.load({"home": tmp_path, "backup": wanted}, {})
        machine = Machine(settings)
        machine._newest.sample()
        assert machine.readings()["truthgpt_backup_newest_timestamp_seconds"]() == expected
        assert machine.figures()["backup"] == {"wanted": wanted, "newest_at": None, "since": None}


def test_a_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    """It is that of the nearest parent, in blocks that everybody may use; a file in the way is none."""
    (tmp_path / "file").touch()
    asked = []

    def statvfs(path: Path) -> Any:
        asked.append(path)
        os.statvfs(path)
        return SimpleNamespace(f_bavail=3, f_bfree=5, f_blocks=9, f_frsize=4096, f_bsize=1)

    found = disk("home", tmp_path / "file" / "deep" / "home", statvfs)
    assert (found.free_bytes, found.total_bytes) == (3 * 4096, 9 * 4096)
    assert asked[-1] == tmp_path / "file"


def test_what_cannot_be_read_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A reading that fails leaves a line in the log, not one every ten seconds, and another after it had worked."""
    machine = Machine(Settings.load({"home": tmp_path}, {}), root=tmp_path / "nowhere")
    for _ in range(3):
        machine._memory.sample()
    assert machine.memory is None
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["the memory cannot be read"]
