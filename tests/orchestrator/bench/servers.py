"""Small servers on real sockets that answer as a test says, byte for byte; most of them badly."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from orchestrator.bench.plan import Load, Target
from orchestrator.bench.prompts import Sizing

SIZED = Sizing(4, 4)  # spares a test the first questions


class Exchange:
    """One request as a server saw it, and the way to answer. With `close` the connection ends after the answer."""

    def __init__(self, number: int, head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        self.number, self.head, self.body, self._writer = number, head, body, writer
        self.close = False

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    async def send(self, *parts: bytes, pause_s: float = 0.0) -> None:
        for at, part in enumerate(parts):
            if at and pause_s:
                await asyncio.sleep(pause_s)
            self._writer.write(part)
            await self._writer.drain()


Handler = Callable[[Exchange], Awaitable[None]]


class Served:
    """A server that is running; `asked` is all that it was asked."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.asked: list[Exchange] = []
        self.connections = 0
        self.server: asyncio.Server


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Served]:
    """HTTP/1.1 with keep-alive, whose every answer is the handler's."""
    tasks: set[asyncio.Task[Any]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.connections += 1
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                length = int(head.lower().partition("content-length: ")[2].partition("\r")[0])
                exchange = Exchange(len(served.asked), head, await reader.readexactly(length), writer)
                served.asked.append(exchange)
                await handler(exchange)
                if exchange.close:
                    break
        tasks.discard(task)
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    served = Served(server.sockets[0].getsockname()[1])
    served.server = server
    try:
        yield served
    finally:
        server.close()
        for task in [*tasks]:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=5)


def sized(body: bytes, status: str = "200 OK", kind: str = "application/json", more: str = "") -> bytes:
    """A whole answer with its length."""
    return f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\n{more}content-length: {len(body)}\r\n\r\n".encode() + body


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(value: object) -> bytes:
    """One server-sent event; bytes go as they are."""
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def delta(text: str | None = None, finish: str | None = None, **more: object) -> dict[str, Any]:
    """A piece of a chat answer."""
    return {"choices": [{"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish}],
            **more}  # fmt: skip


ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}


def usage(output: object, prompt: object = 4) -> dict[str, Any]:
    return {"choices": [], "usage": {"completion_tokens": output, "prompt_tokens": prompt}}


def chat(*texts: str) -> bytes:
    """The events of a whole chat answer of so many tokens, as one body."""
    told = [ROLE, *(delta(text) for text in texts), delta(finish="stop"), usage(len(texts))]
    return b"".join(event(one) for one in told) + event(b"[DONE]")


def answered(*texts: str) -> bytes:
    """A whole chat stream with its head and its end."""
    return STREAM + chunk(chat(*texts or ("one", " two"))) + END


async def good(exchange: Exchange) -> None:
    """What a good server does: two tokens, or as many as may be."""
    await exchange.send(answered(*("one", " two")[: exchange.json.get("max_tokens", 2)]))


def chats(url: str, **more: Any) -> Target:
    return Target(url, "openai", "demo", **more)


def load(**more: Any) -> Load:
    """A small load without a warm-up."""
    return Load(**{"requests": 1, "prompt_tokens": 4, "output_tokens": 8, "timeout_s": 20.0, **more})
