"""The gateway's processes: what each signal and each death does to clients and to the other processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import redis

from orchestrator import audit, parent, upkeep
from orchestrator.auditlog import folder_of
from orchestrator.local import process
from orchestrator.logwriter import COLLECT_S
from orchestrator.ops.auditcheck import verify
from orchestrator.ops.auditread import lines
from orchestrator.parent import Parent, backoff_s
from orchestrator.server import BindError, listen, reserve
from orchestrator.settings import Settings
from orchestrator.store import JOBS
from tests.clock import awake
from tests.e2e.stack import free_ports
from tests.redis import RealRedis

from .conftest import until


@dataclass
class Gateway:
    """`python -m orchestrator.parent` with two workers, no Triton and no Redis."""

    process: subprocess.Popen[bytes]
    port: int
    ops: int
    log: Path

    @property
    def workers(self) -> dict[int, psutil.Process]:
        return {child.pid: child for child in psutil.Process(self.process.pid).children()}

    def connect(self) -> HTTPConnection:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=15)
        connection.connect()
        return connection

    def served_by(self, *connections: HTTPConnection) -> list[int]:
        """The pids of the workers that have accepted these connections."""
        assert all(map(alive, connections))
        pid_of = {
            held.raddr.port: worker.pid
            for worker in self.workers.values()
            for held in worker.net_connections("tcp")
            if held.raddr
        }
        return [pid_of[connection.sock.getsockname()[1]] for connection in connections]

    def connect_to_each(self) -> dict[int, HTTPConnection]:
        """A connection to each of the two workers."""
        found: dict[int, HTTPConnection] = {}
        deadline = time.monotonic() + 20
        while len(found) < 2:
            assert time.monotonic() < deadline, self.log.read_text()
            connection = self.connect()
            (pid,) = self.served_by(connection)
            if found.setdefault(pid, connection) is not connection:
                connection.close()
        return found


def alive(connection: HTTPConnection) -> bool:
    connection.request("GET", "/health/live")
    with connection.getresponse() as answer:
        return bool(json.loads(answer.read())["live"]) and answer.status == 200


@contextlib.contextmanager
def running(folder: Path, **changes: Any) -> Iterator[Gateway]:
    port, ops, grpc = free_ports(3)
    ports = {"http_port": port, "ops_port": ops, "grpc_port": grpc}
    settings = replace(Settings(), home=folder, workers=2, drain_s=1.0, **ports, **changes)
    environ = {**os.environ, **settings.child_environ()}
    log = folder / "log"
    with log.open("ab") as output:
        argv = [sys.executable, "-m", "orchestrator.parent"]
        started = subprocess.Popen(argv, env=environ, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + 20
        while b"listening on" not in log.read_bytes():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield Gateway(started, port, ops, log)
    finally:
        process.kill_group(started.pid)
        started.wait()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running(tmp_path_factory.mktemp("gateway")) as started:
        yield started


def test_connections_spread_over_the_workers(gateway: Gateway) -> None:
    """Both workers get a fair share of the connections."""
    for connection in gateway.connect_to_each().values():
        connection.close()
    connections = [gateway.connect() for _ in range(60)]
    pids = gateway.served_by(*connections)
    assert min(pids.count(pid) for pid in gateway.workers) > 10
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("sign", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_worker_that_ends_under_load_is_replaced(gateway: Gateway, sign: signal.Signals) -> None:
    """The other's connections go on, no new connection is refused, and what was connected meanwhile is answered."""
    kept = gateway.connect_to_each()
    victim, other = kept
    answered: list[bool] = []
    broken: list[Exception] = []  # whose worker was killed between accepting and answering
    refused: list[Exception] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            try:
                connection = gateway.connect()
            except OSError as error:
                refused.append(error)
                return
            with contextlib.closing(connection):
                try:
                    answered.append(alive(connection))
                except (OSError, HTTPException) as error:
                    broken.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.2)
        os.kill(victim, sign)
        deadline = time.monotonic() + 20
        while victim in gateway.workers or len(gateway.workers) < 2:
            assert time.monotonic() < deadline, gateway.log.read_text()
            assert alive(kept[other])
        fresh = gateway.connect_to_each()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for connection in (*kept.values(), *fresh.values()):
        connection.close()
    assert victim not in fresh and other in fresh
    assert refused == []
    assert all(answered) and len(answered) > 50
    assert len(broken) <= (4 if sign is signal.SIGKILL else 0), broken


def test_grpc_is_shared_by_the_workers_and_by_nobody_else(gateway: Gateway) -> None:
    """Both workers get connections on the one gRPC port; a second gateway with that port in common is refused."""

    def listened(worker: psutil.Process) -> set[int]:
        return {c.laddr.port for c in worker.net_connections("tcp") if c.status == psutil.CONN_LISTEN}

    for connection in gateway.connect_to_each().values():  # both are up
        connection.close()
    (port,) = set.intersection(*map(listened, gateway.workers.values())) - {gateway.port}
    own = (("grpc.use_local_subchannel_pool", 1),)  # a connection each
    channels = [grpc.insecure_channel(f"127.0.0.1:{port}", own) for _ in range(24)]
    for channel in channels:
        assert channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=10) == b"\x08\x01"
    for worker in gateway.workers.values():
        assert [c for c in worker.net_connections("tcp") if c.raddr and c.laddr.port == port]
    for channel in channels:
        channel.close()
    with pytest.raises(BindError, match=f"grpc://127.0.0.1:{port}: address already in use"):
        reserve("127.0.0.1", port)


def test_the_admin_application_is_beside_the_workers(gateway: Gateway) -> None:
    """The ops port answers from the parent, and to admin keys alone."""
    connection = HTTPConnection("127.0.0.1", gateway.ops, timeout=15)
    connection.request("POST", "/v2/repository/index")
    with contextlib.closing(connection), connection.getresponse() as answer:
        assert answer.status == 401
    owners = [one for one in psutil.Process(gateway.process.pid).net_connections("tcp") if one.status == "LISTEN"]
    assert gateway.ops in {one.laddr.port for one in owners}


def test_log_lines_name_their_worker(gateway: Gateway) -> None:
    """Every process writes JSON lines to the same stream; a worker's have its number, the parent's have none."""
    for connection in gateway.connect_to_each().values():
        connection.request("POST", "/v1/completions", json.dumps({"model": "m", "prompt": "Hola"}))
        connection.getresponse().close()
        connection.close()
    wanted, deadline = {1, 2}, time.monotonic() + 5.0
    while True:  # a line is written a moment after its answer
        lines = [json.loads(line) for line in gateway.log.read_text().splitlines()]
        if {line.get("worker") for line in lines if line["message"] == "request"} == wanted:
            break
        assert time.monotonic() < deadline, lines
        time.sleep(0.02)
    assert [line for line in lines if line["message"].startswith("listening on") and "worker" not in line]


def test_all_processes_write_one_audit_log(gateway: Gateway) -> None:
    """What two workers and the admin application saw is in one chain, also after workers were killed."""
    for connection in gateway.connect_to_each().values():
        connection.request("POST", "/v1/completions", json.dumps({"model": "m", "prompt": "Hola"}))
        connection.getresponse().close()
        connection.close()
    home, deadline = gateway.log.parent, time.monotonic() + 5.0
    prints = audit.fingerprint_of(replace(Settings(), home=home), create=False)
    while True:  # an event is written a moment after it
        rows = [json.loads(line) for line in lines(folder_of(home))]
        if sum(row["event"] == "error" for row in rows) >= 2:
            break
        assert time.monotonic() < deadline, rows
        time.sleep(0.02)
    assert len({row["pid"] for row in rows if row["event"] == "start"}) >= 3
    report = verify(folder_of(home), prints)
    assert report.broken is None and report.running == 3


def test_a_killed_parent_leaves_nothing_behind(tmp_path: Path) -> None:
    """Killed with -9, its workers are gone within a second and the port can be had again."""
    with running(tmp_path) as gateway:
        for connection in gateway.connect_to_each().values():
            connection.close()
        stopped, *_ = workers = list(gateway.workers.values())
        stopped.suspend()  # one that cannot notice anything by itself
        gateway.process.kill()
        gateway.process.wait()
        deadline = time.monotonic() + 1.0
        while any(process.alive(worker.pid) for worker in workers):
            assert time.monotonic() < deadline
        while True:  # the kernel takes a moment to let go of what a killed process had
            try:
                listen("127.0.0.1", gateway.port)[0].close()
                break
            except BindError:
                assert time.monotonic() < deadline


@pytest.mark.slow
def test_a_job_that_stands_still_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """Told to end while a job's process is suspended, the gateway kills it and exits with 0, drain and all."""
    (tmp_path / "models").mkdir()
    with RealRedis() as server, redis.Redis.from_url(server.url) as client:
        with running(tmp_path, redis_url=server.url, model_repository=tmp_path / "models") as gateway:
            client.hset(JOBS, "cache_ttls:due", "1")  # it is found at the next look
            deadline = time.monotonic() + 30
            jobs: list[psutil.Process] = []
            while not jobs:
                assert time.monotonic() < deadline, gateway.log.read_text()
                time.sleep(0.01)
                jobs = [each for each in gateway.workers.values() if "cache_ttls" in each.cmdline()]
            jobs[0].suspend()
            began = awake()
            gateway.process.send_signal(signal.SIGTERM)
            assert gateway.process.wait(60) == 0, gateway.log.read_text()
            assert awake() - began < upkeep.END_S
            assert not process.alive(jobs[0].pid)


def test_wrong_schedules_are_wrong_settings(tmp_path: Path) -> None:
    """A time that is none is told with its hint, and the exit code is that of wrong settings."""
    environ = {**os.environ, "TRUTHGPT_HOME": str(tmp_path), "TRUTHGPT_SCHEDULES": "logs=0 25 * * *"}
    argv = [sys.executable, "-m", "orchestrator.parent"]
    ended = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "'0 25 * * *' is no time for logs" in ended.stderr


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> Path:
    """Let workers be a script that runs `body`, where `say(line)` speaks to the parent; the file has a line a start."""
    starts, script = folder / "starts", folder / "worker"
    starts.touch()
    script.write_text(
        f"#!{sys.executable} -S\n"
        "import os, sys, time\n"
        f"open({str(starts)!r}, 'a').write(sys.argv[3] + '\\n')\n"
        "def say(line): os.write(int(sys.argv[5]), line + b'\\n')\n"
        f"{body}\n"
    )
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    return starts


async def run(workers: int = 2) -> int:
    sockets = listen("127.0.0.1", 0, workers)
    return await asyncio.wait_for(Parent(replace(Settings(), workers=workers, drain_s=0.2), sockets).run(), 15)


async def test_a_worker_that_cannot_start_ends_the_gateway(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What keeps the first worker from starting is said once: the others are not started, and the exit code is 1."""
    starts = stand_in(monkeypatch, tmp_path, "sys.exit(3)")
    assert await run() == 1
    assert starts.read_text() == "1\n"


async def test_a_worker_that_keeps_dying_ends_the_gateway(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After five deaths in a row the parent gives up, drains the other workers and exits with 1."""
    monkeypatch.setattr(parent, "backoff_s", lambda failures: 0.0)
    body = "say(b'alive')\nif sys.argv[3] == '2': sys.exit(7)\ntime.sleep(60)"
    starts = stand_in(monkeypatch, tmp_path, body)
    assert await run() == 1
    assert sorted(starts.read_text().split()) == ["1", *["2"] * 5]
    assert "worker 2 ended with 7: giving up" in caplog.text


async def test_what_runs_beside_the_workers_cannot_keep_the_gateway(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where that does not end although it was cancelled, the gateway ends all the same, a moment later."""
    starts, released = stand_in(monkeypatch, tmp_path, "say(b'alive')\ntime.sleep(60)"), asyncio.Event()

    async def stubborn(self: upkeep.Upkeep) -> None:
        while not released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await released.wait()

    monkeypatch.setattr(parent, "UPKEEP_END_S", 0.3)
    monkeypatch.setattr(upkeep.Upkeep, "run", stubborn)
    settings = replace(Settings(), home=tmp_path, workers=1, drain_s=0.2, audit=False)
    serving = asyncio.create_task(parent.serve(settings, listen("127.0.0.1", 0, 1), listen("127.0.0.1", 0, 1)))
    try:
        await until(lambda: starts.read_text() != "", 10)
        await asyncio.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(serving, 20) == 0
    finally:
        released.set()
        await asyncio.sleep(0.1)


async def test_a_worker_that_falls_silent_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A worker whose loop stands still does not answer and does not end: it is killed and started again."""
    monkeypatch.setattr(parent, "TICK_S", 0.03)
    starts = stand_in(monkeypatch, tmp_path, "say(b'alive')\ntime.sleep(60)")
    running = asyncio.create_task(run(1))
    await until(lambda: starts.read_text().count("1") >= 2, 10)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0


async def test_told_twice_it_ends_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second signal does not wait for workers that drain; the exit code tells."""
    starts = stand_in(
        monkeypatch,
        tmp_path,
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nsay(b'alive')\ntime.sleep(60)",
    )
    running = asyncio.create_task(run())
    await until(lambda: len(starts.read_text().split()) == 2, 10)
    await asyncio.sleep(0.3)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.05)
    began = awake()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 1
    assert awake() - began < 2.0


async def test_a_worker_that_does_not_end_is_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a signal nor the request to stop ends it: after the drain and its margin the parent does."""
    monkeypatch.setattr(parent, "IN_BAND_S", 0.1)
    monkeypatch.setattr(parent, "END_S", 0.1)
    starts = stand_in(
        monkeypatch,
        tmp_path,
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nsay(b'alive')\ntime.sleep(60)",
    )
    running = asyncio.create_task(run(1))
    await until(lambda: "1" in starts.read_text(), 10)
    await asyncio.sleep(0.3)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0
    assert "1 workers did not end in time" in caplog.text


def test_backoff_grows_and_is_bounded() -> None:
    """The first start after a death is immediate, the others wait longer and longer, up to 4 s."""
    assert [backoff_s(n) for n in range(1, 8)] == [0.0, 0.5, 1.0, 2.0, 4.0, 4.0, 4.0]


def test_workers_rotate_their_log_under_load_and_lose_no_line(tmp_path: Path) -> None:
    """Each request of many is in one whole line of the log or of those moved aside, whoever of the three processes
    rotated them, after a drain all of them; the stack of a worker that crashed is there, too.
    """
    log = tmp_path / "log"
    with running(tmp_path, log_file=log, log_level="info", log_max_bytes=10_000, log_files=1000) as gateway:

        def ask(connection: HTTPConnection, first: int) -> None:
            with contextlib.closing(connection):
                for number in range(first, first + 150):
                    headers = {"X-Request-Id": f"number-{number}"}
                    connection.request("POST", "/v1/completions", b'{"model": "m", "prompt": "Hola"}', headers)
                    connection.getresponse().read()

        threads = [
            threading.Thread(target=ask, args=(connection, index * 150))
            for index, connection in enumerate(gateway.connect_to_each().values())
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(10 * COLLECT_S)  # a crash costs the lines that were not written yet
        crashed = next(iter(gateway.workers))
        os.kill(crashed, signal.SIGSEGV)
        deadline = time.monotonic() + 20
        while crashed in gateway.workers or len(gateway.workers) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        gateway.process.terminate()
        assert gateway.process.wait(20) == 0
    files = [path.read_text() for path in tmp_path.glob("log*")]
    assert len(files) > 1  # nine, but for a machine that stands still and then writes what has gathered at once
    lines = [line for text in files for line in text.splitlines()]
    requests = [row for row in (json.loads(line) for line in lines if line[:1] == "{") if row["message"] == "request"]
    assert sorted(row["request_id"] for row in requests) == sorted(f"number-{number}" for number in range(300))
    assert {row["worker"] for row in requests} == {1, 2}
    assert "Fatal Python error: Segmentation fault" in lines
