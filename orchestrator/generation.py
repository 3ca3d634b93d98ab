"""One answer on its way to its caller: an iterator that lets the request in with the first chunk that is asked for, and
settles and records it when it ends.

Classes instead of generators: the event loop keeps a list of every asynchronous generator, and that costs more than
what they do here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from orchestrator.domain import Chunk, EncodeRequest, GenerateRequest
from orchestrator.passage import Passage


class Source(Protocol):
    """Chunks that come from somewhere; closed by whoever reads them."""

    async def __anext__(self) -> Chunk: ...
    async def aclose(self) -> None: ...


class Ready:
    """A source of one chunk that is there already."""

    def __init__(self, chunk: Chunk) -> None:
        self._chunk: Chunk | None = chunk

    async def __anext__(self) -> Chunk:
        chunk, self._chunk = self._chunk, None
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        """There is nothing to end."""


class Generation(AsyncIterator[Chunk]):
    """The answer's chunks; the last one has a finish reason. Close it to cancel. Raises TruthGPTError.

    `begin` lets the request in, and tells the source and what is to be noted once its first chunk is there. `end` is
    called once after it, with what ended the answer; it raises what is to be raised in that one's place.
    """

    def __init__(
        self, passage: Passage[GenerateRequest] | Passage[EncodeRequest],
        begin: Callable[[], Awaitable[tuple[Source, Callable[[], None] | None]]],
        end: Callable[[BaseException | None], None],
    ) -> None:  # fmt: skip
        self._tally = passage.tally
        self._begin: Callable[[], Awaitable[tuple[Source, Callable[[], None] | None]]] | None = begin
        self._end: Callable[[BaseException | None], None] | None = end
        self._source: Source | None = None
        self._note: Callable[[], None] | None = None

    async def __anext__(self) -> Chunk:
        tally = self._tally
        try:
            if self._begin is not None:
                begin, self._begin = self._begin, None
                self._source, self._note = await begin()
            if self._source is None or tally.finish_reason is not None:
                raise StopAsyncIteration  # the answer's end is not waited for, only its last chunk
            chunk = await self._source.__anext__()
        except StopAsyncIteration:
            await self._close(None)
            raise
        except BaseException as error:
            await self._close(error)
            raise
        if self._note is not None:
            self._note()
            self._note = None
        tally.add(chunk)
        return chunk

    async def aclose(self) -> None:
        """Leave: before the last chunk that is a cancellation."""
        if self._begin is None:
            await self._close(asyncio.CancelledError())

    async def _close(self, error: BaseException | None) -> None:
        source, self._source = self._source, None
        end, self._end = self._end, None
        try:
            if source is not None:
                await source.aclose()
        finally:
            if end is not None:
                end(error)
