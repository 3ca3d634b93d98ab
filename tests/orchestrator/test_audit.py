"""The audit log's sink: it never waits, loses nothing silently, and says how it is."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from orchestrator import audit
from orchestrator.audit import Audit, AuditKeyError, AuditLogError
from orchestrator.auditlog import CURRENT, HEAD, folder_of
from orchestrator.auditwriter import AuditLog
from orchestrator.fingerprint import KEY_FILE, Fingerprint
from orchestrator.ops.auditcheck import Report, verify
from orchestrator.ops.auditread import lines
from orchestrator.settings import Settings
from tests.clock import awake
from tests.disks import small_disk
from tests.e2e.stack import free_ports

from .conftest import serving
from .fake_triton import FakeTriton
from .test_auditevents import INCIDENT, RECORD

PRINTS = Fingerprint(b"k" * 32)


def sink(home: Path, lock_s: float = 1.0, **options: Any) -> Audit:
    made = Audit(AuditLog(home, PRINTS, 1 << 20, lock_s), PRINTS, **options)
    made.start()
    return made


def rows(home: Path, event: str = "") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in lines(folder_of(home))]
    return [row for row in found if event in ("", row["event"])]


def checked(home: Path, prints: Fingerprint = PRINTS) -> Report:
    report = verify(folder_of(home), prints)
    assert report.broken is None, (report.broken.place, report.broken.why)
    return report


def until(holds: Callable[[], object], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


def test_everything_that_was_handed_over_is_written_in_order(tmp_path: Path) -> None:
    """An ordinary end writes all that waits, more than one batch of it, between `start` and `stop`."""
    made = sink(tmp_path)
    for number in range(1000):
        made.record(replace(RECORD, prompt_tokens=number))
    made.close()
    assert [row["prompt_tokens"] for row in rows(tmp_path, "generation")] == list(range(1000))
    events = [row["event"] for row in rows(tmp_path)]
    assert events[0] == "start" and events[-2:] == ["performance", "stop"] and rows(tmp_path)[-1]["lost"] == 0
    assert rows(tmp_path, "performance")[0]["requests"] == 1000
    report = checked(tmp_path)
    assert report.unfinished == 0 and report.head == report.last
    assert (made.state, made.reason, made.lost_total) == ("ok", "", 0)


def test_a_flood_does_not_fill_the_disk(tmp_path: Path) -> None:
    """Of 20,000 wrong keys some hundred lines are written and the rest is counted; what administrators do always is."""
    made = sink(tmp_path)
    for number in range(20_000):
        made.incident(INCIDENT)
        if number % 100 == 0:
            made.incident(replace(INCIDENT, kind="admin"))
            made.record(replace(RECORD, outcome="error", error="rate_limited"))
    made.close()
    security = rows(tmp_path, "security")
    written = [row for row in security if row.get("kind") == "unauthenticated" and "only_counted" not in row]
    counted = {row["kind"]: row["only_counted"] for row in security if "only_counted" in row}
    assert 100 <= len(written) < 300 and counted["unauthenticated"] == 20_000 - len(written)
    assert sum(row.get("kind") == "admin" for row in security) == 200
    assert rows(tmp_path, "performance")[0]["errors"] == 200
    assert made.lost_total == 0


def test_a_sink_that_cannot_write_holds_up_nobody_and_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While the lock is not to be had, handing over takes microseconds, what is too much is counted, and both changes
    of state are one line in the log; afterwards the chain says how much was lost.
    """
    caplog.set_level(logging.WARNING, "orchestrator.audit")
    folder_of(tmp_path).mkdir()
    (folder_of(tmp_path) / HEAD).touch(0o600)
    with (folder_of(tmp_path) / HEAD).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        made = sink(tmp_path, lock_s=0.01, queued=100)
        until(lambda: made.state == "degraded")
        took = []
        for _ in range(500):
            began = awake()
            made.record(RECORD)
            took.append(awake() - began)
        assert sorted(took)[-5] < 0.005  # a busy machine may hold up one or two
        assert "another writer" in made.reason and 250 <= made.lost_total <= 400
        assert made.health() == {"state": "degraded", "reason": made.reason, "lost": made.lost_total}
    until(lambda: made.state == "ok")
    made.record(RECORD)
    made.close()
    (lost,) = rows(tmp_path, "lost")
    assert lost["count"] == made.lost_total and len(rows(tmp_path, "generation")) == 501 - made.lost_total
    assert checked(tmp_path).lost == made.lost_total
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    with small_disk(tmp_path / "small", "1m") as folder:
        yield folder


def test_a_full_disk(small: Path) -> None:
    """A file system that is full degrades visibly; what it had no room for waits, and is written once there is room."""
    ballast = small / "ballast"
    ballast.write_bytes(b"x" * 950_000)
    made = sink(small)
    for _ in range(400):
        made.record(RECORD)
    until(lambda: made.state == "degraded")
    assert made.reason == "No space left on device" and made.lost_total == 0
    until(lambda: checked(small).lines > 50)  # as many as there is room for, none of them torn
    ballast.unlink()
    until(lambda: made.state == "ok")
    made.close()
    assert len(rows(small, "generation")) == 400
    report = checked(small)
    assert (report.lost, report.recovered, report.unfinished) == (0, 0, 0)


_LIMITED = """
import resource, signal, sys, time
from pathlib import Path
from orchestrator.audit import Audit
from orchestrator.auditwriter import AuditLog
from orchestrator.fingerprint import Fingerprint
from orchestrator.domain import Record
RECORD = Record(
    id="r1", caller="k2", tenant="acme", operation="generate", task="text_generation", model="demo", stream=True,
    outcome="ok", error=None, finish_reason="stop", prompt_tokens=3, completion_tokens=5, accepted=1.8e9, ttft_s=0.01,
    duration_s=0.25, traceparent=None,
)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
prints = Fingerprint(b"k" * 32)
audit = Audit(AuditLog(Path(sys.argv[1]), prints, 1 << 30), prints, queued=1000)
audit.start()
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
def until(state):
    while audit.state != state:
        time.sleep(0.01)
limit(20_000)
for _ in range(3000):
    audit.record(RECORD)
until("degraded")
print(audit.reason, audit.lost_total)
limit(resource.RLIM_INFINITY)
until("ok")
audit.close(10)
print(audit.lost_total)
"""


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The same where no file system can be mounted: what fits into the queue is written later, the rest is counted."""
    argv = [sys.executable, "-c", _LIMITED, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    first, last = done.stdout.splitlines()
    assert first.startswith("File too large ")
    report = checked(tmp_path)
    assert report.lost == int(last) > 0
    assert len(rows(tmp_path, "generation")) == 3000 - int(last)


def test_what_cannot_be_made_keeps_no_other_from_being_written(tmp_path: Path) -> None:
    """An event that is a fault of ours is counted as lost; those around it are in the log."""
    made = sink(tmp_path)
    made.record(RECORD)
    made.record(replace(RECORD, duration_s=None))  # type: ignore[arg-type]
    made.record(RECORD)
    made.close()
    assert len(rows(tmp_path, "generation")) == 2 and made.lost_total == 1
    assert checked(tmp_path).lost == 1


def test_an_end_that_cannot_write_says_what_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Closing waits no longer than it is told, and the log says how many events are not in the chain."""
    folder_of(tmp_path).mkdir()
    (folder_of(tmp_path) / HEAD).touch(0o600)
    with (folder_of(tmp_path) / HEAD).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        made = sink(tmp_path, lock_s=0.05)
        for _ in range(7):
            made.record(RECORD)
        began = awake()
        made.close(1.0)
        assert awake() - began < 1.5
    assert "the audit log ends without 8 events" in caplog.text  # and one of its own


class Stingy(AuditLog):
    """Has room for so many more writes."""

    writes = 0

    def append(self, events: Sequence[bytes]) -> int:
        if not self.writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.writes -= 1
        return super().append(events)


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_an_end_that_cannot_write_counts_all(tmp_path: Path, caplog: pytest.LogCaptureFixture, writes: int) -> None:
    """What waits, what found no room and what of a flood was only counted: an event that is not in the chain, and that
    no line there tells of, is in the number that the log ends with.
    """
    stingy = Stingy(tmp_path, PRINTS, 1 << 20)
    made = Audit(stingy, PRINTS, queued=100)
    made.start()
    until(lambda: made.state == "degraded")
    for _ in range(500):
        made.incident(replace(INCIDENT, kind="admin"))
        made.incident(INCIDENT)
    stingy.writes = writes
    made.close()
    there = rows(tmp_path) if writes else []
    told = sum(
        row.get("count", 0) - 1 for row in there if row["event"] == "lost"
    )  # itself is none that was handed over
    assert (told > 0) == (writes == 2)
    assert f"the audit log ends without {1001 - len(there) - told} events" in caplog.text


def test_a_process_that_was_killed_is_known_to_have_been(tmp_path: Path) -> None:
    """After kill -9 there is a `start` without a `stop`: what the process still held is lost, and that is seen."""
    code = (
        "import sys, time; from pathlib import Path; from orchestrator.audit import *\n"
        "from orchestrator.auditwriter import AuditLog; from orchestrator.fingerprint import Fingerprint\n"
        "prints = Fingerprint(b'k' * 32); Audit(AuditLog(Path(sys.argv[1]), prints, 1 << 20), prints).start()\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    until(lambda: (folder_of(tmp_path) / CURRENT).exists() and rows(tmp_path, "start"))
    assert (checked(tmp_path).unfinished, checked(tmp_path).running) == (1, 1)
    process.kill()
    process.communicate()
    assert (checked(tmp_path).unfinished, checked(tmp_path).running) == (1, 0)


def test_handing_over_is_cheap(tmp_path: Path) -> None:
    """Handing a request over costs the event loop's thread microseconds, whatever writing it costs another."""
    made = Audit(AuditLog(tmp_path, PRINTS, 1 << 20), PRINTS)

    def spent_s() -> float:
        began = time.thread_time()
        for _ in range(250):
            made.record(RECORD)
        return (time.thread_time() - began) / 250

    assert min(spent_s() for _ in range(20)) < 20e-6


def test_a_log_of_another_key_is_found_at_the_start(tmp_path: Path) -> None:
    """A key that is not the log's stops a gateway before it serves; a lost key is not replaced where there is a log."""
    settings = replace(Settings(), home=tmp_path, audit_key="the first key, long enough")
    made = audit.start(settings)
    assert made is not None
    made.close()
    audit.check(settings)
    with pytest.raises(AuditLogError, match="another audit key"):
        audit.check(replace(settings, audit_key="another key, long enough"))
    with pytest.raises(AuditKeyError, match="there is no key"):
        audit.check(replace(settings, audit_key=None))
    assert not (tmp_path / KEY_FILE).exists()
    audit.check(replace(settings, audit_key=None, audit=False))


async def test_requests_and_incidents_of_the_real_application(fake: FakeTriton, tmp_path: Path) -> None:
    """A request leaves its generation, an unknown path its error, a wrong key its security event, and none the text."""
    async with serving(fake, audit=True, home=tmp_path) as stack:
        prompt = "el secreto de la casa"
        await stack.post("/v1/completions", {"model": "m", "prompt": prompt}, **{"x-request-id": "req-1"})
        await stack.post("/v1/completions", {"model": "m", "prompt": "javascript:alert(1)" * 1000})
        await stack.get("/nowhere")
        _, health, _ = await stack.get("/health")
        assert health["audit"] == {"state": "ok", "reason": None, "lost": 0}
    prints = audit.fingerprint_of(replace(Settings(), home=tmp_path), create=False)
    checked(tmp_path, prints)
    generation = rows(tmp_path, "generation")[0]
    assert (generation["id"], generation["outcome"], generation["edge"]) == ("req-1", "ok", "openai")
    assert generation["input_hash"] == prints.text(prompt) and generation["caller"] == prints.caller("ip-127.0.0.1")
    assert generation["output_chars"] == len("Hola, ¿qué tal?")
    (unknown,) = rows(tmp_path, "error")
    assert unknown["address"] == generation["caller"]
    for path in [tmp_path, *tmp_path.rglob("*")]:
        assert path.is_dir() or prompt.encode() not in path.read_bytes()


@pytest.mark.slow
async def test_a_stop_of_two_workers_loses_nothing(fake: FakeTriton, tmp_path: Path) -> None:
    """Told to end at once after its last answers, a gateway of two workers has every one of them in one chain."""
    port, ops = free_ports(2)
    settings = replace(
        Settings(), home=tmp_path, http_port=port, ops_port=ops, triton_http_port=fake.port, workers=2, grpc=False,
        heartbeat_interval_s=0.05, drain_s=1.0,
    )  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "orchestrator.app", stderr=log, env={**os.environ, **settings.child_environ()}
        )
    sent = 0
    async with aiohttp.ClientSession() as http:
        for _ in range(200):
            try:
                async with http.get(f"http://127.0.0.1:{port}/health/ready") as answer:
                    if answer.status == 200:
                        break
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)
        while sent < 60 or len({row["pid"] for row in rows(tmp_path, "start")}) < 3:
            async with http.post(f"http://127.0.0.1:{ops}/v2/repository/index") as answer:
                assert answer.status == 401
            body, closing = {"model": "m", "prompt": f"número {sent}"}, {"connection": "close"}
            async with http.post(f"http://127.0.0.1:{port}/v1/completions", json=body, headers=closing) as answer:
                assert answer.status == 200, await answer.text()
            sent += 1
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 15) == 0
    report = checked(tmp_path, audit.fingerprint_of(settings, create=False))
    assert report.unfinished == 0 and len(rows(tmp_path, "stop")) == 3  # and the parent's admin port
    assert len(rows(tmp_path, "generation")) == sent
    assert any(row.get("kind") == "unauthenticated" for row in rows(tmp_path, "security"))
