"""Cleaning up a home: what goes, what never does, and what happens when something cannot go."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.audit import fingerprint_of
from orchestrator.auditlog import encode, folder_of, rotated
from orchestrator.auditwriter import AuditLog
from orchestrator.jobs.lease import LeaseLost
from orchestrator.local import tritonserver
from orchestrator.ops.cleanup import TARGETS, clean
from orchestrator.ops.cleanwork import ERRORS, NotClean, Tally, Work, as_text
from orchestrator.ops.folders import Found
from orchestrator.settings import Settings

DAY_S = 86_400.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    for folder in ("home/logs", "home/cache", "home/triton/backends", "home/metrics", "home/audit", "repository"):
        (tmp_path / folder).mkdir(parents=True)
    return replace(Settings(), home=tmp_path / "home", model_repository=tmp_path / "repository")


def old(path: Path, age_s: float = 40 * DAY_S, text: str = "x") -> Path:
    """A file of that age."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def later(age_s: float = 2 * 3600.0) -> float:
    """A time at which what is made now has that age, its change time too."""
    return time.time() + age_s


def run(settings: Settings, *names: str, **more: object) -> Tally:
    work = Work(**more)  # type: ignore[arg-type]
    (tally,) = clean(settings, work, names)
    return tally


def test_rotated_logs_go_and_current_ones_stay(settings: Settings, tmp_path: Path) -> None:
    """Only NAME.N older than log_days goes: no current log however old, no other file, no folder, no link's target."""
    logs = settings.home / "logs"
    gone = [old(logs / name) for name in ("gateway.log.1", "triton.log.12", "odd name.5")]
    kept = [old(logs / name) for name in ("gateway.log", "notes.txt", "x.0", "x.01", ".1", "gateway.log.1.gz")]
    kept += [old(logs / "gateway.log.2", 6 * DAY_S), old(logs / "deep" / "gateway.log.1"), old(tmp_path / "target")]
    (logs / "link.1").symlink_to(tmp_path / "target")
    (logs / "folder.1").mkdir()
    plan = Work(dry=True)
    clean(settings, plan, ["logs"])
    assert {item.path for item in plan.items} == {str(path) for path in gone} and all(p.exists() for p in gone)
    assert all(39 * DAY_S < (item.age_s or 0) < 41 * DAY_S and item.why for item in plan.items)
    tally = run(settings, "logs")
    assert (tally.count, tally.bytes, tally.failed) == (3, 3, 0)
    assert not any(path.exists() for path in gone) and all(path.exists() for path in kept)
    assert run(replace(settings, log_days=0), "logs", now=later(400 * DAY_S)).count == 0


def test_the_log_that_is_written_stays_whatever_its_name(settings: Settings) -> None:
    """A log file that the settings name as if it were a rotated one is not removed."""
    current = old(settings.home / "logs" / "app.1")
    assert run(replace(settings, log_file=current), "logs").count == 0 and current.exists()


def test_a_folder_that_is_a_link_is_left_alone(settings: Settings, tmp_path: Path) -> None:
    """home/logs and home/cache that are links lead out of the home: nothing behind them goes."""
    for name in ("logs", "cache"):
        precious = old(tmp_path / "outside" / "x.1")
        (settings.home / name).rmdir()
        (settings.home / name).symlink_to(tmp_path / "outside")
        tally = run(settings, name)
        assert (tally.count, tally.failed) == (0, 0) and precious.exists()


def test_cached_files_go_by_age(settings: Settings) -> None:
    """Files in any depth go once they are old, and the folders that are empty then; young ones and theirs stay."""
    cache = settings.home / "cache"
    for name in ("a/b/old", "a/b/c/old", "old", "mixed/old"):
        old(cache / name)
    young = [old(cache / "mixed" / "young", 3600), old(cache / "young", DAY_S - 60)]
    (cache / "fresh").mkdir()
    tally = run(settings, "cache")
    assert (tally.count, tally.failed) == (4, 0) and all(path.exists() for path in young)
    left = sorted(str(path.relative_to(cache)) for path in cache.rglob("*"))
    assert left == ["fresh", "mixed", "mixed/young", "young"]
    assert run(replace(settings, cache_file_age_s=0.0), "cache", now=later(400 * DAY_S)).count == 0
    assert cache.is_dir()


@given(ages=st.lists(st.floats(-10 * DAY_S, 100 * DAY_S), max_size=8), bound_s=st.floats(1.0, 60 * DAY_S))
def test_exactly_the_old_ones_go(tmp_path_factory: pytest.TempPathFactory, ages: list[float], bound_s: float) -> None:
    """Whatever the ages, files from the future too, those beyond the bound go and no other."""
    home = tmp_path_factory.mktemp("home")
    settings, now = replace(Settings(), home=home, cache_file_age_s=bound_s), 1_800_000_000.0
    for number, age_s in enumerate(ages):
        old(home / "cache" / str(number))
        os.utime(home / "cache" / str(number), (now - age_s,) * 2)
    there = {str(n): os.stat(home / "cache" / str(n)).st_mtime for n in range(len(ages))}
    tally = run(settings, "cache", now=now)
    left = set(os.listdir(home / "cache")) if ages else set()
    assert left == {name for name, mtime in there.items() if not now - mtime > bound_s}
    assert tally.count == len(there) - len(left)


def test_metric_history_goes_by_the_day_in_its_name(settings: Settings) -> None:
    """Whatever its time of change, a file of a day more than metrics_days ago goes; other names stay."""
    folder, today = settings.home / "metrics", datetime.now(UTC).date()
    days = {age: folder / f"{today - timedelta(days=age)}.jsonl" for age in (0, 29, 30, 31, 400)}
    for path in days.values():
        path.write_text("x")
    kept = [folder / name for name in ("notes.txt", "2020-13-45.jsonl", "12020-01-011.jsonl", "current.jsonl")]
    for path in kept:
        path.write_text("x")
    assert run(settings, "metrics").count == 2
    assert {age for age, path in days.items() if path.exists()} == {0, 29, 30}
    assert all(path.exists() for path in kept)
    assert run(replace(settings, metrics_days=0), "metrics", now=later(400 * DAY_S)).count == 0


def test_leftovers_go_and_what_somebody_works_on_stays(settings: Settings) -> None:
    """Abandoned staging, locks, backends and temporary files go once they are old; locked and foreign ones never."""
    staging, backends = settings.model_repository / ".staging", settings.home / "triton" / "backends"
    gone_pid = subprocess.Popen(["true"])
    gone_pid.wait()
    gone = [
        old(staging / "demo-77-0123abcd" / "demo" / "1" / "model.onnx").parents[2], old(staging / "demo.lock"),
        old(backends / f".python-{gone_pid.pid}" / "x").parent, old(settings.home / "state-abcd_123"),
        old(backends.with_name("backends-2") / f".python-{gone_pid.pid}" / "x").parent,
        old(settings.home / "models-abcd1234"), old(settings.home / "audit" / "base-abcd1234"),
        old(settings.model_repository / ".removed-demo-77-0123abcd" / "model.onnx").parent,
    ]  # fmt: skip
    live, live_lock = old(staging / "live-78-0123abcd" / "x").parent, old(staging / "live.lock")
    live_backup = old(settings.backups / ".truthgpt-20260102T000000Z-1a2b3c4d.tar.age.part", 3600)
    part = old(settings.backups / ".truthgpt-20260101T000000Z-1a2b3c4d.tar.part", 3600)
    kept = [
        live, live_lock, live_backup,
        old(settings.model_repository / ".removed-demo-77" / "x").parent,
        old(staging / "notes"), old(staging / ".nfs123"), old(staging / "demo-77-0123abcd.txt"),
        old(backends / f".python-{os.getpid()}" / "x").parent, old(backends / "python" / "x").parent,
        old(backends.with_name("notes") / f".python-{gone_pid.pid}" / "x").parent,
        old(settings.home / "models-abcdefgh.lock"), old(settings.home / "state.json"),
        old(settings.home / "my-document.txt"), old(settings.home / "audit" / "base"),
        old(settings.backups / "truthgpt-20260101.tar"), old(settings.backups / ".snapshot" / "y").parent,
    ]  # fmt: skip
    (staging / "linked-79-0123abcd").symlink_to(settings.home)
    handles = [os.open(path, os.O_RDONLY) for path in (live, live_lock, live_backup)]
    try:
        for handle in handles:
            fcntl.flock(handle, fcntl.LOCK_EX)
        # made a moment ago, whatever their files say; of a backup the lock tells that its writer is gone
        assert run(settings, "temporary").count == 1 and not part.exists()
        tally = run(settings, "temporary", dry=True, now=later())
        assert tally.count == len(gone) and all(path.exists() for path in gone)
        tally = run(settings, "temporary", now=later())
    finally:
        for handle in handles:
            os.close(handle)
    assert (tally.count, tally.failed) == (len(gone), 0), tally
    assert not any(path.exists() for path in gone) and all(path.exists() for path in kept)
    run(settings, "temporary", now=later())
    assert not any(path.exists() for path in (live, live_lock, live_backup))  # their owners are gone now


def test_what_a_killed_tuning_has_left_goes(settings: Settings, tmp_path: Path) -> None:
    """Its scratch folder, unless its owner lives, and files that were not written to their end; nothing beside them."""
    tune, model = settings.home / "tune", settings.model_repository / "demo"
    gone = [old(tune / "scratch-abcd_123" / "triton.log").parent, old(tune / ".pending.json-abcd1234"),
            old(model / ".config.pbtxt-abcd1234")]  # fmt: skip
    live = old(tune / "scratch-live_123" / "x").parent
    region = tritonserver.SHM / f"{tritonserver.shm_prefix(gone[0])}test"
    region.touch()
    kept = [live, old(tune / "pending.json"), old(tune / "undo" / "demo" / "000001.json"), old(model / "config.pbtxt"),
            old(model / ".config.pbtxt-mine"), old(tune / "history" / "scratch-abcd_123" / "x").parent]  # fmt: skip
    handle = os.open(live, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert run(settings, "temporary").count == 0, "they are touched just now"
        plan = Work(dry=True, now=later())
        clean(settings, plan, ["temporary"])
        assert {item.path for item in plan.items} == {str(path) for path in gone} and region.exists()
        assert run(settings, "temporary", now=later()).count == 3
        assert not any(path.exists() for path in [*gone, region]) and all(path.exists() for path in kept)
    finally:
        os.close(handle)
        region.unlink(missing_ok=True)


def test_an_empty_staging_folder_goes_too(settings: Settings) -> None:
    """As an export leaves none behind, neither does cleaning up; a plan changes nothing."""
    staging = settings.model_repository / ".staging"
    old(staging / "demo.lock")
    run(settings, "temporary", dry=True, now=later())
    assert (staging / "demo.lock").exists()
    run(settings, "temporary", now=later())
    assert not staging.exists()


def test_orphaned_shared_memory_goes(settings: Settings) -> None:
    """Regions of this home that no process works on go once they are a minute old; another home's stay."""
    prefix = tritonserver.shm_prefix(settings.home)
    own, foreign = tritonserver.SHM / f"{prefix}orphan", tritonserver.SHM / f"truthgpt_other_{os.getpid()}"
    try:
        for region in (own, foreign):
            region.write_bytes(b"x" * 100)
        assert run(settings, "shared_memory").count == 0 and own.exists()  # it may be about to be used
        tally = run(settings, "shared_memory", now=later(120))
        assert (tally.count, tally.bytes) == (1, 100) and not own.exists() and foreign.exists()
    finally:
        for region in (own, foreign):
            region.unlink(missing_ok=True)


def test_one_that_cannot_go_stops_nothing(settings: Settings) -> None:
    """Errors are counted and told, the first twenty by name; everything else goes; at the end it has failed."""
    work = Work()
    tally = work.begin("logs")

    def refuse() -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    def busy() -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    def gone() -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    done: list[int] = []
    for number in range(100):
        work.remove(f"/bad/{number}", 1, "", refuse)
        work.remove(f"/good/{number}", 1, "", lambda number=number: done.append(number))  # type: ignore[misc]
    assert not work.remove("/mount", 1, "", busy) and not work.remove("/gone", 1, "", gone)
    assert (tally.count, tally.bytes, tally.failed, len(tally.errors), len(done)) == (100, 100, 100, ERRORS, 100)
    assert tally.errors[0] == "/bad/0: Permission denied"
    said = "100 could not be removed, the first of them /bad/0: Permission denied"
    with pytest.raises(NotClean, match=said) as caught:
        work.done(tally)
    assert caught.value.hint and caught.value.did == "100 removed, 100 bytes"


def test_an_undeletable_file(settings: Settings) -> None:
    """A real file that not even root may remove: it is told, the others go, the next target is worked on."""
    stuck = old(settings.home / "cache" / "a" / "stuck")
    others = [old(settings.home / "cache" / name) for name in ("a/x", "b/y", "z")]
    log = old(settings.home / "logs" / "x.log.1")
    if subprocess.run(["chattr", "+i", stuck], capture_output=True).returncode:
        stuck.parent.chmod(0o500)
        if os.access(stuck.parent, os.W_OK):
            pytest.skip("this file system has no immutable files, and root may write everywhere")
        others.remove(settings.home / "cache" / "a" / "x")
    try:
        cache, logs = clean(settings, Work(), ["cache", "logs"])
    finally:
        subprocess.run(["chattr", "-i", stuck], capture_output=True)
        stuck.parent.chmod(0o700)
    assert cache.failed and any("stuck: " in text for text in cache.errors) and logs.count == 1
    assert stuck.exists() and not log.exists() and not any(path.exists() for path in others)


def test_a_lost_lease_stops_before_the_next_step(settings: Settings) -> None:
    """The guard is asked before each removal: after it has refused nothing goes any more."""
    for number in range(10):
        old(settings.home / "cache" / str(number))
    allowed = iter(range(3))

    def guard() -> None:
        if next(allowed, None) is None:
            raise LeaseLost("cache")

    with pytest.raises(LeaseLost):
        run(settings, "cache", guard=guard)
    assert len(os.listdir(settings.home / "cache")) == 7


@pytest.fixture(params=["tmpfs", "ext4"])
def small(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of 4 MiB, in memory and as most disks have it."""
    folder, image = tmp_path / "small", tmp_path / "image"
    folder.mkdir()
    commands: list[list[str | Path]] = [["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder]]
    if request.param == "ext4":
        image.touch()
        os.truncate(image, 4 << 20)
        commands = [["mkfs.ext4", "-q", "-F", "-m", "0", image], ["mount", "-o", "loop", image, folder]]
    try:
        for command in commands:
            subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"a small {request.param} cannot be made and mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> None:
    """Not a byte can be written there any more."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        for size in (1 << 16, 512, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size):
                    pass
    with pytest.raises(OSError, match="No space left"):
        (folder / "more").write_bytes(b"x" * 4096)


@pytest.mark.parametrize("target", [*(name for name in TARGETS if name != "shared_memory"), "all"])
def test_a_full_disk_is_freed(small: Path, target: str) -> None:
    """Where not a byte can be written any more each target, alone and after the others, does what it is there for."""
    settings = replace(Settings(), home=small / "home", model_repository=small / "repository", audit_days=1)
    gone = {
        "logs": [old(settings.home / "logs" / "x.log.1", text="x" * 200_000)],
        "cache": [old(settings.home / "cache" / "x", text="x" * 300_000)],
        "metrics": [old(settings.home / "metrics" / "2020-01-01.jsonl")],
        "models": [old(settings.model_repository / "demo" / str(n) / "x", text="x" * 100_000).parent for n in (1, 2)],
        "temporary": [old(settings.home / "state-abcd1234")],
    }  # fmt: skip
    for number in (3, 4, 5):
        old(settings.model_repository / "demo" / str(number) / "x")
    log = AuditLog(settings.home, fingerprint_of(settings), 1000)
    for number in range(30):
        log.append([encode("generation", 1_700_000_000.0 + number, {"n": number})])
    log.close()
    clean(settings, Work(now=0.0), ["audit"])  # makes `base`, while there is room
    gone["audit"] = rotated(folder_of(settings.home))
    assert gone["audit"]
    fill(small)
    wanted = list(TARGETS) if target == "all" else [target]
    tallies = clean(settings, Work(now=later()), wanted)
    assert [tally.errors for tally in tallies] == [[]] * len(wanted)
    assert not any(path.exists() for name in wanted for path in gone.get(name, ()))
    assert all(tally.count >= len(gone.get(tally.name, ())) for tally in tallies)
    assert sorted(os.listdir(settings.model_repository / "demo"))[-3:] == ["3", "4", "5"]
    if target == "models":
        assert os.listdir(settings.model_repository) == ["demo"]


def test_paths_that_are_no_text_are_told_as_text(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name whose bytes are no UTF-8 goes like any other, and is escaped wherever it is told."""
    path = settings.home / "cache" / os.fsdecode(b"\xff\xfe")
    old(path)
    plan = Work(dry=True)
    clean(settings, plan, ["cache"])
    assert plan.items[0].path == f"{settings.home}/cache/\\xff\\xfe"
    with monkeypatch.context() as patch:

        def refuse(self: Found) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        patch.setattr(Found, "remove", refuse)
        tally = run(settings, "cache")
    assert tally.errors == [f"{settings.home}/cache/\\xff\\xfe: Permission denied"]
    assert run(settings, "cache").count == 1 and not path.exists()
    assert as_text("\ud800") == "\\ud800" and as_text("é\n") == "é\n"
