"""The admin edge's calls where there are several servers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import orjson
import pytest

from orchestrator.app import grpc_address
from orchestrator.errors import UpstreamUnavailable
from orchestrator.fleet import Control
from orchestrator.resolving import Entry, Resolver, entries
from orchestrator.settings import Settings
from orchestrator.triton import Deadlines, Reply, Triton

from .fake_triton import FakeTriton
from .fleets import fakes

INDEX, UNLOAD = "/v2/repository/index", "/v2/repository/models/m/unload"


@pytest.fixture
async def three() -> AsyncIterator[list[FakeTriton]]:
    async with fakes(3) as those:
        yield sorted(those, key=lambda fake: fake.port)


def control(*those: FakeTriton) -> Control:
    resolver = Resolver(entries(",".join(fake.url for fake in those)))
    return Control(resolver, lambda url: Triton(url, Deadlines(connect_s=0.5)), lambda server: "127.0.0.1:1")


async def forward(those: list[FakeTriton], method: str, path: str, timeout_s: float = 5.0) -> tuple[Reply, Any]:
    reply = await control(*those).forward(method, path, b"{}" if method == "POST" else None, {}, timeout_s)
    return reply, orjson.loads(reply.body) if reply.body else None


async def test_a_change_goes_to_every_server(three: list[FakeTriton]) -> None:
    """Each is asked once, and the answer is the last one's."""
    reply, _ = await forward(three, "POST", UNLOAD)
    assert reply.status == 200
    assert [fake.calls.count(f"POST {UNLOAD}") for fake in three] == [1, 1, 1]


@pytest.mark.parametrize("fault", ["refused", "dead"])
async def test_the_first_failure_stops_and_names_its_server(three: list[FakeTriton], fault: str) -> None:
    """The error has the server's URL, its reason and where the change was made; those after it are not asked."""
    if fault == "refused":
        three[1].models = {}
    else:
        await three[1].stop()
    reply, body = await forward(three, "POST", UNLOAD)
    assert reply.status == (400 if fault == "refused" else 503)
    assert body["error"].startswith(f"{three[1].url}: ") and three[0].url in body["error"]
    assert ("failed to load 'm'" if fault == "refused" else "connection") in body["error"]
    assert [fake.calls.count(f"POST {UNLOAD}") for fake in (three[0], three[2])] == [1, 0]
    if fault == "dead":
        await three[1].start(three[1].port)


async def test_what_only_asks_is_answered_by_the_first_that_can(three: list[FakeTriton]) -> None:
    """The index, though a POST, and each GET; with nobody there the last one's fault is told."""
    await three[0].stop()
    reply, body = await forward(three, "POST", INDEX)
    assert reply.status == 200 and body[0]["name"] == "m"
    assert [fake.calls.count(f"POST {INDEX}") for fake in three[1:]] == [1, 0]
    reply, _ = await forward(three, "GET", "/v2/logging")
    assert reply.status == 404, "an answer, if none that the fake can give"
    for fake in three[1:]:
        await fake.stop()
    reply, body = await forward(three, "GET", "/v2/logging")
    assert reply.status == 503 and body["error"].startswith(three[2].url)
    for fake in three:
        await fake.start(fake.port)


async def test_one_server_answers_as_it_is(three: list[FakeTriton]) -> None:
    """Its refusals have no URL, and that it is away is an error of ours."""
    three[0].models = {}
    reply, body = await forward(three[:1], "POST", UNLOAD)
    assert reply.status == 400 and body["error"].startswith("failed to load")
    await three[0].stop()
    with pytest.raises(UpstreamUnavailable, match="connection"):
        await forward(three[:1], "POST", UNLOAD)
    await three[0].start(three[0].port)


async def test_the_time_is_for_all_together(three: list[FakeTriton]) -> None:
    """A server that does not answer leaves none to the others, and they are not asked any more."""
    three[0].stopped = True
    reply, body = await forward(three, "POST", UNLOAD, timeout_s=0.3)
    assert reply.status == 503 and body["error"].startswith(three[0].url)
    assert three[1].calls == []


async def test_without_a_server_nobody_is_asked() -> None:
    """A name that has no address yet is an error of ours."""

    async def nothing(host: str, port: int) -> list[Any]:
        return []

    resolver = Resolver(entries("http://triton"), nothing)
    with pytest.raises(UpstreamUnavailable, match="no Triton server is known"):
        await Control(resolver, lambda url: Triton(url, Deadlines()), str).forward("GET", "/v2/logging", None, {}, 1.0)


@pytest.mark.parametrize(
    ("server", "address"),
    [
        (Entry("127.0.0.1", 8000), "127.0.0.1:8001"),
        (Entry("127.0.0.1", 8200), "127.0.0.1:8201"),
        (Entry("fd00::1", 8000), "[fd00::1]:8001"),
    ],
)
def test_the_grpc_port_is_as_far_away_as_the_http_port(server: Entry, address: str) -> None:
    """From the settings' own, on any host."""
    assert grpc_address(replace(Settings(), triton_http_port=8000, triton_grpc_port=8001), server) == address
