"""The load generator believes no server: what is wrong, late or missing is counted, and moments are right."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import gateway_load
from benchmarks.gateway_load import Result, chat
from benchmarks.gateway_mock import OPENAI, Connection

Step = bytes | float | str  # written; seconds of silence; "cut": the connection is reset


@asynccontextmanager
async def server(script: Callable[[int], Sequence[Step]]) -> AsyncIterator[int]:
    """Answers request number n, counted over all connections, with the steps of `script(n)`."""
    numbers, tasks = itertools.count(), set[asyncio.Task[Any]]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:"))
                await reader.readexactly(length)
                for step in script(next(numbers)):
                    if isinstance(step, float):
                        await asyncio.sleep(step)
                    elif isinstance(step, bytes):
                        writer.write(step)
                    else:
                        return writer.transport.abort()
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the client has gone, as clients do
        finally:
            writer.close()
            tasks.discard(task)

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield int(listening.sockets[0].getsockname()[1])
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await listening.wait_closed()


async def run(port: int, stream: bool = True, tokens: int = 16, clients: int = 2, **options: Any) -> Result:
    given = {"warm_s": 0.0, "at_most_s": 2.0, **options}
    return await gateway_load.http(chat(port, stream, tokens), clients, 0.1, **given)


async def test_good_answers_are_counted_and_timed() -> None:
    """Whole and streamed answers of the instant upstream are requests without an error, streams with 16 chunks."""
    listening = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    whole, streamed = await run(port, stream=False, tokens=1), await run(port)
    listening.close()
    await listening.wait_closed()
    for result in (whole, streamed):
        assert result.errors == {} and result.requests > 10 and result.rate > 0
        assert 0 < result.first["p50"] <= result.whole["p50"] <= result.whole["p99"]
    assert streamed.events == 17  # and [DONE]


_GOOD, _STREAM = OPENAI[16]
_WHOLE = b"".join(_STREAM)


@pytest.mark.parametrize(
    ("steps", "error"),
    [
        ([b"HTTP/1.1 429 Too Many\r\nContent-Length: 2\r\n\r\n{}"], "status 429"),
        ([b'HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{"error": "no room"}'], "error in the body"),
        ([_WHOLE.replace(b"[DONE]", b"[NONE]")], "without [DONE]"),
        ([_WHOLE.replace(b'"stop"', b'"sto_"')], "no finish reason"),
        ([_WHOLE.replace(b" tick", b" tock", 1)], "15 of 16 tokens"),
        ([*_STREAM[:9], "cut"], "connection was cut"),
        (["cut"], "connection was cut"),
        ([b"nonsense\r\n\r\n"], "no HTTP"),
    ],
)  # fmt: skip
async def test_what_is_wrong_with_an_answer_is_an_error(steps: Sequence[Step], error: str) -> None:
    """An answer that a client could not use is an error by its kind, and never a request."""
    async with server(lambda number: steps) as port:
        result = await run(port)
    assert result.requests == 0 and result.whole == {}
    assert result.errors and all(error in name for name in result.errors), result.errors


async def test_one_bad_answer_among_good_ones_is_seen() -> None:
    """An error in the warm-up or in between is in the result, so that the run is none."""
    async with server(lambda number: _STREAM[:3] + ["cut"] if number == 5 else _STREAM) as port:
        result = await run(port, warm_s=0.05)
    assert result.errors == {"the connection was cut": 1} and result.requests > 10


async def test_the_first_token_is_stamped_when_it_comes() -> None:
    """A stream that pauses after its first chunk has an early first token and a late end."""
    async with server(lambda number: [_STREAM[0], 0.06, *_STREAM[1:]]) as port:
        result = await run(port, clients=1)
    assert result.errors == {} and result.first["p50"] < 30 and 60 <= result.whole["p50"] < 200


async def test_an_answer_that_never_comes_is_an_error() -> None:
    """Who is still waiting when the patience after the end is over counts as unanswered."""
    async with server(lambda number: [10.0]) as port:
        result = await run(port, clients=3, at_most_s=0.1, wait_s=0.1)
    assert result.requests == 0 and result.errors == {"no answer": 3}


async def test_an_answer_without_what_it_needs_is_a_stray() -> None:
    """A cache that does not say that it was one is counted apart, each time."""
    hit = _GOOD.replace(b"\r\n\r\n", b"\r\nx-cache: hit\r\n\r\n")
    async with server(lambda number: [_GOOD if number % 2 else hit]) as port:
        ask = chat(port, False, 16, needs=b"x-cache: hit")
        result = await gateway_load.http(ask, 1, 0.05, warm_s=0.0)
    assert result.errors == {} and abs(result.strays * 2 - result.requests) <= 2 and result.strays > 1


async def test_nobody_listening_is_an_error() -> None:
    """A refused connection is counted and not waited for."""
    async with server(lambda number: []) as port:
        pass
    result = await run(port, at_most_s=0.1)
    assert result.requests == 0 and all(name.startswith("no connection") for name in result.errors) and result.errors


def test_no_two_prompts_are_the_same_unless_told() -> None:
    """Each request is well-formed JSON of the announced length; its number is new, or always the one that was given."""

    def rendered(**changes: Any) -> list[bytes]:
        make = chat(1, True, 16, key="k", **changes).render()
        return [make() for _ in range(3)]

    for requests, kinds in ((rendered(), 3), (rendered(same=gateway_load.new_number()), 1)):
        assert len(set(requests)) == kinds
        for request in requests:
            head, _, body = request.partition(b"\r\n\r\n")
            assert f"Content-Length: {len(body)}".encode() in head and b"Authorization: Bearer k" in head
            assert json.loads(body)["stream"] is True


@pytest.mark.parametrize(
    ("count", "p50", "p90", "p99"), [(1, 1, 1, 1), (2, 1, 2, 2), (3, 2, 3, 3), (100, 50, 90, 99), (200, 100, 180, 198)]
)
def test_quantiles_are_those_of_the_nearest_rank(count: int, p50: int, p90: int, p99: int) -> None:
    """Of the values 1 to N each quantile is its own rank: the least that so many percent do not exceed."""
    found = gateway_load.quantiles([value / 1000 for value in range(count, 0, -1)])
    assert [round(found[name]) for name in ("p50", "p90", "p99")] == [p50, p90, p99]


@given(st.lists(st.floats(min_value=0, max_value=100), min_size=1, max_size=300))
def test_quantiles_are_values_in_order(values: list[float]) -> None:
    """Quantiles are among the values, rise, and at most one in a hundred lies above the last one."""
    found = gateway_load.quantiles(values)
    scaled = [value * 1000 for value in values]
    assert {found["p50"], found["p90"], found["p99"]} <= {*scaled}
    assert found["p50"] <= found["p90"] <= found["p99"]
    assert sum(value > found["p99"] for value in scaled) <= len(values) / 100
