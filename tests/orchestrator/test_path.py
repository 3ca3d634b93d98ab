"""There is one request path: every operation of every edge goes through all of its stages, in order, and leaves one
record.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import redis
from tritonclient.grpc import service_pb2 as pb

from orchestrator.api.admin import CONTROL
from orchestrator.api.grpc_describe import CONTROL as GRPC_CONTROL
from orchestrator.api.grpc_messages import SERVICE
from orchestrator.domain import Record
from orchestrator.ops.keyring import Keyring
from tests.encoding import CLASSIFIES, EMBEDS
from tests.redis import RealRedis

from .api.calls import ask, number, rows, stub, told
from .conftest import Stack, serving, until
from .fake_triton import FakeTriton

TEXT_INPUTS = {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["Hola"]}]}
NUMBERS = {"inputs": [{"name": "x", "datatype": "INT32", "shape": [1], "data": [1]}]}
ROWS = {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [2, 1], "data": ["Hola", "adiós"]}]}
# Every route that works for a caller: its body, or several where it has several operations behind it.
OPERATIONS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "/v1/completions": [
        ("generate", {"model": "m", "prompt": "Hola"}),
        ("generate", {"model": "m", "prompt": "Hola", "stream": True}),
        ("generate", {"model": "m", "prompt": [1, 2]}),
    ],
    "/v1/chat/completions": [
        ("generate", {"model": "m", "messages": [{"role": "user", "content": "Hola"}]}),
        ("generate", {"model": "m", "messages": [{"role": "user", "content": "Hola"}], "stream": True}),
    ],
    "/v1/embeddings": [("embed", {"model": "e", "input": "Hola"})],
    "/v1/classify": [("classify", {"model": "c", "input": ["Hola", "adiós"]})],
    "/v2/models/e/infer": [("embed", ROWS)],
    "/v2/models/c/versions/1/infer": [("classify", ROWS)],
    **{
        f"/v2/models/m{version}/{what}": [("generate", body)]
        for version in ("", "/versions/1")
        for what, body in (
            ("generate", {"text_input": "Hola"}),
            ("generate_stream", {"text_input": "Hola", "stream": True}),
            ("infer", TEXT_INPUTS),
        )
    },
    "/v2/models/plain/infer": [("infer", NUMBERS)],
}
# Every method of gRPC's service that works for a caller: its requests.
RPCS: dict[str, list[tuple[str, Any]]] = {
    "ModelInfer": [
        ("generate", ask()), ("generate", ask(version="1")), ("infer", number()), ("embed", rows("e", "Hola")),
        ("classify", rows("c", "Hola", "adiós")),
    ],
    "ModelStreamInfer": [
        ("generate", ask(stream=True)), ("generate", ask()), ("infer", number()), ("embed", rows("e", "a", "b")),
    ],
}  # fmt: skip
STAGES = ["permit", "sanitise", "fit", "limits and cache", "breaker", "triton", "settle", "record"]


@pytest.fixture
def server() -> Iterator[RealRedis]:
    with RealRedis() as running:
        yield running


class Trail:
    """Notes which stage of the path is entered, by wrapping the real parts' methods."""

    def __init__(self, stack: Stack) -> None:
        self.stages: list[str] = []
        gateway = self._gateway = stack.gateway
        upstream = gateway._upstream
        self._wrap(gateway._admission, "permit", "permit")
        for name in ("generate", "infer", "encode"):
            self._wrap(gateway._screen, name, "sanitise")
        self._wrap(gateway._tokens, "fit", "fit")
        self._wrap(gateway._tokens, "fit_texts", "fit")
        self._wrap(gateway._limiter, "enter", "limits and cache")
        self._wrap(upstream._breakers, "guard", "breaker")
        (server,) = gateway.fleet.members
        for name in ("stream", "infer", "encode"):
            self._wrap(server.triton, name, "triton")
        self._wrap(gateway._limiter, "leave", "settle")
        gateway._sinks = (*gateway._sinks, self._sink)

    def _wrap(self, part: Any, name: str, stage: str) -> None:
        method: Callable[..., Any] = getattr(part, name)

        @functools.wraps(method)
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.stages.append(stage)
            return method(*args, **kwargs)

        setattr(part, name, noted)

    def _sink(self, record: Record) -> None:
        self.stages.append("record")

    def take(self) -> list[str]:
        self._gateway.record()
        taken, self.stages = self.stages, []
        return taken


def template(path: str) -> str:
    parts = path.split("/")
    if path.startswith("/v2/models/"):
        parts[3] = "{model}"
        if "versions" in parts:
            parts[5] = "{version}"
    return "/".join(parts)


async def test_every_operation_of_every_edge_passes_every_stage(fake: FakeTriton, server: RealRedis) -> None:
    """Whatever the protocol, streamed or not, the same stages run in the same order, and one record is left."""
    fake.models |= dict.fromkeys(("plain", "e", "c"), "READY")
    fake.other_backends = {"plain"}
    fake.encoders = {"e": EMBEDS, "c": CLASSIFIES}
    async with serving(fake, redis_url=server.url, limit_per_minute=1000, max_batch_size=1) as stack:
        trail = Trail(stack)
        for path, calls in OPERATIONS.items():
            for endpoint, body in calls:
                async with stack.http.post(
                    stack.url + path, json=body, headers={"cache-control": "no-store"}
                ) as response:
                    await response.read()
                    assert response.status == 200, (path, await response.text())
                    assert "ratelimit" in response.headers, path
                wanted = [stage for stage in STAGES if endpoint != "infer" or stage != "fit"]  # tensors have no tokens
                assert trail.take() == wanted, path
                assert stack.records[-1].operation == endpoint
        assert len(stack.records) == sum(len(calls) for calls in OPERATIONS.values())


async def test_every_operation_over_grpc_passes_every_stage(fake: FakeTriton, server: RealRedis) -> None:
    """Unary and in streams of one or several requests, the stages are those of HTTP, and each leaves one record."""
    fake.models |= dict.fromkeys(("plain", "e", "c"), "READY")
    fake.other_backends = {"plain"}
    fake.encoders = {"e": EMBEDS, "c": CLASSIFIES}
    async with (
        serving(fake, redis_url=server.url, limit_per_minute=1000, grpc=True) as stack,
        stub(stack.grpc) as calls,
    ):
        trail = Trail(stack)
        metadata = (("cache-control", "no-store"),)
        for name, requests in RPCS.items():
            for endpoint, request in requests:
                if name == "ModelInfer":
                    call = calls.ModelInfer(request, metadata=metadata)
                    await call
                else:
                    call = calls.ModelStreamInfer(iter([request]), metadata=metadata)
                    assert not any([response.error_message async for response in call])
                assert "ratelimit" in (await told(call))[2], name
                wanted = [stage for stage in STAGES if endpoint != "infer" or stage != "fit"]
                assert trail.take() == wanted, name
                assert stack.records[-1].operation == endpoint
                assert stack.records[-1].route == f"{SERVICE}/{name}"
        made = sum(len(requests) for requests in RPCS.values())
        several = [request for _, request in RPCS["ModelStreamInfer"]]
        [response async for response in calls.ModelStreamInfer(iter(several), metadata=metadata)]
        assert len(stack.records) == made + len(several)


async def test_no_method_is_forgotten_here(fake: FakeTriton) -> None:
    """Every method of every served gRPC service is an operation above, only tells something, or is refused."""
    async with serving(fake, grpc=True) as stack:
        application: Any = stack.server.config.app
        served = set(application.grpc.door.methods)
        telling = {"ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelConfig"}
        telling.add("ModelStatistics")
        own = {f"{SERVICE}/{name}" for name in {*RPCS, *telling, *GRPC_CONTROL}}
        other = {"grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch"}
        other |= {f"grpc.reflection.{v}.ServerReflection/ServerReflectionInfo" for v in ("v1", "v1alpha")}
        assert served == own | other
        async with stub(stack.grpc) as calls:
            declared = {m.name for m in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods}
            assert declared == {*RPCS, *telling, *GRPC_CONTROL}
            for name in GRPC_CONTROL:
                asked = getattr(calls, name)(getattr(pb, f"{name}Request")())
                assert (await told(asked))[0] is grpc.StatusCode.PERMISSION_DENIED, name


async def test_no_route_is_forgotten_here(stack: Stack) -> None:
    """Every POST that the front door knows is an operation above, or is refused at this edge."""
    application: Any = stack.server.config.app
    posts = {path for path, methods in application._door.routes.items() if "POST" in methods}
    assert posts == {template(path) for path in OPERATIONS} | {p for p, methods in CONTROL.items() if "POST" in methods}


async def test_a_request_that_is_refused_counts_and_is_recorded(fake: FakeTriton, server: RealRedis) -> None:
    """What is wrong with a request is found after it was counted, so that nobody floods the gateway for nothing."""
    async with serving(fake, redis_url=server.url, limit_per_minute=2, sanitize="reject") as stack:
        bad = {"model": "m", "prompt": "<script>x</script>"}
        statuses = [(await stack.post("/v1/completions", bad))[0] for _ in range(3)]
        assert statuses == [400, 400, 429]
        assert [record.error for record in stack.records] == ["unsafe_input", "unsafe_input", "rate_limited"]


async def test_the_protocol_does_not_double_a_limit(fake: FakeTriton, server: RealRedis) -> None:
    """OpenAI's and KServe's edges, HTTP and gRPC, count in the same window, and each tells what is left."""
    async with serving(fake, redis_url=server.url, limit_per_hour=4, grpc=True) as stack:
        first = await stack.post("/v1/completions", {"model": "m", "prompt": "a"})
        second = await stack.post("/v2/models/m/generate", {"text_input": "b"})
        third = await stack.post("/v2/models/m/infer", TEXT_INPUTS)
        async with stub(stack.grpc) as calls:
            over_grpc = await told(calls.ModelInfer(ask("d")))
            fifth = await stack.post("/v1/completions", {"model": "m", "prompt": "c"})
            refused = await told(calls.ModelInfer(ask("e")))
        assert [answer[0] for answer in (first, second, third, over_grpc, fifth, refused)] == [
            200, 200, 200, grpc.StatusCode.OK, 429, grpc.StatusCode.RESOURCE_EXHAUSTED,
        ]  # fmt: skip
        assert [answer[2]["x-ratelimit-remaining-requests"] for answer in (first, second, third, over_grpc, fifth)] == [
            "3", "2", "1", "0", "0",
        ]  # fmt: skip
        for _, _, headers in (fifth, refused):
            assert int(headers["retry-after"]) >= int(headers["ratelimit"].rpartition("t=")[2])


async def test_two_tenants_never_share_an_answer(fake: FakeTriton, server: RealRedis) -> None:
    """The same request of two tenants asks Triton twice; of two keys of one tenant, once; over any edge."""
    with redis.Redis.from_url(server.url) as client:
        ring = Keyring(client)
        keys = [ring.create(tenant, "inference", {}, None, "")[1] for tenant in ("acme", "acme", "other")]
    async with serving(fake, redis_url=server.url, auth="keys") as stack:
        seen = []
        for key, path, body in (
            (keys[0], "/v1/completions", {"model": "m", "prompt": "Hola"}),
            (keys[1], "/v1/completions", {"model": "m", "prompt": "Hola"}),
            (keys[1], "/v2/models/m/generate", {"text_input": "Hola"}),
            (keys[2], "/v1/completions", {"model": "m", "prompt": "Hola"}),
        ):
            status, _, headers = await stack.post(path, body, authorization=f"Bearer {key}")
            seen.append((status, headers["x-cache"]))
        assert seen == [(200, "miss"), (200, "hit"), (200, "hit"), (200, "miss")]
        assert len(fake.requests) == 2
        assert (await stack.post("/v1/completions", {"model": "m", "prompt": "Hola"}))[0] == 401


async def test_a_model_that_was_exported_again_is_asked_again(fake: FakeTriton, server: RealRedis) -> None:
    """What is loaded is part of the key: an answer of the old export is never given for the new one."""
    fake.beat["digest"] = "a" * 32
    async with serving(fake, redis_url=server.url) as stack:
        body = {"model": "m", "prompt": "Hola again"}
        assert [(await stack.post("/v1/completions", body))[2]["x-cache"] for _ in range(2)] == ["miss", "hit"]
        fake.beat["digest"] = "b" * 32
        await until(lambda: stack.gateway.models[0].digest == "b" * 32)
        assert (await stack.post("/v1/completions", body))[2]["x-cache"] == "miss"


async def test_the_tokenizer_is_asked_where_a_bound_would_refuse(fake: FakeTriton, server: RealRedis) -> None:
    """A prompt of many bytes and few tokens passes under a limit that its bytes alone would break; one that really has
    too many tokens for the limit is told so.
    """
    async with serving(fake, redis_url=server.url, limit_tokens_per_minute=50, max_new_tokens=20) as stack:
        assert (await stack.post("/v1/completions", {"model": "m", "prompt": "word"}))[0] == 200
        assert fake.inspected == 0
        long = await stack.post("/v1/completions", {"model": "m", "prompt": "w" * 90})
        assert (long[0], fake.inspected) == (200, 1)
        status, body, _ = await stack.post("/v1/completions", {"model": "m", "prompt": "w " * 90})
        assert (status, body["error"]["param"], fake.inspected) == (400, "max_tokens", 2)
        assert "may use 64 tokens" in body["error"]["message"]


async def test_what_a_cached_answer_costs(fake: FakeTriton, server: RealRedis) -> None:
    """A repeated request counts as a request and costs no tokens; the stream of a cached answer is a valid stream."""
    async with serving(
        fake, redis_url=server.url, limit_per_minute=100, limit_tokens_per_minute=100, max_new_tokens=20
    ) as stack:
        body = {"model": "m", "prompt": "uno dos tres"}
        first = await stack.post("/v1/completions", body)
        second = await stack.post("/v1/completions", body)
        assert (first[2]["x-cache"], second[2]["x-cache"]) == ("miss", "hit")
        assert second[1]["usage"] == first[1]["usage"]
        third = await stack.post("/v1/completions", {**body, "prompt": "otro"})
        # six tokens were used by the first, none by the second, and this one reserves max_tokens and what its prompt
        # has at most
        assert third[2]["x-ratelimit-remaining-tokens"] == str(100 - 6 - (len("otro") + 2 + 20))
        assert third[2]["x-ratelimit-remaining-requests"] == "97"
        *events, done = await stack.events("/v1/completions", {**body, "stream": True})
        assert done == "[DONE]"
        assert "¿qué tal?" in events[0]
        assert len(fake.requests) == 2
