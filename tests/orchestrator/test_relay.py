"""The relay over a bus that loses, repeats and delays what it is told; and what errors look like on it."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import errors
from orchestrator.broadcast import Broadcast
from orchestrator.choices import Choice
from orchestrator.domain import Chunk
from orchestrator.errors import Overloaded, TruthGPTError, UpstreamUnavailable
from orchestrator.relay import Followed, Relay, Times, pack_error, unpack_error
from orchestrator.store import Store, worker_channel

from .conftest import until

QUICK = Times(beat_s=0.01, silence_s=0.1, coalesce_s=0.002, tick_s=0.005, patience_s=0.3)


@dataclass
class Bus:
    """Publish/subscribe in this process. `fate` decides how often a message arrives: 0 is lost, 2 is twice."""

    fate: Callable[[], int] = lambda: 1
    handlers: dict[str, Callable[[bytes], None]] = field(default_factory=dict)
    largest: int = 0


@dataclass
class Line:
    """What the relay needs of a Store, on a Bus."""

    bus: Bus
    worker: str
    up: bool = True

    def publish(self, channel: str, payload: bytes) -> None:
        self.bus.largest = max(self.bus.largest, len(payload))
        for _ in range(self.bus.fate() if self.up else 0):
            asyncio.get_running_loop().call_soon(self._deliver, channel, payload)

    def _deliver(self, channel: str, payload: bytes) -> None:
        if channel in self.bus.handlers and self.up:
            self.bus.handlers[channel](payload)

    def subscribe(self, channel: str, handler: Callable[[bytes], None]) -> Callable[[], None]:
        self.bus.handlers[channel] = handler
        return lambda: cast(None, self.bus.handlers.pop(channel))


class Pair:
    """A leader that makes `made` under the key "k", and a follower."""

    def __init__(self, bus: Bus | None = None, times: Times = QUICK) -> None:
        self.bus = bus or Bus()
        self.lines = [Line(self.bus, "leader"), Line(self.bus, "follower")]
        self.emptied = 0
        self.made: Broadcast | None = Broadcast(self._count)
        self.got = Broadcast(lambda: None)
        self.relays = [
            Relay(cast(Store, line), times, lambda key: self.made if key == "k" else None) for line in self.lines
        ]
        for relay in self.relays:
            relay.listen()

    def _count(self) -> None:
        self.emptied += 1

    def follow(self) -> asyncio.Task[Followed]:
        return asyncio.create_task(self.relays[1].follow(self.got, "k", "leader"))

    async def beating(self) -> None:
        while True:
            self.relays[0].beat()
            await asyncio.sleep(QUICK.beat_s)


def chunks_of(count: int) -> list[Chunk]:
    made = [Chunk(f"{n} ", 1, 5) for n in range(count)]
    for chunk in made[::2]:
        chunk.choices = (Choice(1, chunk.text, 1, None, '[{"token": "a"}]'), Choice(0, "", 0, "stop"))
    return [*made, Chunk("", 0, 5, "stop")]


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.integers(0, 30), st.booleans())
def test_an_answer_arrives_over_a_bad_bus(seed: int, count: int, fails: bool) -> None:
    """Whatever is lost or comes twice, the follower gets exactly the leader's chunks, and the error if there is one."""

    async def check() -> None:
        chance = random.Random(seed)
        pair = Pair(Bus(lambda: chance.choice([0, 0, 1, 1, 1, 2])), Times(**{**vars(QUICK), "silence_s": 5.0}))
        beating = asyncio.create_task(pair.beating())
        following = pair.follow()
        made = cast(Broadcast, pair.made)
        for chunk in chunks_of(count):
            await asyncio.sleep(chance.random() * 0.002)
            made.add(chunk)
        made.end(Overloaded("full") if fails else None)
        try:
            if fails:
                with pytest.raises(Overloaded):
                    await following
            else:
                assert await following is Followed.ENDED
            assert pair.got.chunks == chunks_of(count)
        finally:
            beating.cancel()

    asyncio.run(check())


async def test_a_late_follower_gets_all_and_says_goodbye() -> None:
    """Everything so far comes in one message, and the leader forgets the follower when it has the end."""
    pair = Pair()
    made = cast(Broadcast, pair.made)
    for chunk in chunks_of(5):
        made.add(chunk)
    following = pair.follow()
    await until(lambda: len(pair.got.chunks) == 6)
    made.end()
    assert await following is Followed.ENDED and pair.got.chunks == made.chunks
    await until(lambda: not pair.relays[0]._sending)
    assert pair.emptied == 0  # it had ended


async def test_messages_are_bounded() -> None:
    """A megabyte that was made before the follower came travels in parts."""
    pair = Pair()
    made = cast(Broadcast, pair.made)
    for _ in range(100):
        made.add(Chunk("ñ" * 10_000, 1, 1))
    made.end()
    assert await pair.follow() is Followed.ENDED
    assert pair.got.chunks == made.chunks and pair.bus.largest < 200_000


async def test_chunks_travel_together() -> None:
    """The first goes at once, and those of one moment in one message."""
    sent: list[dict[str, Any]] = []
    pair = Pair(times=Times(coalesce_s=0.02))
    following = pair.follow()
    await until(lambda: bool(pair.relays[0]._sending))
    await asyncio.sleep(0.03)
    heard = pair.bus.handlers[worker_channel("follower")]
    pair.bus.handlers[worker_channel("follower")] = lambda payload: (sent.append(json.loads(payload)), heard(payload))[
        1
    ]
    made = cast(Broadcast, pair.made)
    for chunk in chunks_of(20):
        made.add(chunk)
        await asyncio.sleep(0)
    made.end()
    assert await following is Followed.ENDED
    assert [len(message["chunks"]) for message in sent if message["chunks"]][0] <= 2 and len(sent) <= 4


async def test_a_key_that_nobody_makes_is_gone() -> None:
    """The follower is told at once, not after a silence."""
    pair = Pair(times=Times(silence_s=60.0))
    pair.made = None
    assert await asyncio.wait_for(pair.follow(), 1.0) is Followed.GONE


@pytest.mark.parametrize("shown", [False, True])
async def test_a_leader_that_falls_silent_is_dead(shown: bool) -> None:
    """Before the first chunk the follower may do without it; after it the answer cannot be had any more."""
    pair = Pair()
    following = pair.follow()
    if shown:
        cast(Broadcast, pair.made).add(Chunk("a"))
        await until(lambda: bool(pair.got.chunks))
    del pair.bus.handlers[worker_channel("leader")]
    if shown:
        with pytest.raises(UpstreamUnavailable, match="is gone"):
            await following
    else:
        assert await following is Followed.SILENT


async def test_a_leader_that_thinks_is_not_dead() -> None:
    """Beats keep a follower of a slow model for longer than the silence."""
    pair = Pair()
    beating = asyncio.create_task(pair.beating())
    following = pair.follow()
    await asyncio.sleep(4 * QUICK.silence_s)
    assert not following.done()
    cast(Broadcast, pair.made).end()
    assert await following is Followed.ENDED
    beating.cancel()


@pytest.mark.parametrize("goodbye", [True, False])
async def test_the_last_follower_that_leaves_or_dies_ends_the_answer(goodbye: bool) -> None:
    """At once when it says so, after the silence when it does not."""
    pair = Pair()
    beating = asyncio.create_task(pair.beating())
    following = pair.follow()
    await until(lambda: bool(pair.relays[0]._sending))
    if not goodbye:
        pair.lines[1].publish = lambda *_: None  # type: ignore[method-assign]
    following.cancel()
    waited_s = await until(lambda: pair.emptied == 1)
    assert goodbye or waited_s > QUICK.silence_s / 2
    beating.cancel()


async def test_redis_away_before_the_first_chunk() -> None:
    """The follower is free at once."""
    pair = Pair(times=Times(silence_s=60.0))
    following = pair.follow()
    await asyncio.sleep(0.02)
    pair.lines[1].up = False
    assert await asyncio.wait_for(following, 0.5) is Followed.AWAY


@pytest.mark.parametrize("back", [True, False])
async def test_redis_away_in_the_middle(back: bool) -> None:
    """The leader keeps the end of its answer until Redis is back; a follower's patience has an end."""
    pair = Pair()
    beating = asyncio.create_task(pair.beating())
    following = pair.follow()
    made = cast(Broadcast, pair.made)
    made.add(Chunk("a"))
    await until(lambda: bool(pair.got.chunks))
    for line in pair.lines:
        line.up = False
    made.add(Chunk("b", finish_reason="stop"))
    made.end()
    pair.made = None
    await asyncio.sleep(2 * QUICK.silence_s)
    if back:
        for line in pair.lines:
            line.up = True
            await asyncio.sleep(3 * QUICK.beat_s)  # the leader sees it first
        assert await following is Followed.ENDED and pair.got.chunks == made.chunks
    else:
        with pytest.raises(UpstreamUnavailable, match="Redis"):
            await following
    beating.cancel()


@pytest.mark.parametrize("noise", [b"", b"\xff", b"[]", b"7", b'"want"', b"{}", b'{"want": "k"}', b'{"leave": []}'])
async def test_nonsense_on_the_bus_is_dropped(noise: bytes) -> None:
    """It raises nothing and changes nothing."""
    pair = Pair()
    pair.bus.handlers[worker_channel("leader")](noise)
    assert not pair.relays[0]._sending


def every(kind: type[TruthGPTError]) -> list[type[TruthGPTError]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in every(child))]


@pytest.mark.parametrize("kind", every(errors.TruthGPTError), ids=lambda kind: kind.__name__)
def test_an_error_is_the_same_on_the_other_side(kind: type[TruthGPTError]) -> None:
    """Class, sentences, detail and what edges make headers of survive the way, for the whole tree."""
    error = kind.__new__(kind)
    TruthGPTError.__init__(error, errors.Text("It failed.", "Falló."), "detail")
    error.retry_after_s, error.param = 2.5, "model"
    found = unpack_error(json.loads(json.dumps(pack_error(error))))
    assert type(found) is kind and str(found) == "detail" and found.text == error.text
    assert (found.kind, found.retryable, found.retry_after_s, found.param) == (kind.kind, kind.retryable, 2.5, "model")


def test_an_error_of_another_release_is_internal() -> None:
    """A class that is not known here, with its sentence kept."""
    packed = pack_error(Overloaded("full")) | {"class": "FromTheFuture"}
    assert type(unpack_error(packed)) is errors.InternalError and "llena" in unpack_error(packed).text.es
