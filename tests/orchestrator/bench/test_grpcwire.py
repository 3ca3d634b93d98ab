"""KServe over gRPC, against real gRPC servers that are good or not."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from orchestrator.api import grpc_messages as messages
from orchestrator.bench.answers import Answer, BenchError, Fault
from orchestrator.bench.grpcwire import FINAL, REQUESTS_A_CHANNEL, GrpcWire
from orchestrator.bench.plan import PlanError, Prompt, Target
from orchestrator.bench.running import measure
from tests.e2e.stack import free_ports

from .servers import SIZED, load

SERVICE = "inference.GRPCInferenceService"
Stream = Callable[[Any, Any], AsyncIterator[bytes]]  # request, context -> messages


def packed(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data


def response(text: str, tokens: int = 1, reason: str = "", final: bool = False) -> bytes:
    """One message of a generation."""
    made = messages.StreamResponse()
    rows = (("text_output", "BYTES", packed(text)), ("finish_reason", "BYTES", packed(reason)),
            ("num_output_tokens", "UINT32", struct.pack("<I", tokens)),
            ("num_input_tokens", "UINT32", struct.pack("<I", 4)))  # fmt: skip
    for name, datatype, data in rows:
        made.infer_response.outputs.add(name=name, datatype=datatype, shape=(1,))
        made.infer_response.raw_output_contents.append(data)
    made.infer_response.parameters[FINAL].bool_param = final
    return bytes(made.SerializeToString())


def ended() -> bytes:
    """The empty final response."""
    made = messages.StreamResponse()
    made.infer_response.parameters[FINAL].bool_param = True
    return bytes(made.SerializeToString())


class Served:
    def __init__(self) -> None:
        self.url = ""
        self.asked: list[tuple[Any, dict[str, Any]]] = []
        self.most = self.under_way = 0


async def good(request: Any, context: Any) -> AsyncIterator[bytes]:
    yield response("one")
    yield response(" two", reason="stop")
    yield ended()


async def embeds(request: Any, context: Any) -> bytes:
    made = messages.InferResponse()
    made.outputs.add(name="embedding", datatype="FP32", shape=(1, 2))
    made.raw_output_contents.append(struct.pack("<2f", 0.5, 0.25))
    made.outputs.add(name="num_input_tokens", datatype="UINT32", shape=(1,))
    made.raw_output_contents.append(struct.pack("<I", 6))
    return bytes(made.SerializeToString())


@asynccontextmanager
async def serving(
    stream: Stream = good, infer: Callable[[Any, Any], Awaitable[bytes]] = embeds
) -> AsyncIterator[Served]:
    """A server on a port of its own whose every answer a test gives."""
    served = Served()

    async def streamed(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for raw in requests:
            request = messages.InferRequest.FromString(raw)
            served.asked.append((request, dict(context.invocation_metadata())))
            served.under_way += 1
            served.most = max(served.most, served.under_way)
            try:
                async for message in stream(request, context):
                    yield message
            finally:
                served.under_way -= 1

    async def unary(raw: bytes, context: Any) -> bytes:
        request = messages.InferRequest.FromString(raw)
        served.asked.append((request, dict(context.invocation_metadata())))
        return await infer(request, context)

    server = grpc.aio.server()
    handlers = {"ModelStreamInfer": grpc.stream_stream_rpc_method_handler(streamed),
                "ModelInfer": grpc.unary_unary_rpc_method_handler(unary)}  # fmt: skip
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    served.url = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield served
    finally:
        await server.stop(None)


def target(served: Served, **more: Any) -> Target:
    return Target(served.url, "kserve-grpc", "demo", **more)


async def ask(served: Served, asked: int = 8, **more: Any) -> Answer:
    wire, answer = GrpcWire(target(served, **more), load()), Answer(asked)
    try:
        async with asyncio.timeout(20):
            await wire.ask(Prompt("hello"), 8, answer)
    finally:
        await wire.close()
    return answer


async def test_a_generation_and_what_was_asked_for() -> None:
    """The vLLM backend's tensors, the final response, the key and no-cache as metadata."""
    async with serving() as served:
        answer = await ask(served, api_key="the-key", headers=(("X-Team", "a"),))
    assert answer.tokens == 2 and answer.prompt_tokens == 4 and answer.last >= answer.first > 0
    ((request, metadata),) = served.asked
    assert request.model_name == "demo" and request.parameters["triton_enable_empty_final_response"].bool_param
    tensors = dict(zip([one.name for one in request.inputs], request.raw_input_contents, strict=True))
    assert tensors["text_input"] == packed("hello") and tensors["stream"] == b"\1"
    assert b'"max_tokens":8' in tensors["sampling_parameters"] and tensors["return_num_output_tokens"] == b"\1"
    assert metadata["authorization"] == "Bearer the-key" and metadata["x-team"] == "a"
    assert metadata["cache-control"] == "no-cache" and metadata["triton_grpc_error"] == "true"


async def test_a_header_of_the_users_own_stands_in_place_of_ours() -> None:
    """Never two of one name."""
    async with serving() as served:
        given = (("Authorization", "Basic x"), ("cache-control", "max-age=1"))
        await ask(served, api_key="key", headers=given)
    metadata = served.asked[0][1]
    assert metadata["authorization"] == "Basic x" and metadata["cache-control"] == "max-age=1"


async def test_tokens_are_stamped_when_their_message_comes() -> None:
    """80 ms between two messages; the empty one before them is no token, and the end is not the last."""

    async def paced(request: Any, context: Any) -> AsyncIterator[bytes]:
        yield response("", 0)
        for text, reason in (("a", ""), ("b", ""), ("", "stop")):
            await asyncio.sleep(0.08)
            yield response(text, 1 if text else 0, reason)

    async with serving(paced) as served:
        began = time.perf_counter()
        answer = await ask(served)
        ended = time.perf_counter()
    assert answer.first - began >= 0.07 and ended - answer.last >= 0.07 and len(answer.gaps) == 1


async def test_an_answer_in_one_piece_has_its_first_token_at_its_end() -> None:
    """Without a stream the same call brings one response."""

    async def whole(request: Any, context: Any) -> AsyncIterator[bytes]:
        yield response("one two", 2, "stop", final=True)

    async with serving(whole) as served:
        answer = await ask(served, stream=False)
    assert answer.tokens == 2 and answer.first == answer.last
    assert served.asked[0][0].raw_input_contents[1] == b"\0"


async def errs(request: Any, context: Any) -> AsyncIterator[bytes]:
    yield response("one")
    yield bytes(messages.StreamResponse(error_message="boom").SerializeToString())


async def cut(request: Any, context: Any) -> AsyncIterator[bytes]:
    yield response("one")


async def empty(request: Any, context: Any) -> AsyncIterator[bytes]:
    yield response("", 0, "stop")
    yield ended()


async def garbage(request: Any, context: Any) -> AsyncIterator[bytes]:
    yield b"\xff" * 50


async def half(request: Any, context: Any) -> AsyncIterator[bytes]:
    made = messages.StreamResponse()
    made.infer_response.outputs.add(name="text_output", datatype="BYTES", shape=(1,))
    made.infer_response.raw_output_contents.append(b"\xff\xff\xff\xffabc")
    yield bytes(made.SerializeToString())


async def numberless(request: Any, context: Any) -> AsyncIterator[bytes]:
    made = messages.StreamResponse()
    made.infer_response.outputs.add(name="num_output_tokens", datatype="UINT32", shape=(1,))
    yield bytes(made.SerializeToString())


async def lies(request: Any, context: Any) -> AsyncIterator[bytes]:
    yield response("one", 4_000_000_000, "stop")


async def ceaseless(request: Any, context: Any) -> AsyncIterator[bytes]:
    for _ in range(100_000):
        yield response("a", 0)


async def large(request: Any, context: Any) -> AsyncIterator[bytes]:
    yield b"x" * (65 << 20)


def aborts(code: grpc.StatusCode) -> Stream:
    async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        yield response("one")
        await context.abort(code, "as the test says")

    return stream


@pytest.mark.parametrize(
    ("stream", "kind"),
    [
        (errs, "in_band"), (cut, "no_end"), (empty, "no_tokens"), (garbage, "nonsense"), (half, "nonsense"),
        (numberless, "nonsense"), (lies, "wrong_usage"), (ceaseless, "endless"), (large, "grpc_resource_exhausted"),
        (aborts(grpc.StatusCode.UNAVAILABLE), "grpc_unavailable"), (aborts(grpc.StatusCode.INTERNAL), "grpc_internal"),
        (aborts(grpc.StatusCode.CANCELLED), "grpc_cancelled"),
        (aborts(grpc.StatusCode.RESOURCE_EXHAUSTED), "grpc_resource_exhausted"),
    ],
)  # fmt: skip
async def test_a_bad_server_is_a_fault_with_its_kind(stream: Stream, kind: str) -> None:
    """None hangs, none is an answer, none ends the measurement: a server's own cancellation neither."""
    async with serving(stream) as served:
        with pytest.raises(Fault) as caught:
            await ask(served)
        run = await measure(target(served), load(requests=2), sizing=SIZED)
    assert caught.value.kind == kind and str(caught.value)
    assert run.errors.keys() == {kind} and run.error_count == 2


async def test_nobody_there_and_an_unknown_service() -> None:
    """A refused connection at once; a server without the service says so."""
    gone = Target(f"127.0.0.1:{free_ports(1)[0]}", "kserve-grpc", "demo")
    with pytest.raises(BenchError, match="grpc_unavailable") as caught:
        await measure(gone, load())
    assert "HOST:PORT" in caught.value.hint
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with pytest.raises(BenchError, match="grpc_unimplemented"):
        await measure(Target(f"127.0.0.1:{port}", "kserve-grpc", "demo"), load())
    await server.stop(None)


async def test_many_at_once_share_connections_and_a_slow_one_is_cancelled() -> None:
    """More requests at once than one connection takes; one that is given up is cancelled at the server."""
    gone = asyncio.Event()

    async def slow(request: Any, context: Any) -> AsyncIterator[bytes]:
        try:
            await asyncio.sleep(0.05 if len(served.asked) < 100 else 30)
        except asyncio.CancelledError:
            gone.set()
            raise
        async for message in good(request, context):
            yield message

    clients = 2 * REQUESTS_A_CHANNEL + 1
    async with serving(slow) as served:
        run = await measure(target(served), load(requests=60, concurrency=clients), sizing=SIZED)
        assert run.completed == 60 and REQUESTS_A_CHANNEL < served.most <= clients
        served.asked *= 2
        run = await measure(target(served), load(timeout_s=0.3), sizing=SIZED)
        assert run.errors == {"timeout": (1, "no token within 0.3 s")}
        await asyncio.wait_for(gone.wait(), 10)


async def test_an_encoder() -> None:
    """Any output is an answer; parameters travel with their types."""
    async with serving() as served:
        wire = GrpcWire(
            target(served, task="encode"), load(extra_body={"a": True, "b": 3, "c": 0.5, "d": "x"})
        )  # fmt: skip
        answer = Answer(0)
        await wire.ask(Prompt("hello"), 8, answer)
        await wire.close()
    assert answer.prompt_tokens == 6 and answer.first == answer.last > 0
    parameters = served.asked[0][0].parameters
    assert parameters["a"].bool_param and parameters["b"].int64_param == 3
    assert parameters["c"].double_param == 0.5 and parameters["d"].string_param == "x"


async def test_an_encoder_that_answers_nothing() -> None:
    """A response without data is a fault."""

    async def nothing(request: Any, context: Any) -> bytes:
        return bytes(messages.InferResponse(model_name="demo").SerializeToString())

    async with serving(infer=nothing) as served:
        with pytest.raises(Fault) as caught:
            await ask(served, asked=0, task="encode")
    assert caught.value.kind == "no_tokens"


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, 1 << 63, -(1 << 63) - 1])
def test_parameters_that_grpc_cannot_carry_are_refused(value: Any) -> None:
    """Before anything is sent, by name."""
    with pytest.raises(PlanError):
        encoder = Target("host:1", "kserve-grpc", "demo", task="encode")
        GrpcWire(encoder, load(extra_body={"odd": value}))


def test_certificates_that_are_none(tmp_path: Path) -> None:
    """A missing file is said before anything is sent."""
    with pytest.raises(BenchError, match="missing") as caught:
        GrpcWire(Target("grpcs://host", "kserve-grpc", "demo", ca_file=str(tmp_path / "missing")), load())
    assert "--ca-file" in caught.value.hint
