"""The gRPC edge in front of a Triton that misbehaves on demand, with the stub that Triton's own client has."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import redis
from grpc._cython import cygrpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from orchestrator.api import grpc_infer
from orchestrator.app import Application
from orchestrator.incident import Incident
from orchestrator.keys import subject_of
from orchestrator.ops.keyring import Keyring
from tests.clock import awake
from tests.redis import RealRedis

from ..conftest import Stack, serving, until
from ..fake_triton import FakeTriton, answer, event, failure
from .calls import ask, number, stub, texts, told

FINAL = "triton_final_response"
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
async def stack(fake: FakeTriton) -> AsyncIterator[Stack]:
    async with serving(fake, grpc=True) as running:
        yield running


@pytest.fixture
async def calls(stack: Stack) -> AsyncIterator[Any]:
    async with stub(stack.grpc) as connected:
        yield connected


def incidents(stack: Stack) -> list[Incident]:
    """What the edge reports from now on."""
    application: Any = stack.server.config.app
    assert isinstance(application, Application) and application.grpc is not None
    seen: list[Incident] = []
    report = application.grpc.door._report

    def noted(incident: Incident) -> None:
        seen.append(incident)
        report(incident)

    application.grpc.door._report = noted
    return seen


async def test_infer_collects_a_generation_models_stream(stack: Stack, calls: Any) -> None:
    """One answer to one request, with its id, and the outputs that were asked for in the form that Triton gives."""
    request = ask(id="r1", max_tokens=9)
    request.outputs.add(name="text_output")
    request.outputs.add(name="num_output_tokens")
    response = await calls.ModelInfer(request)
    assert (response.model_name, response.model_version, response.id) == ("m", "1", "r1")
    assert texts(response) == ["Hola, ¿qué tal?"]
    assert [(o.name, o.datatype, list(o.shape)) for o in response.outputs] == [
        ("text_output", "BYTES", [1]), ("num_output_tokens", "UINT32", [1]),
    ]  # fmt: skip
    assert response.raw_output_contents[1] == b"\3\0\0\0"
    assert json.loads(stack.fake.requests[-1]["sampling_parameters"])["max_tokens"] == 9
    assert (stack.records[-1].edge, stack.records[-1].route) == ("grpc", "inference.GRPCInferenceService/ModelInfer")


@pytest.mark.parametrize("streamed", [False, True])
async def test_every_declared_output_may_be_asked_for(stack: Stack, calls: Any, streamed: bool) -> None:
    """As perf_analyzer asks for all of them: `logprobs` is left out as Triton does; an unknown name is refused."""
    request = ask(stream=streamed)
    for output in ("text_output", "finish_reason", "logprobs", "num_input_tokens", "num_output_tokens"):
        request.outputs.add(name=output)
    if streamed:
        responses = [response.infer_response async for response in calls.ModelStreamInfer(iter([request]))]
        assert len(responses) == 3
    else:
        responses = [await calls.ModelInfer(request)]
    sent = ["text_output", "finish_reason", "num_input_tokens", "num_output_tokens"]
    assert [[output.name for output in response.outputs] for response in responses] == [sent] * len(responses)
    request.outputs.add(name="no")
    with pytest.raises(grpc.aio.AioRpcError, match="unexpected inference output 'no'") as caught:
        await calls.ModelInfer(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_stream_gives_the_chunks_as_they_come(stack: Stack, calls: Any, fake: FakeTriton) -> None:
    """Each chunk is a response with the request's id; only the last one is final; the prompt stands in front if asked
    for.
    """
    request = ask("uno ", id="s1", stream=True)
    for name, value in (("return_finish_reason", True), ("exclude_input_in_output", False)):
        request.parameters[name].bool_param = value
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    responses = [response async for response in calls.ModelStreamInfer(iter([request]))]
    assert [response.error_message for response in responses] == [""] * 3
    assert [texts(r.infer_response)[0] for r in responses] == ["uno Hola", ", ", "¿qué tal?"]
    assert [r.infer_response.parameters[FINAL].bool_param for r in responses] == [False, False, True]
    assert {r.infer_response.id for r in responses} == {"s1"}
    assert [o.name for o in responses[0].infer_response.outputs] == ["text_output", "finish_reason"]
    assert [r.infer_response.raw_output_contents[1] for r in responses] == [b"\0\0\0\0"] * 2 + [b"\4\0\0\0stop"]


async def test_requests_of_one_stream_are_answered_beside_each_other(stack: Stack, fake: FakeTriton) -> None:
    """A quick request overtakes a slow one that was sent first; each is a request of its own with an id of its own."""
    fake.by_text = {"slow": [event("a"), 0.3, *answer("b")], "quick": answer("c")}
    async with stub(stack.grpc) as calls:
        requests = [ask("slow", id="1", stream=True), ask("quick", id="2"), number("nope"), ask("quick", id="3")]
        call = calls.ModelStreamInfer(iter(requests), metadata=(("x-request-id", "mine"),))
        responses = [response async for response in call]
    order = [r.infer_response.id for r in responses if not r.error_message]
    assert order.index("2") < len(order) - 1 and order[-1] == "1"
    (failed,) = [r for r in responses if r.error_message]
    assert "'nope'" in failed.error_message and failed.infer_response.parameters[FINAL].bool_param
    assert {record.id for record in stack.records} == {"mine", "mine-1", "mine-3"}
    assert [tuple(pair) for pair in await call.initial_metadata()] == [("x-request-id", "mine")]


async def test_an_error_is_a_response_or_the_streams_status(stack: Stack, fake: FakeTriton) -> None:
    """In a response the stream goes on behind it; with triton_grpc_error it ends the stream and all that runs there."""
    fake.by_text = {"bad": [event("a"), failure("unavailable: gone")], "long": [event("a"), math.inf]}
    async with stub(stack.grpc) as calls:
        call = calls.ModelStreamInfer(iter([ask("bad", id="1", stream=True)]))
        responses = [response async for response in call]
        assert [bool(r.error_message) for r in responses] == [False, True]
        assert responses[1].infer_response.id == "1" and not responses[1].infer_response.outputs
        assert (await told(call))[0] is grpc.StatusCode.OK
        call = calls.ModelStreamInfer(
            iter([ask("long", stream=True), ask("bad", stream=True)]), metadata=(("triton_grpc_error", "true"),)
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [response async for response in call]
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "model is not available" in str(caught.value.details())
        assert int((await told(call))[2]["retry-after"]) >= 1
        await until(lambda: fake.running == 0 and stack.gateway.in_flight == 0)
    assert [record.outcome for record in stack.records[1:]] in (["error", "cancelled"], ["cancelled", "error"])


async def test_only_so_many_requests_of_one_stream_run_at_once(
    stack: Stack, fake: FakeTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound the next request is not even read, and all are answered in the end."""
    monkeypatch.setattr(grpc_infer, "AT_ONCE", 3)
    fake.script = [0.05, *answer("x")]
    async with stub(stack.grpc) as calls:
        requests = [ask(f"prompt {n}", id=str(n)) for n in range(10)]
        ids = [r.infer_response.id async for r in calls.ModelStreamInfer(iter(requests))]
    assert sorted(ids) == [str(n) for n in range(10)]
    assert fake.most_running == 3


async def test_metadata_are_the_headers_of_http(stack: Stack, calls: Any, fake: FakeTriton) -> None:
    """Request id, trace, language and task are read from metadata by the names that HTTP has."""
    metadata = (("x-request-id", "abc-1"), ("traceparent", PARENT), ("x-truthgpt-task", "translation"))
    call = calls.ModelInfer(ask(), metadata=metadata)
    await call
    assert (await told(call))[2]["x-request-id"] == "abc-1"
    record = stack.records[-1]
    assert (record.id, record.task, record.traceparent) == ("abc-1", "translation", PARENT)
    assert fake.headers[-1]["traceparent"].split("-")[1] == PARENT.split("-")[1]
    for language, word in (("es", "disponible"), ("en", "served"), ("fr", "served")):
        call = calls.ModelInfer(ask(model="nope"), metadata=(("accept-language", language),))
        code, details, end = await told(call)
        assert (code, word in details) == (grpc.StatusCode.NOT_FOUND, True)
        assert len(end["x-request-id"]) == 32
    assert (await told(calls.ModelInfer(ask(), metadata=(("x-truthgpt-task", "cooking"),))))[0] is (
        grpc.StatusCode.INVALID_ARGUMENT
    )


async def test_credentials_limits_and_cache_are_those_of_http(fake: FakeTriton, server: RealRedis) -> None:
    """A key opens either edge, its limits are counted over both, and one's answer is the other's cache hit."""
    with redis.Redis.from_url(server.url) as client:
        ring = Keyring(client)
        key = ring.create("acme", "inference", {"per_minute": 4}, None, "")[1]
        late = ring.create("acme", "inference", {}, None, "")
    async with serving(fake, grpc=True, redis_url=server.url, auth="keys") as stack, stub(stack.grpc) as calls:
        seen = incidents(stack)
        for bad in ((), (("x-api-key", "tg_nonsense"),), (("authorization", "Bearer "), ("x-api-key", "x" * 600))):
            assert (await told(calls.ModelInfer(ask(), metadata=bad)))[0] is grpc.StatusCode.UNAUTHENTICATED
            assert (await told(calls.ServerMetadata(pb.ServerMetadataRequest(), metadata=bad)))[0] is (
                grpc.StatusCode.UNAUTHENTICATED
            )
        assert {(one.kind, one.edge, one.caller, one.address) for one in seen} == {
            ("unauthenticated", "grpc", "", "127.0.0.1")
        }
        assert {one.operation for one in seen} == {
            f"inference.GRPCInferenceService/{name}" for name in ("ModelInfer", "ServerMetadata")
        }
        assert (await calls.ServerLive(pb.ServerLiveRequest())).live
        status, _, headers = await stack.post("/v2/models/m/generate", {"text_input": "Hola"}, **{"x-api-key": key})
        assert (status, headers["x-cache"]) == (200, "miss")
        call = calls.ModelInfer(ask(), metadata=(("authorization", f"bearer {key}"),))
        await call
        end = (await told(call))[2]
        assert (end["x-cache"], end["x-ratelimit-remaining-requests"]) == ("hit", "2")
        call = calls.ModelInfer(ask(), metadata=(("x-api-key", key), ("cache-control", "no-store")))
        await call
        assert (await told(call))[2]["x-cache"] == "bypass"
        await calls.ModelInfer(ask(), metadata=(("x-api-key", key),))
        code, details, end = await told(calls.ModelInfer(ask(), metadata=(("x-api-key", key),)))
        assert (code, "per minute" in details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
        assert int(end["retry-after"]) >= int(end["ratelimit"].rpartition("t=")[2]) > 0
        before = len(seen)
        open_stream = calls.ModelStreamInfer(metadata=(("x-api-key", late[1]),))
        await open_stream.write(ask(id="1"))
        assert (await open_stream.read()).infer_response.id == "1"
        with redis.Redis.from_url(server.url) as client:
            Keyring(client).revoke(late[0].id)

        async def refused() -> bool:
            await open_stream.write(ask(id="2"))
            return "API key" in (await open_stream.read()).error_message

        await _eventually(refused)
        await open_stream.done_writing()
        assert seen[before].kind == "unauthenticated"


async def _eventually(check: Any) -> None:
    began = awake()
    while not await check():
        assert awake() - began < 5
        await asyncio.sleep(0.05)


async def test_what_is_refused_before_the_path_is_reported_once(stack: Stack, calls: Any) -> None:
    """No message, method or model, and control: an incident and no record each; a request on the path leaves none."""
    seen = incidents(stack)
    async with grpc.aio.insecure_channel(stack.grpc) as channel:
        for method, body, code in (
            ("/inference.GRPCInferenceService/ModelInfer", b"\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
            ("/inference.GRPCInferenceService/Nothing", b"", grpc.StatusCode.UNIMPLEMENTED),
            ("/a.B/C", b"", grpc.StatusCode.UNIMPLEMENTED),
            ("/inference.GRPCInferenceService/LogSettings", b"", grpc.StatusCode.PERMISSION_DENIED),
        ):
            assert (await told(channel.unary_unary(method)(body)))[0] is code
    await told(calls.ModelInfer(ask(model="nope")))
    kinds = ["invalid_argument", "not_found", "not_found", "permission_denied", "not_found"]
    assert [one.kind for one in seen] == kinds
    assert [one.operation.rpartition("/")[2] for one in seen] == ["ModelInfer", "", "", "LogSettings", "ModelInfer"]
    assert stack.records == []
    await told(calls.ModelInfer(ask("")))
    await told(calls.ModelInfer(ask(max_tokens=1000)))
    assert [record.error for record in stack.records] == ["invalid_argument"]
    assert len(seen) == 6


async def test_an_unknown_fault_shows_a_generic_text(stack: Stack, calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an exception of ours says is for the log: unary, in a stream and as a stream's status."""

    async def broken(name: str) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(stack.gateway, "find", broken)
    code, details, _ = await told(calls.ModelInfer(ask()))
    assert (code, "secret" in details, "log" in details) == (grpc.StatusCode.INTERNAL, False, True)
    (response,) = [response async for response in calls.ModelStreamInfer(iter([ask()]))]
    assert response.error_message == details
    call = calls.ModelStreamInfer(iter([ask()]), metadata=(("triton_grpc_error", "true"),))
    assert (await told(call))[:2] == (code, details)


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_nearest_deadline_ends_a_request(stack: Stack, fake: FakeTriton, streamed: bool) -> None:
    """The call's own deadline and the parameter `timeout` both reach the path, and free the model's slot."""
    fake.script = [event("a"), math.inf]
    async with stub(stack.grpc) as calls:
        for deadline_s, timeout_us in ((0.2, 0), (5.0, 200_000)):
            began = awake()
            request = ask(f"p{timeout_us}", stream=streamed)
            request.parameters["timeout"].int64_param = timeout_us
            if not streamed:
                call = calls.ModelInfer(request, timeout=deadline_s)
                assert (await told(call))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
            else:
                call = calls.ModelStreamInfer(iter([request]), timeout=deadline_s)
                with_status = [response async for response in _until_status(call)]
                assert timeout_us == 0 or "too long" in with_status[-1].error_message
            assert awake() - began < 2
            await until(lambda: fake.running == 0 and stack.gateway.in_flight == 0)
        assert len(stack.records) == 2
        assert stack.records[1].error == "deadline_exceeded"


async def _until_status(call: Any) -> AsyncIterator[Any]:
    try:
        async for response in call:
            yield response
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("how", ["unary", "stream", "before the first token", "hang up"])
async def test_who_leaves_frees_the_slot(stack: Stack, fake: FakeTriton, how: str) -> None:
    """A call that is cancelled, or whose connection is closed, ends its request at Triton within a second."""
    fake.script = [math.inf] if how == "before the first token" else [event("a"), math.inf]
    async with grpc.aio.insecure_channel(stack.grpc) as channel:
        calls = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        if how == "unary":
            call = calls.ModelInfer(ask())
        else:
            call = calls.ModelStreamInfer(iter([ask(stream=True)]))
        if how in ("stream", "hang up"):
            await call.read()
        await until(lambda: fake.running == 1)
        if how == "hang up":
            await channel.close()
        else:
            call.cancel()
        assert await until(lambda: fake.running == 0 and stack.gateway.in_flight == 0) < 1.0
        await until(lambda: [record.outcome for record in stack.records] == ["cancelled"])


class GoneClient:
    """A call's context whose client left a moment ago, so that nothing can be written to it any more."""

    code: grpc.StatusCode | None = None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def time_remaining(self) -> None:
        return None

    async def send_initial_metadata(self, metadata: Any) -> None:
        pass

    async def write(self, message: bytes) -> None:
        raise cygrpc.ExecuteBatchError("Failed grpc_call_start_batch: 0 with grpc_call_error value: 'GRPC_CALL_OK'")

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        pass

    def set_trailing_metadata(self, metadata: Any) -> None:
        pass


async def test_who_has_left_when_it_is_written_to_is_no_fault_of_ours(
    stack: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    """gRPC refuses a message before it tells of the cancellation: the request was cancelled, and nothing is logged."""

    async def messages() -> AsyncIterator[bytes]:
        yield ask(stream=True).SerializeToString()

    application: Any = stack.server.config.app
    details = SimpleNamespace(method="/inference.GRPCInferenceService/ModelStreamInfer")
    context = GoneClient()
    await application.grpc.door.service(details).stream_stream(messages(), context)
    assert context.code is grpc.StatusCode.CANCELLED
    await until(lambda: [record.outcome for record in stack.records] == ["cancelled"])
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_client_that_does_not_read_holds_no_slot(fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream whose client stops reading is ended once its answer should have been read."""
    monkeypatch.setattr(grpc_infer, "SLOW_READER_S", 0.3)
    fake.script = [*(event("x" * 100_000) for _ in range(300)), event("end", "stop"), "end"]
    async with serving(fake, grpc=True, max_output_chars=10**8, request_timeout_s=0.5, first_token_s=0.5) as stack:
        async with stub(stack.grpc) as calls:
            call = calls.ModelStreamInfer(iter([ask(stream=True)]))
            await call.read()
            now = time.monotonic()
            assert await until(lambda: stack.gateway.in_flight == 0) < 3 and time.monotonic() - now > 0.2
        assert stack.records[0].finish_reason is None


async def test_draining_refuses_new_calls_and_lets_running_ones_end(fake: FakeTriton) -> None:
    """UNAVAILABLE for who comes now, NOT ready for probes, and the stream that runs is read to its end."""
    fake.by_text = {"long": [event("a"), 0.3, *answer("b")]}
    async with serving(fake, grpc=True) as stack, stub(stack.grpc) as calls:
        running = calls.ModelStreamInfer(iter([ask("long", stream=True)]))
        await running.read()
        draining = asyncio.create_task(stack.gateway.drain(2.0))
        await until(lambda: stack.gateway.draining)
        code, details, end = await told(calls.ModelInfer(ask()))
        assert (code, "stopping" in details) == (grpc.StatusCode.UNAVAILABLE, True)
        assert int(end["retry-after"]) >= 1
        assert not (await calls.ServerReady(pb.ServerReadyRequest())).ready
        assert (await calls.ServerLive(pb.ServerLiveRequest())).live
        assert texts((await running.read()).infer_response) == ["b"]
        assert await running.read() is grpc.aio.EOF
        await draining


async def test_what_does_not_end_is_ended_when_the_gateway_stops(fake: FakeTriton) -> None:
    """A stream that outlives the drain hears why in its last response; open streams do not hold up the end."""
    fake.script = [event("a"), math.inf]
    async with serving(fake, grpc=True) as stack:
        async with stub(stack.grpc) as calls, grpc.aio.insecure_channel(stack.grpc) as channel:
            running = calls.ModelStreamInfer(iter([ask(stream=True)]))
            await running.read()
            idle = calls.ModelStreamInfer()
            watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
            await watch.read()
            await stack.gateway.drain(0.1)
            assert "stopping" in (await running.read()).error_message
            assert await running.read() is grpc.aio.EOF
            began = awake()
            application: Any = stack.server.config.app
            await application.grpc.stop()
            assert awake() - began < 3
            for call in (idle, watch):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    while await call.read() is not grpc.aio.EOF:
                        continue
                assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


async def test_only_a_trusted_proxy_names_the_client(fake: FakeTriton) -> None:
    """x-forwarded-for counts where it counts over HTTP: from a proxy that was named."""
    for trusted, subject in ((None, "ip-127.0.0.1"), ("127.0.0.1", "ip-192.0.2.7")):
        async with serving(fake, grpc=True, trusted_proxies=trusted) as stack, stub(stack.grpc) as calls:
            seen, metadata = incidents(stack), (("x-forwarded-for", "192.0.2.7"),)
            await calls.ModelInfer(ask(), metadata=metadata)
            assert stack.records[-1].caller == subject
            async with grpc.aio.insecure_channel(stack.grpc) as channel:  # and where nobody is asked for a key
                for method in ("/a.B/C", "/grpc.health.v1.Health/Check"):
                    await told(channel.unary_unary(method)(b"\xff", metadata=metadata))
            assert [one.address for one in seen] == [subject.removeprefix("ip-")] * 2


async def test_an_ipv6_client_has_its_own_address(fake: FakeTriton) -> None:
    """Over IPv6 the caller is the client's address, without brackets and port."""
    async with serving(fake, grpc=True, host="::1") as stack:
        async with stub(f"[::1]:{stack.grpc.rpartition(':')[2]}") as calls:
            await calls.ModelInfer(ask())
        assert stack.records[-1].caller == subject_of("::1")


async def test_models_that_do_not_generate_are_asked_once(fake: FakeTriton) -> None:
    """Unary and streamed, such a model's answer is one final response; its errors are the edge's."""
    fake.models["plain"], fake.other_backends = "READY", {"plain"}
    async with serving(fake, grpc=True) as stack, stub(stack.grpc) as calls:
        assert (await calls.ModelInfer(number())).model_name == "plain"
        (response,) = [r async for r in calls.ModelStreamInfer(iter([number()]))]
        assert response.infer_response.parameters[FINAL].bool_param
        fake.infer_error = "broken"
        assert (await told(calls.ModelInfer(number())))[0] is grpc.StatusCode.INTERNAL
        assert [record.operation for record in stack.records] == ["infer"] * 3
