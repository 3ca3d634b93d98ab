"""What a worker says to its parent over their socket."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest

from orchestrator.metrics import Metrics
from orchestrator.settings import Settings
from orchestrator.worker import UNREAD_BYTES, Worker

from .conftest import until
from .test_metrics import record


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The worker's end and the parent's, with buffers that hold far less than a snapshot."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        yield ours, theirs


async def connected(ours: socket.socket) -> Worker:
    """A worker that is not serving, with more metrics than the socket holds."""
    worker = Worker(replace(Settings(), workers=1), ours)
    _, worker._parent = await asyncio.open_connection(sock=ours)
    metrics = worker.application.metrics = Metrics(lambda model: True)
    for number in range(100):
        metrics.record(record(model=f"m{number}"))
    return worker


async def test_a_snapshot_larger_than_the_socket_arrives_whole(sockets: tuple[socket.socket, socket.socket]) -> None:
    """What the socket does not take at once follows as the parent reads, and lines are never mixed."""
    worker = await connected(sockets[0])
    reader, writer = await asyncio.open_connection(sock=sockets[1], limit=1 << 22)
    for _ in range(3):
        worker._say(b"alive\n")
        worker._say_metrics()
        assert await reader.readline() == b"alive\n"
        said, _, line = (await reader.readline()).partition(b" ")
        assert said == b"metrics" and len(line) > 20_000
        assert len(json.loads(line)["truthgpt_generations_total"]) == 100
        await until(lambda: worker._unread == 0)
    worker._parent.close()  # type: ignore[union-attr]
    writer.close()


async def test_a_parent_that_does_not_read_costs_nothing(sockets: tuple[socket.socket, socket.socket]) -> None:
    """Nothing waits for it and nothing piles up: one snapshot is kept for it, and that it is drained comes through."""
    worker = await connected(sockets[0])
    for _ in range(50):
        worker._say(b"alive\n")
        worker._say_metrics()
        await asyncio.sleep(0)
    unread = worker._unread
    assert 0 < unread < 200_000 < UNREAD_BYTES
    worker._say(b"drained\n")
    reader, writer = await asyncio.open_connection(sock=sockets[1], limit=1 << 22)
    lines = []
    while b"drained\n" not in lines:
        lines.append(await reader.readline())
    assert sum(line.startswith(b"metrics ") for line in lines) <= 2
    assert all(line.startswith((b"metrics {", b"alive\n", b"drained\n")) and line.endswith(b"\n") for line in lines)
    worker._parent.close()  # type: ignore[union-attr]
    writer.close()
