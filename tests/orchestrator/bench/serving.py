"""Endpoints of a few bytes, right and wrong, on real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

Answering = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
DONE = b"data: [DONE]\n\n"


@asynccontextmanager
async def serving(answer: Answering) -> AsyncIterator[str]:
    """The URL of a server that hands each request's JSON body to `answer`, which writes what it likes."""
    tasks = set[asyncio.Task[Any]]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line
                )
                await answer(json.loads(await reader.readexactly(length)), writer)
                await writer.drain()
                if writer.is_closing():
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def piece(text: str, finish: str | None = None) -> bytes:
    """A chunk of a chat completion."""
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": finish}])


def role() -> bytes:
    return event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])


def usage(prompt: Any, completion: Any) -> bytes:
    return event(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": completion})


def whole(status: int, fields: Any, kind: str = "application/json") -> bytes:
    """An answer in one piece, after which the connection stays."""
    body = json.dumps(fields).encode()
    return b"HTTP/1.1 %d X\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n%s" % (
        status,
        kind.encode(),
        len(body),
        body,
    )


async def good(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """A chat completion as it should be: five tokens, the prompt's words as the server's count."""
    words = len(body["messages"][0]["content"].split())
    tokens = min(5, body["max_tokens"])
    writer.write(STREAM + role())
    for _ in range(tokens):
        writer.write(piece("a"))
    writer.write(piece("", "length") + usage(words + 3, tokens) + DONE)
    writer.close()
