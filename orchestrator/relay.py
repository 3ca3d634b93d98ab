"""How an answer that one process makes reaches the callers of another while it is made: over Redis' publish/subscribe.

Each process listens on its own channel. A follower says `want` to the leader, which says everything so far and then
each new part, the end or the error. Both say something at least every `beat_s`; silence of `silence_s` is death. Parts
are numbered: what was lost on the way is wanted again, what came twice is dropped. A leader keeps an ended answer until
its followers have it, so that a Redis that stalls or restarts in the middle delays an answer and does not lose it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from orchestrator.broadcast import Broadcast
from orchestrator.choices import of_row
from orchestrator.domain import Chunk
from orchestrator.errors import InternalError, Text, TruthGPTError, UpstreamUnavailable
from orchestrator.store import Store, worker_channel

log = logging.getLogger(__name__)

_PART_CHARS, _PART_CHUNKS = 16 << 10, 512  # a part is cut after these


@dataclass(frozen=True)
class Times:
    """Seconds. `coalesce_s`: chunks within it travel together. `tick_s`: how soon a follower sees that Redis is away.

    `patience_s`: how long a follower that has shown some of an answer waits for a Redis that went away.
    """

    renew_s: float = 1.0
    lock_s: float = 3.0
    beat_s: float = 0.4
    silence_s: float = 1.5
    coalesce_s: float = 0.02
    tick_s: float = 0.05
    patience_s: float = 15.0


class Followed(Enum):
    """How following ended."""

    ENDED = "ended"  # the whole answer is there
    GONE = "gone"  # the leader does not make it (any more)
    SILENT = "silent"  # the leader is dead
    AWAY = "away"  # Redis is


class Relay:
    """Both halves for one process. `find`: the answer that this process makes under a key, if it does."""

    def __init__(self, store: Store, times: Times, find: Callable[[str], Broadcast | None]) -> None:
        self._store, self._times, self._find = store, times, find
        self._ears: dict[str, asyncio.Queue[dict[str, Any]]] = {}
        self._sending: dict[tuple[int, str], _Follower] = {}

    def listen(self) -> Callable[[], None]:
        """Hear this process's channel from now on; the returned function ends that."""
        return self._store.subscribe(worker_channel(self._store.worker), self._heard)

    # the follower's half

    async def follow(self, cast: Broadcast, key: str, leader: str) -> Followed:
        """Fill `cast` with what `leader` sends. Anything but ENDED means that nothing was received.

        Raises the error that ended the answer, or UpstreamUnavailable when the leader was lost in its middle.
        """
        ear = self._ears[key] = asyncio.Queue()
        number = 0  # of the leader's broadcast, once it is known
        said = time.monotonic()
        # Counted in ticks: a time in which this process itself stood still says nothing about others.
        silent_s = away_s = 0.0
        self._say(leader, want=key, number=number, start=0)
        try:
            while True:
                message = await _next(ear, self._times.tick_s)
                now = time.monotonic()
                if message is not None:
                    if number not in (0, message["number"]):
                        continue  # of an answer that was followed here before
                    silent_s, number = 0.0, message["number"]
                    if message.get("gone"):
                        if cast.chunks:
                            raise UpstreamUnavailable("the other worker no longer has the answer that it began")
                        return Followed.GONE
                    if self._take(cast, message):
                        return Followed.ENDED
                elif not self._store.up:
                    if not cast.chunks:
                        return Followed.AWAY
                    away_s += self._times.tick_s
                    if away_s > self._times.patience_s:
                        raise UpstreamUnavailable("Redis went away in the middle of another worker's answer")
                    silent_s = said = 0.0  # nobody can be heard; ask at once when it is back
                    continue
                else:
                    silent_s += self._times.tick_s
                    if silent_s > self._times.silence_s:
                        if cast.chunks:
                            raise UpstreamUnavailable("the worker that made this answer is gone")
                        return Followed.SILENT
                away_s = 0.0
                if now - said > self._times.beat_s:
                    said = now
                    self._say(leader, want=key, number=number, start=len(cast.chunks))
        finally:
            if self._ears.get(key) is ear:
                del self._ears[key]
            self._say(leader, leave=key, number=number)

    def _take(self, cast: Broadcast, message: dict[str, Any]) -> bool:
        """Keep what is new of a part; whether the answer is whole."""
        cast.outcome.fallback = message["fallback"]
        new = message["chunks"][max(0, len(cast.chunks) - message["start"]) :]
        if message["start"] <= len(cast.chunks):  # else a part before it was lost: the next beat asks for it
            for text, tokens, prompt_tokens, finish_reason, *rows in new:
                choices = tuple(map(of_row, rows))
                cast.add(Chunk(text, tokens, prompt_tokens, finish_reason, choices=choices))
        if not message["ended"] or len(cast.chunks) < message["start"] + len(message["chunks"]):
            return False
        if message["error"] is not None:
            raise unpack_error(message["error"])
        return True

    # the leader's half

    def beat(self) -> None:
        """Say to every follower that its answer is still made; forget those that are silent. Called every `beat_s`."""
        for follower in list(self._sending.values()):
            follower.silent_s += self._times.beat_s
            if not self._store.up:
                follower.silent_s = 0.0  # nobody can be heard
            elif follower.silent_s > self._times.silence_s:
                self._forget(follower)
            else:
                follower.flush()

    def close(self) -> None:
        """Send every follower the rest of its answer if that has ended, else send it away: this process stops."""
        for follower in self._sending.values():
            if follower.cast.ended:
                follower.flush()
            else:
                follower.stop()
                follower.say({"number": follower.cast.number, "gone": True})
        self._sending.clear()

    def _follower(self, key: str, message: dict[str, Any]) -> _Follower | None:
        """Who sent this, if it follows an answer of ours; who does not know the answer's number yet is known too."""
        number = message["number"]
        if number == 0 and (cast := self._find(key)) is not None:
            number = cast.number
        return self._sending.get((number, message["by"]))

    def _wanted(self, message: dict[str, Any]) -> None:
        key, number, worker = message["want"], message["number"], message["by"]
        follower = self._follower(key, message)
        if follower is None:
            cast = self._find(key)
            if cast is None or number not in (0, cast.number):
                self._say(worker, key=key, number=number, gone=True)
                return
            follower = _Follower(cast, worker, lambda part: self._say(worker, key=key, **part), self._times.coalesce_s)
            self._sending[follower.id] = follower
            cast.join(follower)
        follower.silent_s, follower.sent = 0.0, message["start"]
        follower.flush()

    def _forget(self, follower: _Follower) -> None:
        self._sending.pop(follower.id, None)
        follower.stop()
        follower.cast.leave(follower)

    # the bus

    def _say(self, worker: str, **message: Any) -> None:
        payload = json.dumps({**message, "by": self._store.worker}, separators=(",", ":")).encode()
        self._store.publish(worker_channel(worker), payload)

    def _heard(self, payload: bytes) -> None:
        try:
            message = json.loads(payload)
            if "want" in message:
                self._wanted(message)
            elif "leave" in message:
                if (follower := self._follower(message["leave"], message)) is not None:
                    self._forget(follower)
            elif (ear := self._ears.get(message["key"])) is not None:
                ear.put_nowait(message)
        except (ValueError, KeyError, TypeError):
            log.warning("a message on the bus makes no sense", exc_info=True)


class _Follower:
    """One other process that listens to a broadcast; `sent` counts the chunks that it was sent."""

    def __init__(self, cast: Broadcast, worker: str, say: Callable[[dict[str, Any]], None], coalesce_s: float) -> None:
        self.id = cast.number, worker
        self.cast, self.sent, self.silent_s = cast, 0, 0.0
        self.say, self._coalesce_s = say, coalesce_s
        self._timer: asyncio.TimerHandle | None = None
        self._flushed = 0.0

    def wake(self) -> None:
        if self._timer is None:
            loop = asyncio.get_running_loop()
            wait_s = 0.0 if self.cast.ended else max(0.0, self._flushed + self._coalesce_s - loop.time())
            self._timer = loop.call_later(wait_s, self.flush)

    def flush(self) -> None:
        """Send what is new, or that nothing is."""
        self.stop()
        self._flushed = asyncio.get_running_loop().time()
        cast, whole = self.cast, False
        while not whole:
            part = _part(cast.chunks, self.sent)
            whole = self.sent + len(part) >= len(cast.chunks)
            ended = cast.ended and whole
            self.say({
                "number": cast.number, "start": self.sent, "chunks": part, "fallback": cast.outcome.fallback,
                "ended": ended, "error": pack_error(cast.error) if ended and cast.error else None,
            })  # fmt: skip
            self.sent += len(part)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _part(chunks: list[Chunk], start: int) -> list[tuple[object, ...]]:
    """The chunks from `start`, as many as one message may hold, at least one if there is one.

    Each is text, tokens, tokens of the prompt and the finish reason, and the rows of its choices if it has any.
    """
    part: list[tuple[object, ...]] = []
    chars = 0
    for chunk in chunks[start : start + _PART_CHUNKS]:
        rows = [choice.row() for choice in chunk.choices]
        part.append((chunk.text, chunk.tokens, chunk.prompt_tokens, chunk.finish_reason, *rows))
        chars += len(chunk.text) + sum(len(choice.logprobs) for choice in chunk.choices)
        if chars >= _PART_CHARS:
            break
    return part


async def _next(ear: asyncio.Queue[dict[str, Any]], timeout_s: float) -> dict[str, Any] | None:
    try:
        async with asyncio.timeout(timeout_s):
            return await ear.get()
    except TimeoutError:  # it may have come in the same moment
        return None if ear.empty() else ear.get_nowait()


def pack_error(error: TruthGPTError) -> dict[str, Any]:
    """An error as JSON: its class, its sentence in each language, its detail and its plain attributes."""
    plain = {name: value for name, value in vars(error).items() if isinstance(value, (str, int, float, type(None)))}
    return {"class": type(error).__name__, "text": asdict(error.text), "detail": str(error), "attributes": plain}


def unpack_error(packed: dict[str, Any]) -> TruthGPTError:
    """The same error again; InternalError if this release does not know its class."""
    kind = _classes(TruthGPTError).get(packed["class"], InternalError)
    error = kind.__new__(kind)  # its own arguments became text and attributes when it was made
    TruthGPTError.__init__(error, Text(**packed["text"]), packed["detail"])
    vars(error).update(packed["attributes"])
    return error


def _classes(root: type[TruthGPTError]) -> dict[str, type[TruthGPTError]]:
    found = {root.__name__: root}
    for kind in root.__subclasses__():
        found |= _classes(kind)
    return found
