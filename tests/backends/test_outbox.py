import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ids
from types import SimpleNamespace

import pytest

from backends.inflight.answer import Answer, Part
from backends.inflight.errors import EngineError, Internal, Unavailable
from backends.inflight.outbox import KEEP_ALIVE_S, Outbox
from backends.inflight.sampling import Pick
from backends.inflight.sequence import Delta
from backends.inflight.stream import Stream
from tests.clock import awake

from .fakes import letters

WORDS = ("zero ", "one ", "two ", "three ")


class Client:
    """A responder that remembers; `broken` sends raise, as they do when shared memory is full; each takes `cost_s`."""

    def __init__(self, broken: int = 0, cost_s: float = 0.0) -> None:
        self.got: list[list[Part]] = []
        self.failure: EngineError | None = None
        self.broken, self.cost_s, self.gone, self.started, self.cached = broken, cost_s, False, False, 0
        self.started_with: list[bool] = []
        self.cached_with: list[int] = []
        self.ended = threading.Event()
        self.late = 0  # what came after the last response

    def send(self, parts: Ids[Part], final: bool) -> None:
        self.late += self.ended.is_set()
        if self.broken:
            self.broken -= 1
            raise RuntimeError("no shared memory")
        time.sleep(self.cost_s)
        self.got.append(list(parts))
        self.started_with.append(self.started)
        self.cached_with.append(self.cached)
        if final:
            self.ended.set()

    def fail(self, error: EngineError) -> None:
        self.late += self.ended.is_set()
        self.failure = error
        self.ended.set()

    def is_cancelled(self) -> bool:
        return self.gone

    @property
    def said(self) -> list[tuple[str, str, int]]:
        """Text, finish reason and tokens of each response with one answer."""
        return [(part.text, part.finish, part.tokens) for (part,) in self.got]

    def texts(self, number: int = 0) -> str:
        return "".join(parts[number].text for parts in self.got)


def words(ids: Ids[int]) -> str:
    return "".join(WORDS[i] for i in ids)


def say(stream: Stream, *tokens: int, finish: str | None = None, answer: int = 0, logprob: float | None = None) -> None:
    """What the engine does with each token; the last one may end the answer."""
    for place, token in enumerate(tokens, 1):
        stream.sinks[answer].delta(Delta(Pick(token, logprob), finish if place == len(tokens) else None))


@pytest.fixture
def outbox() -> Iterator[Outbox]:
    box = Outbox()
    box.start()
    yield box
    box.stop(2)
    assert not box._thread.is_alive() and not box._open


@pytest.fixture
def begin(outbox: Outbox) -> Callable[..., Stream]:
    def begin(client: Client, streaming: bool = True, answers: int = 1, keep: int | None = None) -> Stream:
        return outbox.open(client, streaming, [Answer(words) for _ in range(answers)], keep)

    return begin


def test_an_answer_arrives_whole_and_ends_once(outbox: Outbox):
    """All text and every token counted, the finish reason in the last response only, and nothing after it."""
    client = Client()
    stream = outbox.open(client, True, [Answer(letters)])
    say(stream, *range(500), finish="length")
    stream.error(Internal("too late"))
    assert client.ended.wait(5)
    time.sleep(0.3)
    assert client.texts() == letters(range(500))
    assert sum(tokens for _, _, tokens in client.said) == 500
    assert [finish for _, finish, _ in client.said if finish] == ["length"] == [client.said[-1][1]]
    assert client.failure is None and not client.late


def test_without_streaming_there_is_one_response(begin):
    """Text is kept until the end, and no keep-alive is sent."""
    client = Client()
    stream = begin(client, streaming=False)
    say(stream, 1)
    time.sleep(2 * KEEP_ALIVE_S)
    say(stream, 2, finish="length")
    assert client.ended.wait(5)
    assert client.said == [("one two ", "length", 2)]


def test_an_end_token_is_counted_and_not_shown(begin):
    """Without stop strings the outbox makes the text, and the token that ends an answer has none."""
    client = Client()
    say(begin(client, streaming=False), 1, 2, finish="stop")
    assert client.ended.wait(5) and client.said == [("one ", "stop", 2)]


def test_text_that_the_engine_made_is_sent_as_it_is(begin):
    """Where stop strings decide the end, the outbox makes no text of its own."""
    client = Client()
    sink = begin(client, streaming=False).sinks[0]
    sink.delta(Delta(Pick(1), None, "o"))
    sink.delta(Delta(Pick(2), "stop", ""))
    assert client.ended.wait(5) and client.said == [("o", "stop", 2)]


def test_the_text_before_a_failure_is_sent_before_it(outbox: Outbox, begin):
    """What was generated reaches a streaming client although the failure came before it was sent."""
    client = Client()
    stream = begin(client)
    with outbox._lock:  # the sending thread comes too late to see the two apart
        say(stream, 1)
        stream.error(Internal("not finite"))
    assert client.ended.wait(5)
    assert client.said == [("one ", "", 1)] and str(client.failure) == "not finite"


def test_a_silent_stream_is_kept_alive_and_a_cancelled_one_ends(begin):
    """Empty responses at least every 250 ms; a hang-up is seen, told to every sequence and closed."""
    client, sequences = Client(), [SimpleNamespace(cancelled=False, cached=0) for _ in range(2)]
    stream = begin(client, answers=2)
    stream.attach(*sequences)
    began = awake()
    while len(client.got) < 4:
        assert awake() - began < 1.1
        time.sleep(0.01)
    assert all(parts == [Part(), Part()] for parts in client.got)
    client.gone = True
    assert client.ended.wait(5) and all(sequence.cancelled for sequence in sequences)
    count = len(client.got)
    say(stream, 1, finish="stop")
    time.sleep(0.3)
    assert len(client.got) == count and not client.late


@pytest.mark.parametrize("how", ["ends", "fails", "hangs up", "hung up before"])
def test_a_stream_that_has_ended_is_freed_without_a_collection(outbox: Outbox, begin, how: str):
    """Stream and sequence refer to each other, and the stream to Triton's response sender, which must not stay."""

    class Sequence:
        cancelled, cached = False, 0

    client, sequence = Client(), Sequence()
    stream = begin(client)
    sequence.sink = stream.sinks[0]
    if how == "hung up before":
        client.gone = True
        assert client.ended.wait(5)
    stream.attach(sequence)
    if how == "ends":
        say(stream, 1, finish="stop")
    elif how == "fails":
        stream.error(Internal("no"))
    client.gone = True
    assert client.ended.wait(5)
    began = awake()
    while outbox._open:
        assert awake() - began < 5
        time.sleep(0.001)
    assert sequence.cancelled is (how != "ends")
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


@pytest.mark.parametrize("finish", [None, "length"])
def test_a_response_that_cannot_be_sent_ends_its_stream_with_an_error(begin, finish):
    """Triton keeps a request until its last response: one that could not be sent is followed by an error."""
    client, other, sequence = Client(broken=1), Client(), SimpleNamespace(cancelled=False, cached=0)
    stream, good = begin(client), begin(other)
    stream.attach(sequence)
    say(stream, 1, finish=finish)
    assert client.ended.wait(5) and isinstance(client.failure, Internal)
    assert sequence.cancelled, "the engine goes on for nobody"
    say(good, 2, finish="length")
    assert other.ended.wait(5) and other.said[-1] == ("two ", "length", 1)


def test_who_waited_is_told_of_the_slot_before_the_first_text(outbox: Outbox, begin):
    """The notice is a response of its own, also where text has caught up with it; keep-alives before it say nothing."""
    client = Client()
    stream = begin(client)
    began = awake()
    while not client.got:
        assert awake() - began < 1.5 * KEEP_ALIVE_S
        time.sleep(0.001)
    with outbox._lock:  # the sending thread comes too late to see the two apart
        stream.sinks[0].admitted()
        say(stream, 1)
    say(stream, 0, finish="stop")
    assert client.ended.wait(5)
    notice = client.started_with.index(True)
    assert notice >= 1 and set(client.said[: notice + 1]) == {("", "", 0)}
    assert "".join(text for text, _, _ in client.said[notice + 1 :]) == "one "
    assert client.said[-1][1] == "stop" and not client.late


def test_a_notice_goes_out_at_once_and_to_streams_only(begin):
    """An admission is not kept until the next keep-alive, and one answer without streaming stays one response."""
    client, whole = Client(), Client()
    stream, other = begin(client), begin(whole, streaming=False)
    began = awake()
    stream.sinks[0].admitted()
    other.sinks[0].admitted()
    while not client.got:
        assert awake() - began < KEEP_ALIVE_S / 2
        time.sleep(0.001)
    for each in (stream, other):
        say(each, 1, finish="length")
    assert client.ended.wait(5) and whole.ended.wait(5)
    assert client.said == [("", "", 0), ("one ", "length", 1)] and whole.said == [("one ", "length", 1)]


def test_the_answers_of_a_request_come_side_by_side(begin):
    """Each response has an element an answer, a finish reason stands where its answer ends, and the last ends all."""
    client = Client()
    stream = begin(client, answers=2)
    say(stream, 1, 2, finish="length", answer=1)
    began = awake()
    while not any(parts[1].finish for parts in client.got):
        assert awake() - began < 5 and not client.ended.is_set()
        time.sleep(0.001)
    say(stream, 3, 0, finish="stop")
    assert client.ended.wait(5) and not client.late
    assert (client.texts(0), client.texts(1)) == ("three ", "one two ")
    for number, (finish, tokens) in enumerate([("stop", 2), ("length", 2)]):
        assert [parts[number].finish for parts in client.got if parts[number].finish] == [finish]
        assert sum(parts[number].tokens for parts in client.got) == tokens
    assert client.got[-1][0].finish == "stop"


def test_one_answer_that_fails_ends_its_request_and_cancels_the_others(begin):
    """The client gets the error once, and nobody goes on generating for it."""
    client, sequences = Client(), [SimpleNamespace(cancelled=False, cached=0) for _ in range(3)]
    stream = begin(client, streaming=False, answers=3)
    stream.attach(*sequences)
    say(stream, 1, finish="length", answer=0)
    stream.sinks[1].error(Internal("not finite"))
    stream.sinks[2].error(Unavailable("too late"))
    assert client.ended.wait(5) and str(client.failure) == "not finite"
    assert all(sequence.cancelled for sequence in sequences) and not client.got and not client.late


def test_the_best_answers_are_returned_best_first(begin):
    """Of best_of answers the n with the highest mean log-probability; a longer answer is not worse for its length."""
    client = Client()
    stream = begin(client, streaming=False, answers=4, keep=2)
    for answer, (tokens, logprob) in enumerate([((0, 0), -2.0), ((1, 1, 1), -0.5), ((2,), -1.0), ((3,), -9.0)]):
        say(stream, *tokens, finish="length", answer=answer, logprob=logprob)
    assert client.ended.wait(5)
    assert [[part.text for part in parts] for parts in client.got] == [["one one one ", "two "]]


def test_every_answer_begins_with_the_echo(begin):
    """The prompt's text stands once in front of each answer, also of one without text."""
    client = Client()
    stream = begin(client, answers=2)
    stream.echo("say: ")
    say(stream, 1, 2, 0, finish="stop")
    say(stream, 0, finish="stop", answer=1)
    assert client.ended.wait(5)
    assert (client.texts(0), client.texts(1)) == ("say: one two ", "say: ")


def test_what_the_first_answer_took_from_the_prefix_cache_is_told(begin):
    """The count is the engine's of the first sequence, known by the first response with text."""
    client, sequences = Client(), [SimpleNamespace(cancelled=False, cached=cached) for cached in (7, 9)]
    stream = begin(client, answers=2)
    stream.attach(*sequences)
    for answer in range(2):
        say(stream, 1, finish="length", answer=answer)
    assert client.ended.wait(5) and set(client.cached_with) == {7}


@pytest.fixture
def paused() -> Iterator[Outbox]:
    """An outbox that makes a pause of a minute after each round of several streams."""
    box = Outbox(share=1e-9, pause_s=60)
    box.start()
    yield box
    box.stop(2)


def wait_for(check: Callable[[], bool]) -> None:
    began = awake()
    while not check():
        assert awake() - began < 5
        time.sleep(0.001)


def test_in_a_pause_text_piles_up_and_what_is_urgent_goes_out(paused: Outbox):
    """The first text of a stream and its end do not wait for the next round; what piled up is one response."""
    clients = [Client() for _ in range(3)]
    streams = [paused.open(client, True, [Answer(words)]) for client in clients]
    for stream, client in zip(streams[:2], clients, strict=False):
        say(stream, 1)
        wait_for(lambda client=client: client.texts() == "one ")
    with paused._lock:  # both are in one round
        for stream in streams[:2]:
            say(stream, 2)
    wait_for(lambda: clients[0].texts() == clients[1].texts() == "one two ")
    for _ in range(5):
        for stream in streams[:2]:
            say(stream, 3)
    say(streams[2], 1)
    wait_for(lambda: clients[2].texts() == "one ")
    assert clients[0].texts() == clients[1].texts() == "one two "
    say(streams[0], 0, finish="stop")
    assert clients[0].ended.wait(5) and clients[0].said[-1] == ("three " * 5, "stop", 6)
    assert clients[1].texts() == "one two "
    paused.stop(5)
    assert [part for part in clients[1].said if part[0]][-1] == ("three " * 5, "", 5)


def test_many_streams_lose_nothing_to_pauses(begin):
    """However the text is cut into responses, each stream gets all of its own, in order."""
    clients = [Client(cost_s=0.004) for _ in range(8)]
    streams = [begin(client) for client in clients]
    for i in range(60):
        for stream in streams:
            say(stream, i % 4, finish="length" if i == 59 else None)
        time.sleep(0.005)
    for client in clients:
        assert client.ended.wait(5) and client.texts() == words([0, 1, 2, 3] * 15)
        assert sum(tokens for _, _, tokens in client.said) == 60


def test_a_stream_that_is_alone_gets_each_token_by_itself(begin):
    """No pause is made for one stream, whatever a response costs, so that every token is a response of its own."""
    client = Client(cost_s=0.005)
    stream = begin(client)
    for _ in range(20):
        count = len(client.got)
        say(stream, 1)
        began = awake()
        while len(client.got) == count:
            assert awake() - began < 5
            time.sleep(0.0005)
    say(stream, 0, finish="stop")
    assert client.ended.wait(5) and [tokens for text, _, tokens in client.said if text] == [1] * 20
