"""Retention of the audit log: what is old goes, and the chain can be checked all the same, by nobody but its owner."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from orchestrator.audit import fingerprint_of
from orchestrator.auditlog import (
    BASE,
    CURRENT,
    Mark,
    encode,
    folder_of,
    mark_text,
    read_base,
    rotated,
)
from orchestrator.auditwriter import AuditLog
from orchestrator.fingerprint import Fingerprint
from orchestrator.ops import auditretention
from orchestrator.ops.auditcheck import Report, verify
from orchestrator.ops.auditread import Wanted, lines, tail
from orchestrator.ops.cleanup import clean
from orchestrator.ops.cleanwork import Tally, Work
from orchestrator.settings import Settings
from tests.disks import small_disk

DAY_S = 86_400.0
BEGAN = 1_800_000_000.0
LINES = 24


def write(settings: Settings, count: int, at: float, per_file: int = 1000) -> None:
    prints = fingerprint_of(settings)
    log = AuditLog(settings.home, prints, per_file)
    for number in range(count):
        log.append([encode("generation", at + number * DAY_S, {"n": number, "model": "m"})])
    log.sync()
    log.close()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A log of a line a day, some four lines a file, on a deployment that keeps ten days."""
    made = replace(Settings(), home=tmp_path / "home", audit_days=10)
    write(made, LINES, BEGAN)
    return made


def retain(settings: Settings, day: float, **more: object) -> Tally:
    """Retention as it is so many days after the first line."""
    (tally,) = clean(settings, Work(now=BEGAN + day * DAY_S, **more), ["audit"])  # type: ignore[arg-type]
    return tally


def check(settings: Settings, **more: object) -> Report:
    return verify(folder_of(settings.home), fingerprint_of(settings), **more)  # type: ignore[arg-type]


def names(settings: Settings) -> list[str]:
    return [path.name for path in rotated(folder_of(settings.home))]


def last_of(path: Path) -> int:
    return int(json.loads(path.read_bytes().splitlines()[-1])["seq"])


def test_old_files_go_and_the_rest_verifies(settings: Settings) -> None:
    """Whole files whose last line is older than audit_days go; verify needs nothing to begin behind them."""
    folder, before = folder_of(settings.home), names(settings)
    ends = [last_of(path) for path in rotated(folder)]
    expected = [end for end in ends if end - 1 < 20.5 - 10]  # line n was written on day n - 1
    assert 0 < len(expected) < len(before)
    tally = retain(settings, 20.5)
    assert (tally.count, tally.failed, tally.notes) == (len(expected), 0, [])
    assert names(settings) == before[len(expected) :]
    report = check(settings)
    assert report.broken is None and report.base is not None and report.base.seq == expected[-1]
    assert report.first == expected[-1] + 1 and report.last.seq == LINES + 1  # the removal itself is in the log
    (row,) = tail(folder, 1, Wanted())
    assert row["operation"] == "audit retention"
    assert row["detail"] == f"lines 1 to {expected[-1]}, older than 10 days"


def test_it_goes_on_day_by_day(settings: Settings) -> None:
    """Every day a bit more goes, and on every day the log verifies; the file that is written never goes."""
    for day in range(0, 60, 3):
        assert retain(settings, day).failed == 0
        report = check(settings)
        assert report.broken is None, report.broken
    assert names(settings) == [] or len(names(settings)) <= 2
    assert (folder_of(settings.home) / CURRENT).stat().st_size > 0
    assert check(settings).base == check(settings).base != Mark()


def test_nothing_goes_by_itself(settings: Settings) -> None:
    """With audit_days 0, before its time, and as a plan, not a byte is changed."""
    folder = folder_of(settings.home)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert retain(replace(settings, audit_days=0), 1000).count == 0
    plan = retain(settings, 1000, dry=True)
    assert plan.count == len(names(settings)) > 3
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert retain(settings, 5).count == 0 and names(settings) == sorted(n for n in before if n.startswith("audit-"))


def test_the_newest_file_stays_while_the_current_one_is_empty(settings: Settings) -> None:
    """A crash after a rotation leaves an empty current file: the chain's end is in the file before, which stays."""
    folder = folder_of(settings.home)
    current = folder / CURRENT
    current.rename(folder / f"audit-{json.loads(current.read_bytes().splitlines()[0])['seq']:012d}.jsonl")
    for content in (None, b"", b'{"seq":25,"prev":"'):  # the last one is what a killed writer has left
        if content is not None:
            current.write_bytes(content)
        plan = retain(settings, 1000, dry=True)
        assert plan.count == len(names(settings)) - 1
    retain(settings, 1000)
    report = check(settings)
    assert report.broken is None
    rows = [row for row in tail(folder, 10, Wanted()) if row["event"] == "recovered"]
    assert [(row["cut_bytes"], row.get("missing")) for row in rows] == [(18, None)]  # the half line, and no other


@pytest.mark.parametrize("what", ["missing", "forged", "another key", "cut off", "older", "from head"])
def test_a_base_that_is_none_vouches_for_nothing(settings: Settings, what: str) -> None:
    """Without a genuine `base` a log without its beginning is broken, and retention touches it no more."""
    folder, prints = folder_of(settings.home), fingerprint_of(settings)
    retain(settings, 15)
    early = (folder / BASE).read_bytes()
    retain(settings, 25)
    base = read_base(folder, prints)
    assert base is not None and check(settings).broken is None
    first = rotated(folder)[0]
    forged = {
        "missing": None,
        "forged": mark_text(base, prints, BASE).replace(str(base.seq), str(base.seq + 1)).encode(),
        "another key": mark_text(base, Fingerprint(b"another"), BASE).encode(),
        "cut off": (folder / BASE).read_bytes()[:50],
        "older": early,  # a genuine one of another day
        "from head": mark_text(base, prints).encode(),  # what head holds is no base
    }[what]
    (folder / BASE).unlink()
    if forged is not None:
        (folder / BASE).write_bytes(forged)
    report = check(settings)
    begins = 1 if what != "older" else read_base(folder, prints).seq + 1  # type: ignore[union-attr]
    assert report.broken is not None and report.broken.place == f"{first}:1"
    assert report.broken.why == f"the chain begins with line {base.seq + 1} instead of {begins}"
    before = names(settings)
    assert retain(settings, 1000).failed == 1 and names(settings) == before
    # and who knows where it begins can say so, as ever
    assert check(settings, first=base.seq + 1).broken is None


def test_a_base_that_was_removed_is_not_made_anew(settings: Settings) -> None:
    """Long before anything is to go, too: as verify does, retention says that the log has lost its beginning."""
    folder = folder_of(settings.home)
    retain(settings, 20)
    (folder / BASE).unlink()
    for dry in (True, False):
        tally = retain(settings, 0, dry=dry)
        assert tally.failed == 1 and f"{rotated(folder)[0]}:1: the chain begins with line " in tally.errors[0]
        assert not (folder / BASE).exists()
    broken = check(settings).broken
    assert broken is not None and f"{broken.place}: {broken.why}" in tally.errors[0]


def test_a_removal_by_somebody_else_is_found(settings: Settings) -> None:
    """Who removes a file beyond what retention has removed, or lines of it, cannot hide it behind `base`."""
    retain(settings, 15)
    folder = folder_of(settings.home)
    rotated(folder)[0].unlink()
    report = check(settings)
    assert report.broken is not None and "the chain begins with line" in report.broken.why
    for path in (*rotated(folder), folder / CURRENT):  # all of it, and a `head` of an earlier day that knows no more
        path.unlink()
    (folder / CURRENT).touch()
    base = read_base(folder, fingerprint_of(settings))
    assert base is not None
    (folder / "head").write_text(mark_text(base, fingerprint_of(settings)))
    report = check(settings)
    assert report.broken is not None and "no line follows line" in report.broken.why


def test_a_mark_from_before_retention_still_holds(settings: Settings) -> None:
    """A mark of a line that is there is demanded; one of the very last line that went is compared with `base`."""
    known = check(settings).last
    retain(settings, 20)
    base = read_base(folder_of(settings.home), fingerprint_of(settings))
    assert base is not None
    assert check(settings, known=known).broken is None and check(settings, known=base).broken is None
    assert check(settings, known=Mark(base.seq, "0" * 32)).broken is not None
    assert check(settings, known=Mark(known.seq, "0" * 32)).broken is not None


def test_a_crash_between_base_and_removal_is_fine(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed when `base` was written and the file still there: the log verifies, and the next time removes it."""
    before = names(settings)

    def killed(self: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            retain(settings, 1000)
    assert names(settings) == before
    report = check(settings)
    assert report.broken is None and report.first == last_of(rotated(folder_of(settings.home))[0]) + 1
    assert retain(settings, 1000).count == len(before) and names(settings) == []
    assert check(settings).broken is None


def test_what_does_not_verify_stays(settings: Settings) -> None:
    """A file that somebody has changed is evidence: it and all after it stay, what was good before it goes."""
    changed = rotated(folder_of(settings.home))[2]
    before = names(settings)
    changed.write_bytes(changed.read_bytes().replace(b'"model":"m"', b'"model":"n"', 1))
    tally = retain(settings, 1000)
    assert tally.count == 2 and tally.failed == 1 and f"{changed}:1: the line was changed" in tally.errors[0]
    assert names(settings) == before[2:]
    report = check(settings)
    assert report.broken is not None and report.broken.place == f"{changed}:1"


def test_two_at_once_are_one_after_the_other(settings: Settings) -> None:
    """While one removes files another one refuses, so that `base` never goes back."""
    fd = os.open(folder_of(settings.home), os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        tally = retain(settings, 1000)
        assert tally.failed == 1 and "another command is removing files" in tally.errors[0]
    finally:
        os.close(fd)
    assert retain(settings, 1000).failed == 0


def test_it_goes_on_while_lines_are_written(settings: Settings) -> None:
    """Retention between the lines of a writer: none is lost, none counts as recovered, and readers see no hole."""
    prints, at = fingerprint_of(settings), BEGAN + LINES * DAY_S
    log = AuditLog(settings.home, prints, 1000)
    for number in range(40):
        log.append([encode("generation", at + number * DAY_S, {"n": number})])
        if number % 5 == 0:
            assert retain(settings, LINES + number).failed == 0
            assert check(settings).broken is None
    log.sync()
    log.close()
    report = check(settings)
    assert report.broken is None and report.recovered == 0
    assert sum(1 for _ in lines(folder_of(settings.home))) == report.lines


@hypothesis_settings(max_examples=25)
@given(days=st.lists(st.floats(0, 80), min_size=1, max_size=4), per_file=st.integers(400, 3000))
def test_however_often_it_runs_the_log_verifies(
    tmp_path_factory: pytest.TempPathFactory, days: list[float], per_file: int
) -> None:
    """Whatever the files' sizes and the days on which it runs, also backwards: the chain holds, nothing young goes."""
    settings = replace(Settings(), home=tmp_path_factory.mktemp("home"), audit_days=10)
    write(settings, LINES, BEGAN, per_file)
    for day in days:
        assert retain(settings, day).failed == 0
        report = check(settings)
        assert report.broken is None
        assert report.first <= max(0, max(days) - 10) + 2


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    with small_disk(tmp_path / "small", "1m") as folder:
        yield folder


def test_a_full_disk_is_freed(small: Path) -> None:
    """Where `base` is there already it is overwritten when not a byte is free: files go, and the chain holds."""
    settings = replace(Settings(), home=small / "home", audit_days=10)
    write(settings, 400, BEGAN, 8000)
    assert retain(settings, 0).count == 0  # makes `base`, while there is room
    with pytest.raises(OSError) as full:
        (small / "ballast").write_bytes(b"x" * 2_000_000)
    assert full.value.errno == errno.ENOSPC
    with pytest.raises(OSError):
        auditretention._replace(folder_of(settings.home), b"x" * 87)
    before = len(names(settings))
    tally = retain(settings, 1000)
    assert tally.failed == 0 and tally.count == before > 5 and names(settings) == []
    (small / "ballast").unlink()
    report = check(settings)
    assert report.broken is None and report.base is not None
    assert sorted(os.listdir(folder_of(settings.home)))[-1] == "head" and len(os.listdir(folder_of(settings.home))) <= 4


def test_a_full_disk_without_a_base_loses_nothing(small: Path) -> None:
    """Where `base` cannot even be made nothing is removed; after something else has been freed it is."""
    settings = replace(Settings(), home=small / "home", audit_days=10)
    write(settings, 100, BEGAN, 8000)
    with pytest.raises(OSError):
        (small / "ballast").write_bytes(b"x" * 2_000_000)
    before = names(settings)
    tally = retain(settings, 1000)
    assert tally.failed >= 1 and names(settings) == before and check(settings).broken is None
    (small / "ballast").unlink()
    assert retain(settings, 1000).failed == 0 and names(settings) == []
