"""Streaming clients that cost little: raw connections, moments taken where bytes come out of the socket.

On two cores the clients share them with what is measured, so nothing is parsed before an answer has ended.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import httptools

from benchmarks import checkpoint

# what one event says: text, and how many tokens are in it
Reader = Callable[[Any], tuple[str, int]]
PATIENCE_S = 300.0


@dataclass(frozen=True)
class Endpoint:
    """Where conversations are held. `body(prompt, new)` is a request's; `read` takes an event of an answer apart."""

    host: str
    port: int
    path: str
    body: Callable[[list[int], int], dict[str, Any]] = field(repr=False)
    read: Reader = field(repr=False)
    headers: tuple[tuple[str, str], ...] = ()

    def render(self, prompt: list[int], new: int) -> bytes:
        text = json.dumps(self.body(prompt, new)).encode()
        lines = [f"POST {self.path} HTTP/1.1", f"Host: {self.host}:{self.port}", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        return "\r\n".join([*lines, f"Content-Length: {len(text)}", "", ""]).encode() + text


def triton(port: int, model: str) -> Endpoint:
    """Triton's generate_stream."""

    def body(prompt: list[int], new: int) -> dict[str, Any]:
        sampling = {"prompt_token_ids": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}
        return {
            "text_input": "", "stream": True, "sampling_parameters": json.dumps(sampling),
            "return_num_output_tokens": True,
        }  # fmt: skip

    def read(event: Any) -> tuple[str, int]:
        return event["text_output"], event["num_output_tokens"]

    return Endpoint("127.0.0.1", port, f"/v2/models/{model}/generate_stream", body, read)


def openai(port: int, model: str, key: str) -> Endpoint:
    """The gateway's completions, as an OpenAI client asks for them. Texts are counted in words, which are tokens."""

    def body(prompt: list[int], new: int) -> dict[str, Any]:
        return {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}

    def read(event: Any) -> tuple[str, int]:
        text = event["choices"][0]["text"] if event["choices"] else ""
        return text, text.count(" ")

    return Endpoint("127.0.0.1", port, "/v1/completions", body, read, (("Authorization", f"Bearer {key}"),))


class Failed(Exception):
    """An answer that is none."""


class Connection(asyncio.Protocol):
    """One keep-alive connection; `ask` sends a request and gives the answer's pieces with their moments."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._pieces: list[tuple[float, bytes]] = []
        self._now = 0.0
        self._answer: asyncio.Future[tuple[int, list[tuple[float, bytes]]]] | None = None

    @classmethod
    async def open(cls, endpoint: Endpoint) -> Connection:
        _, protocol = await asyncio.get_running_loop().create_connection(cls, endpoint.host, endpoint.port)
        return protocol

    async def ask(self, data: bytes) -> tuple[int, list[tuple[float, bytes]]]:
        assert self._transport is not None
        self._parser, self._pieces = httptools.HttpResponseParser(self), []
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        async with asyncio.timeout(PATIENCE_S):
            return await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"no HTTP: {error}")

    def on_body(self, body: bytes) -> None:
        self._pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), self._pieces))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the connection was cut: {exc}")

    def _fail(self, what: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(Failed(what))


def parse(status: int, pieces: list[tuple[float, bytes]], read: Reader) -> tuple[str, list[tuple[float, int]]]:
    """A stream's text, and for each of its events that has tokens when its end came and how many.

    Raises Failed for a status other than 200 and an error inside the stream.
    """
    whole = b"".join(piece for _, piece in pieces)
    if status != 200:
        raise Failed(f"status {status}: {whole[:300].decode('utf-8', 'replace')}")
    moments, text, at, part = [], [], 0, 0
    ends = 0  # where the piece `part` ends
    for line in whole.splitlines(keepends=True):
        at += len(line)
        while part < len(pieces) and ends < at:
            ends += len(pieces[part][1])
            part += 1
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise Failed(f"an error in the stream: {str(event['error'])[:300]}")
        said, tokens = read(event)
        text.append(said)
        if tokens:
            moments.append((pieces[part - 1][0], tokens))
    return "".join(text), moments


async def converse(endpoint: Endpoint, conversations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hold conversations as peers.serving.converse does, each on a connection of its own. Raises Failed."""
    connections = [await Connection.open(endpoint) for _ in conversations]
    answers: list[dict[str, Any]] = []
    began = time.perf_counter()

    async def hold(number: int) -> None:
        due, said = float(conversations[number]["at_s"]), []
        for turn, one in enumerate(conversations[number]["turns"]):
            said += one["tokens"]
            data = endpoint.render(said, one["new"])
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            sent = time.perf_counter()
            status, pieces = await connections[number].ask(data)
            text, moments = parse(status, pieces, endpoint.read)
            ids = checkpoint.ids_of(text)
            if len(ids) != one["new"] or sum(tokens for _, tokens in moments) != one["new"]:
                raise Failed(f"{len(ids)} tokens, not {one['new']}")
            said += ids
            first, last = moments[0][0] - began, moments[-1][0] - began
            answers.append(
                {"conversation": number, "turn": turn, "due_s": due, "sent_s": sent - began, "first_s": first,
                 "last_s": last, "ids": ids}
            )  # fmt: skip
            due = last

    try:
        async with asyncio.TaskGroup() as group:
            for number in range(len(conversations)):
                group.create_task(hold(number))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    finally:
        for connection in connections:
            connection.close()
    return answers
