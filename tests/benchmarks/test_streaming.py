"""The streaming clients of the engine benchmark: whose token came when, and what is no answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import checkpoint, contenders, streaming


def event(text: str, tokens: int) -> bytes:
    return b"data: " + json.dumps({"text_output": text, "num_output_tokens": tokens}).encode() + b"\n\n"


def read(one: Any) -> tuple[str, int]:
    return one["text_output"], one["num_output_tokens"]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 120), max_size=8))
def test_an_event_counts_when_its_end_has_come(cuts: list[int]) -> None:
    """However a stream is cut into packets, each event's tokens have the moment of the packet with its last byte."""
    events = [event(" w1", 1), event("", 0), event(" w2 w3", 2)]
    whole = b"".join(events)
    places = sorted({min(sum(cuts[: n + 1]), len(whole)) for n in range(len(cuts))} | {len(whole)})
    pieces = [(float(end), whole[begin:end]) for begin, end in zip([0, *places], places, strict=False) if begin < end]
    text, moments = streaming.parse(200, pieces, read)
    ends = (len(events[0]) - 1, len(whole) - 1)  # behind the line; the empty one after it says nothing
    expected = [
        (float(next(end for end in places if end >= at)), tokens) for at, tokens in zip(ends, (1, 2), strict=True)
    ]
    assert text == " w1 w2 w3" and moments == expected


def test_what_is_no_answer() -> None:
    """A refusal and an error inside a stream are told with what was said."""
    with pytest.raises(streaming.Failed, match="status 429: slow down"):
        streaming.parse(429, [(0.0, b"slow down")], read)
    with pytest.raises(streaming.Failed, match="in the stream: out of memory"):
        streaming.parse(200, [(0.0, event(" w1", 1)), (1.0, b'data: {"error": "out of memory"}\n\n')], read)


def test_text_and_tokens_are_one_to_one() -> None:
    """An answer's text gives its tokens back, and one that is not made of the checkpoint's words is refused."""
    assert checkpoint.ids_of(" w0 w1 w49999") == [256, 257, 50_255]
    assert checkpoint.ids_of("") == []
    for text in ("w1", " w1 ", " wx", " w1\ufffd", " w01"):
        with pytest.raises(ValueError, match="not words"):
            checkpoint.ids_of(text)


async def serve(answer: bytes) -> tuple[asyncio.Server, int, list[bytes]]:
    """A server that answers every request with these bytes, and what it was asked."""
    asked: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                asked.append(await reader.readexactly(size))
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1], asked


def chunked(*events: bytes) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in events) + b"0\r\n\r\n"
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body


async def test_conversations_over_http() -> None:
    """Two turns on one connection: the second prompt has the first answer's tokens in it."""
    server, port, asked = await serve(chunked(event(" w1", 1), event(" w2", 1)))
    async with server:
        turns = [{"tokens": [1000], "new": 2}, {"tokens": [2000], "new": 2}]
        answers = await streaming.converse(streaming.triton(port, "m"), [{"at_s": 0.0, "turns": turns}])
    prompts = [json.loads(json.loads(body)["sampling_parameters"])["prompt_token_ids"] for body in asked]
    assert prompts == [[1000], [1000, 257, 258, 2000]]
    assert [answer["ids"] for answer in answers] == [[257, 258]] * 2
    assert answers[0]["first_s"] <= answers[0]["last_s"] <= answers[1]["first_s"]


async def test_a_short_answer_and_a_cut_connection_fail() -> None:
    """Fewer tokens than asked for, no HTTP, and a server that is not there: each is told as what it is."""
    for answer, said in ((chunked(event(" w1", 1)), "1 tokens, not 2"), (b"hello\r\n\r\n", "no HTTP")):
        server, port, _ = await serve(answer)
        async with server:
            with pytest.raises(streaming.Failed, match=said):
                await streaming.converse(
                    streaming.triton(port, "m"), [{"at_s": 0.0, "turns": [{"tokens": [1000], "new": 2}]}]
                )
    clients = contenders.Clients("truthgpt", "int8", streaming.triton(port, "m"))
    with pytest.raises(contenders.Failed, match="truthgpt int8: ConnectionRefusedError"):
        await clients.run([{"at_s": 0.0, "turns": [{"tokens": [1000], "new": 2}]}])


def test_parameters_take_the_place_of_those_of_the_same_name() -> None:
    """A config.pbtxt has each parameter once, whichever way it was written before."""
    config = 'name: "m"\nparameters { key: "slots" value { string_value: "16" } }\nparameters: {\n  key: "chunk"\n'
    config += '  value: { string_value: "128" }\n}\n'
    changed = contenders.with_parameters(config, {"slots": "4", "chunk": "64", "drafts": "0"})
    assert [changed.count(f'"{name}"') for name in ("slots", "chunk", "drafts", "4", "64", "0", "16", "128")] == [
        1, 1, 1, 1, 1, 1, 0, 0,
    ]  # fmt: skip


def test_slots_of_a_kind_that_there_is_not_are_told(tmp_path: Path) -> None:
    """What stands behind a precision's + is known or refused, not exported as something else."""
    with pytest.raises(contenders.Failed, match="behind \\+ stands kv8"):
        contenders.export(tmp_path, tmp_path, "int8+kv4", 4, 64, {})
