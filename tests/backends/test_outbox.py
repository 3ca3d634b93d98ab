import gc
import threading
import time
import weakref
from collections.abc import Iterator
from functools import partial

import pytest

from backends.inflight.errors import EngineError, Internal
from backends.inflight.outbox import KEEP_ALIVE_S, Outbox
from backends.inflight.sequence import Delta
from tests.clock import awake


class Client:
    """A responder that remembers; `broken` sends raise, as they do when shared memory is full."""

    def __init__(self, broken: int = 0) -> None:
        self.got: list[tuple[str, str, int]] = []
        self.failure: EngineError | None = None
        self.broken, self.gone, self.started = broken, False, False
        self.started_with: list[bool] = []
        self.ended = threading.Event()
        self.late = 0  # what came after the last response

    def send(self, text: str, finish: str, tokens: int, final: bool) -> None:
        self.late += self.ended.is_set()
        if self.broken:
            self.broken -= 1
            raise RuntimeError("no shared memory")
        self.got.append((text, finish, tokens))
        self.started_with.append(self.started)
        if final:
            self.ended.set()

    def fail(self, error: EngineError) -> None:
        self.late += self.ended.is_set()
        self.failure = error
        self.ended.set()

    def is_cancelled(self) -> bool:
        return self.gone


@pytest.fixture
def outbox() -> Iterator[Outbox]:
    box = Outbox()
    box.start()
    yield box
    box.stop(2)
    assert not box._thread.is_alive() and not box._open


def test_an_answer_arrives_whole_and_ends_once(outbox: Outbox):
    """All text and every token counted, the finish reason in the last response only, and nothing after it."""
    client = Client()
    stream = outbox.open(client, True)
    for i in range(500):
        stream.delta(Delta(f"{i} ", 1, "length" if i == 499 else None))
    stream.error(Internal("too late"))
    assert client.ended.wait(5)
    time.sleep(0.3)
    assert "".join(text for text, _, _ in client.got) == "".join(f"{i} " for i in range(500))
    assert sum(tokens for _, _, tokens in client.got) == 500
    assert [finish for _, finish, _ in client.got if finish] == ["length"] == [client.got[-1][1]]
    assert client.failure is None and not client.late


def test_without_streaming_there_is_one_response(outbox: Outbox):
    """Text is kept until the end, and no keep-alive is sent."""
    client = Client()
    stream = outbox.open(client, False)
    stream.delta(Delta("one ", 1))
    time.sleep(2 * KEEP_ALIVE_S)
    stream.delta(Delta("two", 1, "stop"))
    assert client.ended.wait(5)
    assert client.got == [("one two", "stop", 2)]


def test_the_text_before_a_failure_is_sent_before_it(outbox: Outbox):
    """What was generated reaches a streaming client although the failure came before it was sent."""
    client = Client()
    stream = outbox.open(client, True)
    with outbox._lock:  # the sending thread comes too late to see the two apart
        stream.delta(Delta("one ", 1))
        stream.error(Internal("not finite"))
    assert client.ended.wait(5)
    assert client.got == [("one ", "", 1)] and str(client.failure) == "not finite"


def test_a_silent_stream_is_kept_alive_and_a_cancelled_one_ends(outbox: Outbox):
    """Empty responses at least every 250 ms; a hang-up is seen, told to the engine and closed."""
    client, told = Client(), threading.Event()
    stream = outbox.open(client, True)
    stream.attach(told.set)
    began = awake()
    while len(client.got) < 4:
        assert awake() - began < 1.1
        time.sleep(0.01)
    assert set(client.got) == {("", "", 0)}
    client.gone = True
    assert told.wait(5) and client.ended.wait(5)
    count = len(client.got)
    stream.delta(Delta("late", 1, "stop"))
    time.sleep(0.3)
    assert len(client.got) == count and not client.late


@pytest.mark.parametrize("how", ["ends", "fails", "hangs up", "hung up before"])
def test_a_stream_that_has_ended_is_freed_without_a_collection(outbox: Outbox, how: str):
    """Stream and sequence refer to each other, and the stream to Triton's response sender, which must not stay."""

    class Sequence:
        cancelled = False

    client, sequence = Client(), Sequence()
    sequence.sink = stream = outbox.open(client, True)
    if how == "hung up before":
        client.gone = True
        assert client.ended.wait(5)
    stream.attach(partial(setattr, sequence, "cancelled", True))
    if how == "ends":
        stream.delta(Delta("one", 1, "stop"))
    elif how == "fails":
        stream.error(Internal("no"))
    client.gone = True
    assert client.ended.wait(5)
    began = awake()
    while outbox._open:
        assert awake() - began < 5
        time.sleep(0.001)
    assert sequence.cancelled is how.startswith("h")
    sender, here = weakref.ref(client), gc.isenabled()
    gc.disable()
    try:
        del client, sequence, stream
        while sender() is not None:  # its sending thread is about to end its round
            assert awake() - began < 5
            time.sleep(0.01)
    finally:
        if here:
            gc.enable()


@pytest.mark.parametrize("finish", [None, "stop"])
def test_a_response_that_cannot_be_sent_ends_its_stream_with_an_error(outbox: Outbox, finish):
    """Triton keeps a request until its last response: one that could not be sent is followed by an error."""
    client, other, told = Client(broken=1), Client(), threading.Event()
    stream, good = outbox.open(client, True), outbox.open(other, True)
    stream.attach(told.set)
    stream.delta(Delta("one", 1, finish))
    assert client.ended.wait(5) and isinstance(client.failure, Internal)
    assert told.is_set(), "the engine goes on for nobody"
    good.delta(Delta("two", 1, "stop"))
    assert other.ended.wait(5) and other.got[-1] == ("two", "stop", 1)


def test_who_waited_is_told_of_the_slot_before_the_first_text(outbox: Outbox):
    """The notice is a response of its own, also where text has caught up with it; keep-alives before it say nothing."""
    client = Client()
    stream = outbox.open(client, True)
    began = awake()
    while not client.got:
        assert awake() - began < 1.5 * KEEP_ALIVE_S
        time.sleep(0.001)
    with outbox._lock:  # the sending thread comes too late to see the two apart
        stream.admitted()
        stream.delta(Delta("one", 1))
    stream.delta(Delta("", 1, "stop"))
    assert client.ended.wait(5)
    notice = client.started_with.index(True)
    assert notice >= 1 and set(client.got[: notice + 1]) == {("", "", 0)}
    assert "".join(text for text, _, _ in client.got[notice + 1 :]) == "one"
    assert client.got[-1][1] == "stop" and not client.late


def test_a_notice_goes_out_at_once_and_to_streams_only(outbox: Outbox):
    """An admission is not kept until the next keep-alive, and one answer without streaming stays one response."""
    client, whole = Client(), Client()
    stream, other = outbox.open(client, True), outbox.open(whole, False)
    began = awake()
    stream.admitted()
    other.admitted()
    while not client.got:
        assert awake() - began < KEEP_ALIVE_S / 2
        time.sleep(0.001)
    for each in (stream, other):
        each.delta(Delta("one", 1, "stop"))
    assert client.ended.wait(5) and whole.ended.wait(5)
    assert client.got == [("", "", 0), ("one", "stop", 1)] and whole.got == [("one", "stop", 1)]
