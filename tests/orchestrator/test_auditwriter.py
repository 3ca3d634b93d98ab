"""The audit log's writers: one chain over processes and files, whatever happens to them."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.auditlog import CURRENT, HEAD, AuditLogError, encode, folder_of, rotated
from orchestrator.auditwriter import AuditLog
from orchestrator.fingerprint import Fingerprint
from orchestrator.ops.auditcheck import Report, verify
from orchestrator.ops.auditread import lines

PRINTS = Fingerprint(b"k" * 32)
MAX_BYTES = 4096


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def event(number: int = 0, **fields: object) -> bytes:
    return encode("generation", 1_800_000_000.0 + number, {"n": number, **fields})


def writer(home: Path, max_bytes: int = 1 << 20) -> AuditLog:
    return AuditLog(home, PRINTS, max_bytes)


def checked(home: Path) -> Report:
    report = verify(folder_of(home), PRINTS)
    assert report.broken is None, report.broken and (report.broken.place, report.broken.why)
    return report


def rows(home: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in lines(folder_of(home))]


@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 1500), max_size=6), st.booleans()), max_size=8),
    st.integers(300, 6000),
)
def test_any_interleaving_is_one_chain(batches: list[tuple[int, list[int], bool]], max_bytes: int) -> None:
    """Three writers in any order, batches and lines of any size, rotation anywhere: every event once, in one chain.

    No file is larger than allowed unless it is a single line.
    """
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        writers = [writer(home, max_bytes) for _ in range(3)]
        sent = []
        for number, (who, sizes, sync) in enumerate(batches):
            sent += [[number, index] for index in range(len(sizes))]
            batch = [event(number, i=index, x="x" * size) for index, size in enumerate(sizes)]
            assert writers[who].append(batch) == len(batch)
            if sync:
                writers[who].sync()
        for each in writers:
            each.close()
        if sent:
            assert checked(home).lines == len(sent)
            assert [[row["n"], row["i"]] for row in rows(home)] == sent
        for path in folder_of(home).glob("*.jsonl"):
            assert path.stat().st_size <= max_bytes or path.read_bytes().count(b"\n") == 1


def test_the_files_are_their_owners_alone(home: Path) -> None:
    """Who asked for what is nobody's business: folder 0700, files 0600."""
    log = writer(home, 300)
    log.append([event(1), event(2)])
    modes = {path.name: path.stat().st_mode & 0o777 for path in [folder_of(home), *folder_of(home).iterdir()]}
    log.close()
    assert modes == {"audit": 0o700, CURRENT: 0o600, "audit-000000000001.jsonl": 0o600, HEAD: 0o600}


_APPEND = """
import sys
from pathlib import Path
from orchestrator.auditlog import encode
from orchestrator.auditwriter import AuditLog
from orchestrator.fingerprint import Fingerprint
log = AuditLog(Path(sys.argv[1]), Fingerprint(b"k" * 32), 200_000, 10.0)
batches, size, number = int(sys.argv[3]), int(sys.argv[4]), 0
while batches:
    batches -= 1
    batch = [encode("generation", 1.8e9, {"who": sys.argv[2], "n": number + i, "x": "y" * 300}) for i in range(size)]
    log.append(batch)
    number += size
    print(number, flush=True)
    log.sync()
"""


def appending(home: Path, who: str, batches: int, size: int) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", _APPEND, str(home), who, str(batches), str(size)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


def test_processes_at_once_and_one_that_is_killed(home: Path) -> None:
    """Three processes append and rotate at the same time and one of them is killed in the middle: the chain is whole.

    Nothing that a process was told is written is missing, and each one's events are in their order.
    """
    killed = appending(home, "killed", -1, 1000)  # until it is killed, nearly always while it writes
    others = [appending(home, who, 25, 20) for who in "ab"]
    assert killed.stdout is not None
    for _ in range(5):
        acknowledged = int(killed.stdout.readline())
    time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    acknowledged = max([acknowledged, *map(int, killed.stdout.read().split())])
    killed.wait()
    killed.stdout.close()
    for process in others:
        process.communicate()
        assert process.returncode == 0
    report = checked(home)
    assert report.files > 1 and report.torn_bytes == 0
    found: dict[str, list[object]] = {"a": [], "b": [], "killed": []}
    for row in rows(home):
        if row["event"] == "generation":
            found[str(row["who"])].append(row["n"])
    assert found["a"] == found["b"] == list(range(500))
    assert found["killed"] == list(range(len(found["killed"]))) and len(found["killed"]) >= acknowledged


@settings(max_examples=15)
@given(st.integers(1, 6), st.integers(1, 400), st.sampled_from([1 << 20, 600]), st.booleans())
def test_a_torn_end_is_recovered_and_said(count: int, kept: int, max_bytes: int, zeros: bool) -> None:
    """Whatever a killed writer left of its last line is no alarm; the next one cuts it off and says how much it was."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        log = writer(home, max_bytes)
        log.append([event(number, x="y" * 100) for number in range(count)])
        log.sync()
        log.append([event(99, x="y" * 300)])
        log.close()
        path = folder_of(home) / CURRENT
        *whole, last = path.read_bytes().splitlines(keepends=True)
        fragment = b"\0" * kept if zeros else last[: min(kept, len(last) - 1)]
        path.write_bytes(b"".join(whole) + fragment)
        report = checked(home)
        assert (report.lines, report.torn_bytes) == (count, len(fragment))
        following = writer(home, max_bytes)
        following.append([event(100)])
        following.close()
        report = checked(home)
        assert (report.lines, report.recovered, report.torn_bytes) == (count + 2, 1, 0)
        recovered, after = rows(home)[-2:]
        assert recovered["cut_bytes"] == len(fragment) and "missing" not in recovered and after["n"] == 100


def test_what_head_knew_and_is_gone_stays_a_hole(home: Path) -> None:
    """Lines that were on the disk and are cut off are not papered over by the next writer: the chain shows the hole."""
    log = writer(home)
    log.append([event(number) for number in range(10)])
    log.sync()
    log.close()
    path = folder_of(home) / CURRENT
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:7]))
    following = writer(home)
    following.append([event(10)])
    following.close()
    report = verify(folder_of(home), PRINTS)
    assert report.broken is not None
    assert (report.broken.place, report.broken.why) == (f"{path}:8", "lines 8 to 10 are missing before this one")
    assert rows(home)[-2]["missing"] == 3


def test_a_running_writer_knows_its_own_lines(home: Path) -> None:
    """Lines that no `head` knows yet are missed by the process that wrote them, also where `head` is removed too."""
    log = writer(home)
    log.append([event(number) for number in range(5)])
    path = folder_of(home) / CURRENT
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    (folder_of(home) / HEAD).unlink()
    log.append([event(5)])
    log.sync()
    log.close()
    report = verify(folder_of(home), PRINTS)
    assert report.broken is not None and report.broken.why == "lines 3 to 5 are missing before this one"


def test_everything_removed_but_head(home: Path) -> None:
    """Who removes all the files has not begun a new chain: it goes on from what `head` knows."""
    log = writer(home, 300)
    log.append([event(number) for number in range(5)])
    log.sync()
    log.close()
    for path in folder_of(home).glob("*.jsonl"):
        path.unlink()
    following = writer(home)
    following.append([event(9)])
    following.close()
    report = verify(folder_of(home), PRINTS)
    assert report.broken is not None and "begins with line 6" in report.broken.why


def test_a_changed_last_line_is_kept_and_left_behind(home: Path) -> None:
    """A writer that finds the last line changed goes on from `head` and leaves the evidence where it is."""
    log = writer(home)
    log.append([event(number) for number in range(3)])
    log.sync()
    log.close()
    path = folder_of(home) / CURRENT
    path.write_bytes(path.read_bytes().replace(b'"n":2', b'"n":7'))
    following = writer(home)
    following.append([event(3)])
    following.close()
    report = verify(folder_of(home), PRINTS)
    assert report.broken is not None and report.broken.place == f"{path}:3"
    assert rows(home)[-2]["last_line_spoilt"] is True and rows(home)[-1]["n"] == 3


def test_another_key_is_refused_and_changes_nothing(home: Path) -> None:
    """Lines of another key are neither cut nor continued: the chain could never be checked again."""
    log = writer(home)
    log.append([event(1)])
    log.close()
    before = (folder_of(home) / CURRENT).read_bytes()
    other = AuditLog(home, Fingerprint(b"another"), MAX_BYTES)
    for _ in range(2):
        with pytest.raises(AuditLogError, match="another audit key"):
            other.append([event(2)])
    other.close()
    assert (folder_of(home) / CURRENT).read_bytes() == before
    checked(home)


def test_a_crash_between_moving_a_file_and_the_next_line(home: Path) -> None:
    """A file that was moved aside when its successor was not there yet is continued."""
    log = writer(home)
    log.append([event(number) for number in range(3)])
    log.sync()
    log.close()
    os.rename(folder_of(home) / CURRENT, folder_of(home) / "audit-000000000001.jsonl")
    following = writer(home)
    following.append([event(3)])
    following.close()
    assert checked(home).lines == 4 and len(rotated(folder_of(home))) == 1


def test_a_suspended_writer_holds_up_nobody_for_long(home: Path) -> None:
    """Where the lock is not given back, a writer says so after its time-out, and goes on as soon as it is."""
    log = AuditLog(home, PRINTS, MAX_BYTES, lock_s=0.05)
    log.append([event(1)])
    with (folder_of(home) / HEAD).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="another writer"):
            log.append([event(2)])
    log.append([event(3)])
    log.close()
    assert [row["n"] for row in rows(home)] == [1, 3]


_FULL = """
import resource, signal, sys
from pathlib import Path
from orchestrator.auditlog import encode
from orchestrator.auditwriter import AuditLog
from orchestrator.fingerprint import Fingerprint
log = AuditLog(Path(sys.argv[1]), Fingerprint(b"k" * 32), 1 << 20)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
event = encode("generation", 1.8e9, {"x": "y" * 100})
log.append([event])
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
try:
    log.append([event] * 30)
except OSError as error:
    print("refused", error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(log.append([event] * 30))
log.sync()
"""


def test_a_batch_that_finds_no_room_leaves_nothing_of_it(home: Path) -> None:
    """A write that the system cuts short in the middle of a batch is taken back whole, and repeated without a gap."""
    done = subprocess.run([sys.executable, "-c", _FULL, str(home)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["refused 27", "30"]  # EFBIG
    report = checked(home)
    assert (report.lines, report.recovered) == (31, 0)


def test_a_file_that_cannot_be_begun_is_an_error_and_no_end(tmp_path: Path) -> None:
    """Where a rotation finds no file descriptor for the new file, what was written stays counted, syncing raises
    OSError, and the chain goes on once there is one.
    """
    log = writer(tmp_path, 600)
    assert log.append([event(0)]) == 1
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    batch = [event(number) for number in range(1, 9)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))  # what is open stays open
    try:
        done = log.append(batch)
        with pytest.raises(OSError, match="is not open"):
            log.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert 0 < done < 8 and log.append(batch[done:]) == 8 - done
    log.sync()
    log.close()
    assert [row["n"] for row in rows(tmp_path)] == list(range(9)) and checked(tmp_path).recovered == 0
