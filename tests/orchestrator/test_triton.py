"""The Triton client against every fault a server can show on a socket."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.domain import Chunk, GenerateRequest, Message
from orchestrator.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    OutOfMemory,
    Overloaded,
    TruthGPTError,
    UpstreamError,
    UpstreamUnavailable,
)
from orchestrator.sse import EventParser
from orchestrator.triton import Attendance, Deadlines, Heartbeat, Triton
from orchestrator.triton.wire import pieces
from tests.clock import awake

from .conftest import until
from .fake_triton import FakeTriton, Step, answer, event, failure


@pytest.fixture
async def triton(fake: FakeTriton) -> AsyncIterator[Triton]:
    """Patient: a machine that stands still for a moment ends no request."""
    async with connected(fake, Deadlines(stall_s=5.0, first_token_s=8.0, request_s=12.0, heartbeat_s=5.0)) as client:
        yield client


@asynccontextmanager
async def connected(fake: FakeTriton, deadlines: Deadlines) -> AsyncIterator[Triton]:
    client = Triton(fake.url, deadlines, 50)
    yield client
    await client.close()


def request(**changes: Any) -> GenerateRequest:
    return GenerateRequest(**{"id": "r1", "model": "m", "accepted_at": time.monotonic(), "text": "Hola", **changes})


async def read(triton: Triton, asked: GenerateRequest | None = None) -> list[Chunk]:
    chunks: list[Chunk] = []
    await triton.stream(asked or request(), Attendance(), taking(chunks))
    return chunks


def taking(chunks: list[Chunk], upto: int = 1000) -> Callable[[Chunk], bool]:
    """Keeps chunks, and wants no more than so many."""

    def put(chunk: Chunk) -> bool:
        chunks.append(chunk)
        return len(chunks) >= upto

    return put


async def test_a_stream_and_what_is_sent(triton: Triton, fake: FakeTriton) -> None:
    """Chunks carry text, counts and the finish reason; the request has the backend's names and keeps traceparent."""
    asked = request(temperature=0.5, top_k=3, seed=7, stop=("x",), traceparent="00-1", max_tokens=9)
    chunks = await read(triton, asked)
    assert [chunk.text for chunk in chunks] == ["Hola", ", ", "¿qué tal?"]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "stop"]
    assert {chunk.prompt_tokens for chunk in chunks} == {3}
    (sent,) = fake.requests
    sampling = json.loads(sent.pop("sampling_parameters"))
    assert sent == {
        "id": "r1", "text_input": "Hola", "stream": True, "return_finish_reason": True,
        "return_num_input_tokens": True, "return_num_output_tokens": True,
    }  # fmt: skip
    assert sampling == {
        "max_tokens": 9, "temperature": 0.5, "top_p": 1.0, "top_k": 3, "seed": 7, "stop": ["x"], "timeout_s": 12.0,
    }  # fmt: skip
    assert fake.headers[0]["traceparent"] == "00-1"


async def test_messages_and_token_ids_travel_in_the_parameters(triton: Triton, fake: FakeTriton) -> None:
    """A chat is sent as messages and a token list as prompt_token_ids, both with an empty text_input."""
    await read(triton, request(text=None, messages=(Message("user", "¿Sí?"),)))
    await read(triton, request(text=None, token_ids=(1, 2)))
    first, second = (json.loads(sent["sampling_parameters"]) for sent in fake.requests)
    assert first["messages"] == [{"role": "user", "content": "¿Sí?"}]
    assert second["prompt_token_ids"] == [1, 2]
    assert {sent["text_input"] for sent in fake.requests} == {""}


async def test_keep_alives_do_not_rise_and_their_tokens_are_kept(triton: Triton, fake: FakeTriton) -> None:
    """Empty chunks only keep the stream alive; tokens whose text comes later are counted with it."""
    fake.script = [event(), 0.3, event(), 0.3, event("", tokens=2), event("ñ"), event("", "length"), "end"]
    assert [(c.text, c.tokens, c.finish_reason) for c in await read(triton)] == [("ñ", 3, None), ("", 0, "length")]


async def test_connections_are_reused(triton: Triton, fake: FakeTriton) -> None:
    """An answer read to its end gives its connection back to the pool."""
    for _ in range(5):
        await read(triton)
    assert len(fake._writers) == 1


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("invalid_argument: max_tokens is 99; no room", InvalidRequest),
        ("resource_exhausted: the queue is full", Overloaded),
        ("out_of_memory: the cuda has not enough memory left", OutOfMemory),
        ("deadline_exceeded: too late", DeadlineExceeded),
        ("unavailable: the engine is stopping", UpstreamUnavailable),
        ("internal: NaN", UpstreamError),
        ("cancelled: gone", Cancelled),
        ("Stub process 'm_0_0' is not healthy.", UpstreamUnavailable),
        ("Request for unknown model: 'm' is not found", UpstreamUnavailable),
        ("in ensemble 'm', internal: nested", UpstreamError),
        ("something new", UpstreamError),
    ],
)
@pytest.mark.parametrize("status", [200, 400, 500])
async def test_error_bodies(
    triton: Triton, fake: FakeTriton, status: int, message: str, expected: type[TruthGPTError]
) -> None:
    """A plain error body is translated by what it says, whatever its status, 200 too."""
    fake.status, fake.content_type = status, "application/json"
    fake.plain = json.dumps({"error": message}).encode()
    with pytest.raises(expected) as caught:
        await read(triton, request(max_tokens=99))
    assert type(caught.value) is expected
    if expected is InvalidRequest:
        assert caught.value.param == "max_tokens"
        assert caught.value.text.en == "max_tokens is 99; no room"


async def test_default_max_tokens_yields_to_the_room_left(triton: Triton, fake: FakeTriton) -> None:
    """A prompt that leaves less room than the gateway's own default is answered; one that asked for more is refused."""
    refusal = {"error": "invalid_argument: max_tokens is 50; 60 prompt tokens leave 4"}
    fake.refusals = [json.dumps(refusal).encode()] * 2
    with pytest.raises(InvalidRequest):
        await read(triton, request(max_tokens=50))
    assert len(await read(triton)) == 3
    sampling = [json.loads(sent["sampling_parameters"]) for sent in fake.requests]
    assert [values.get("max_tokens") for values in sampling] == [50, 50, None]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ([event("a"), failure("internal: NaN"), "end"], UpstreamError),
        ([failure("resource_exhausted: full"), "end"], Overloaded),
        ([event("a"), "close"], UpstreamUnavailable),
        ([event("a"), "end"], UpstreamUnavailable),
        (["close"], UpstreamUnavailable),
        ([event("a"), math.inf], UpstreamUnavailable),
        ([math.inf], UpstreamUnavailable),
        ([b"data: {nonsense\n\n", "end"], UpstreamError),
        ([b"data: [1]\n\n", "end"], UpstreamError),
        ([b'data: {"text_output": "a", "num_output_tokens": "x"}\n\n', "end"], UpstreamError),
        ([b'data: {"finish_reason": ""}\n\n', "end"], UpstreamError),
        ([event("a", "because"), "end"], UpstreamError),
        ([b"garbage" * 1000, "end"], UpstreamUnavailable),
        ([b"x" * 600_000, b"x" * 600_000, math.inf], UpstreamError),
    ],
)
async def test_stream_faults(fake: FakeTriton, script: list[Step], expected: type[TruthGPTError]) -> None:
    """Silence, cuts, early ends, nonsense and in-band errors each become one of our errors in time."""
    fake.script = script
    began = awake()
    async with connected(fake, Deadlines(stall_s=1.5)) as triton:
        with pytest.raises(expected) as caught:
            await read(triton)
    assert type(caught.value) is expected
    assert awake() - began < 2.0


async def test_refused_and_unanswered_connections(fake: FakeTriton) -> None:
    """A stopped Triton accepts and stays silent, a killed one refuses: both are UpstreamUnavailable in time."""
    fake.stopped = True
    async with connected(fake, Deadlines(stall_s=0.4)) as triton:
        with pytest.raises(UpstreamUnavailable, match=r"nothing for 0\.4 s"):
            await read(triton)
        await fake.stop()
        with pytest.raises(UpstreamUnavailable, match="connection"):
            await read(triton)
        await fake.start()


async def test_the_total_deadline_counts_from_acceptance(fake: FakeTriton) -> None:
    """What a request waited before its turn is gone from its deadline, and with none left nothing is sent."""
    fake.script = [step for _ in range(40) for step in (event("a"), 0.05)] + [math.inf]
    async with connected(fake, Deadlines(request_s=1.2)) as triton:
        now, began = time.monotonic(), awake()
        with pytest.raises(DeadlineExceeded):
            await read(triton, request(accepted_at=now - 0.9))
        assert time.monotonic() - now > 0.2 and awake() - began < 0.8
        sent = len(fake.requests)
        with pytest.raises(DeadlineExceeded):
            await read(triton, request(accepted_at=now - 5))
    assert len(fake.requests) == sent


@pytest.mark.parametrize(("chunk", "limit"), [(event(), 0.8), (event("a"), 1.2)])
async def test_first_token_and_total_deadlines(fake: FakeTriton, chunk: Step, limit: float) -> None:
    """Keep-alives hold a stream open no longer than the first-token deadline, tokens no longer than the total one."""
    fake.script = [step for _ in range(30) for step in (chunk, 0.1)]
    async with connected(fake, Deadlines(first_token_s=0.8, request_s=1.2)) as triton:
        now, began = time.monotonic(), awake()
        with pytest.raises(DeadlineExceeded):
            await read(triton)
        assert time.monotonic() - now > limit - 0.1 and awake() - began < limit + 0.5


async def test_wanting_no_more_hangs_up(triton: Triton, fake: FakeTriton) -> None:
    """Whoever wants no more closes the connection, which is what cancels the request in the backend."""
    fake.script = [event("a"), event("b"), math.inf]
    chunks: list[Chunk] = []
    await triton.stream(request(), Attendance(), taking(chunks, 1))
    assert [chunk.text for chunk in chunks] == ["a"]
    assert await until(lambda: fake.hang_ups == 1) < 0.3 and fake.running == 0


@pytest.mark.parametrize("script", [[math.inf], [event("a"), math.inf]])
async def test_failing_an_attendance_ends_its_stream_at_once(
    triton: Triton, fake: FakeTriton, script: list[Step]
) -> None:
    """fail() interrupts a stream wherever it waits, with the error it was given."""
    fake.script = script
    attendance = Attendance()

    async def consume() -> None:
        await triton.stream(request(), attendance, lambda chunk: False)

    reading = asyncio.create_task(consume())
    await until(lambda: fake.running == 1)
    await asyncio.sleep(0.05)
    began = awake()
    attendance.fail(Overloaded("x"))
    attendance.fail(DeadlineExceeded("a later error does not replace the first"))
    with pytest.raises(Overloaded):
        await reading
    assert awake() - began < 0.1


async def test_cancelling_the_task_is_not_an_error_of_triton(triton: Triton, fake: FakeTriton) -> None:
    """A cancelled reader raises CancelledError, not a time-out in disguise, and hangs up."""
    fake.script = [math.inf]
    reading = asyncio.create_task(read(triton))
    await until(lambda: fake.running == 1)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await until(lambda: fake.hang_ups == 1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6), st.data())
def test_chunks_split_at_any_byte(texts: list[str], data: st.DataObject) -> None:
    """Triton's bytes cut anywhere give the same chunks."""
    wire = b"".join(event(text) for text in texts) + event("", "stop")
    cuts = data.draw(st.lists(st.integers(1, len(wire) - 1), max_size=10, unique=True).map(sorted))
    parser = EventParser()
    parts = [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    assert [piece.text for part in parts for piece in pieces(parser, part)] == [*texts, ""]


async def test_bytes_one_by_one_over_the_socket(triton: Triton, fake: FakeTriton) -> None:
    """A stream that arrives byte by byte, cut inside characters, is read like any other."""
    wire = b"".join(step for step in answer("¿Qué", " niño", "!") if isinstance(step, bytes))
    fake.script = [*(wire[at : at + 1] for at in range(len(wire))), "end"]
    assert "".join(chunk.text for chunk in await read(triton)) == "¿Qué niño!"


async def test_lists_of_one_are_scalars(triton: Triton, fake: FakeTriton) -> None:
    """A tensor that Triton writes as a list of one element is read as its element."""
    fields = {"text_output": ["a"], "finish_reason": ["stop"], "num_output_tokens": [1], "num_input_tokens": 2}
    fake.script = [b"data: " + json.dumps(fields).encode() + b"\n\n", "end"]
    assert await read(triton) == [Chunk("a", 1, 2, "stop")]


async def test_heartbeat_index_and_config(triton: Triton, fake: FakeTriton) -> None:
    """The unary calls return typed values; of several versions the ready one counts."""
    assert await triton.heartbeat("m") == Heartbeat(0, 0, 4, 0.0, False, version="1")
    fake.beat |= {"device": "cpu", "fallback": True}
    assert await triton.heartbeat("m") == Heartbeat(0, 0, 4, 0.0, False, device="cpu", fallback=True, version="1")
    assert await triton.index() == {"m": ("1", "READY")}
    config = await triton.model_config("m")
    assert (config.task, config.chat, config.max_len) == ("text_generation", True, 64)


@pytest.mark.parametrize(
    ("backend", "groups", "processes"),
    [
        ("inflight", [], 1),
        ("encoder", [{"kind": "KIND_CPU", "count": 2, "gpus": []}], 2),
        ("encoder", [{"count": 2, "gpus": [0, 1]}, {"kind": "KIND_CPU"}], 5),
        ("python", [{"count": 3}], 3),
        ("onnxruntime", [{"count": 3}], 0),
    ],
)
async def test_processes_are_counted_as_loaded(
    triton: Triton, fake: FakeTriton, backend: str, groups: list[dict[str, Any]], processes: int
) -> None:
    """Each instance of a Python-based backend is a process, one for each GPU of its group; others have none."""
    fake.config_facts = {"backend": backend, "instance_group": groups}
    assert (await triton.model_config("m")).processes == processes


async def test_heartbeat_faults(triton: Triton, fake: FakeTriton) -> None:
    """A dead stub, a nonsense answer, a stopped server and a refused connection are told apart from an answer."""
    fake.beat_error = "Stub process 'm' is not healthy."
    with pytest.raises(UpstreamUnavailable):
        await triton.heartbeat("m")
    fake.beat_error = "Request for unknown model: 'm' is not found"
    with pytest.raises(ModelNotFound):
        await triton.heartbeat("m")
    fake.beat_error, fake.beat = None, {"running": 1}
    with pytest.raises(UpstreamError):
        await triton.heartbeat("m")
    fake.stopped = True
    began = awake()
    async with connected(fake, Deadlines(heartbeat_s=0.3)) as hasty:
        with pytest.raises(UpstreamUnavailable, match="did not answer"):
            await hasty.heartbeat("m")
    assert awake() - began < 0.6
