"""Tracing: one trace a request from the edge to Triton, sent to a real receiver; off, it costs nothing at all."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc.aio import InferenceServerClient, InferInput

from orchestrator.settings import Settings
from orchestrator.tracing import Tracer
from tests.clock import awake
from tests.collector import Collector
from tests.redis import RealRedis

from .conftest import serving, until
from .fake_triton import FakeTriton, answer, event, failure
from .recording import record

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CLIENT = f"00-{TRACE}-{PARENT}-01"


def hexes(digits: int) -> st.SearchStrategy[str]:
    """Identifiers that are not all zero."""
    return st.integers(1, 16**digits - 1).map(lambda number: f"{number:0{digits}x}")


CHAT = {"model": "m", "messages": [{"role": "user", "content": "zanahoria"}]}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


def tracer(endpoint: str = "http://127.0.0.1:9", ratio: float = 1.0) -> Tracer:
    return Tracer(replace(Settings(), otlp_endpoint=endpoint, trace_ratio=ratio))


async def test_one_trace_from_the_client_to_triton(fake: FakeTriton, collector: Collector) -> None:
    """A client's trace goes on through the gateway into the header that Triton gets, and the spans nest in time."""
    async with serving(fake, otlp_endpoint=collector.url) as stack:
        began = time.time_ns()
        await stack.post("/v1/chat/completions", CHAT, traceparent=CLIENT, **{"x-request-id": "seen-1"})
        ended = time.time_ns()
    ((tree),) = collector.trees()
    assert list(tree) == ["server", "prepare", "limits and cache", "chat m"]
    server, prepare, limits, call = tree.values()
    assert {span.trace for span in tree.values()} == {TRACE}
    assert server.parent == PARENT
    assert fake.headers[0]["traceparent"] == f"00-{TRACE}-{call.id}-01"
    assert all(server.holds(span) for span in (prepare, limits, call))
    assert began - 1_000_000 <= server.start and server.end <= ended + 1_000_000
    assert prepare.end == limits.start <= limits.end <= call.start
    assert (server.name, server.kind, call.kind) == ("POST /v1/chat/completions", "SERVER", "CLIENT")
    assert {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "gen_ai.request.model": "m",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 3,
        "truthgpt.request_id": "seen-1",
        "truthgpt.cache": "bypass",
        "truthgpt.outcome": "ok",
    }.items() <= server.attributes.items()
    assert {
        "gen_ai.operation.name": "chat",
        "gen_ai.response.finish_reasons": ["stop"],
    }.items() <= call.attributes.items()
    assert collector.paths == ["/v1/traces"]


async def test_each_way_of_a_request_has_its_spans(
    fake: FakeTriton, server: RealRedis, client: redis.Redis, collector: Collector
) -> None:
    """Miss, hit, an answer shared with another request, an error, a stream that was left, tensors and a wrong model:
    each has the spans of the stages that it came to, and no text and no address is in a single byte of them.
    """
    fake.models["plain"] = "READY"
    fake.other_backends = {"plain"}
    fake.by_text = {
        "slow berenjena": [event("a"), 0.2, *answer("calabaza")],
        "endless berenjena": [event("calabaza"), 3600.0],
        "broken berenjena": [failure("berenjena was too much"), "end"],
    }
    numbers = {"inputs": [{"name": "x", "datatype": "INT32", "shape": [1], "data": [1]}]}
    async with serving(fake, redis_url=server.url, otlp_endpoint=collector.url, limit_per_minute=1000) as stack:

        async def ask(prompt: str, model: str = "m") -> int:
            return (await stack.post("/v1/completions", {"model": model, "prompt": prompt}))[0]

        assert await ask("berenjena") == 200
        await until(lambda: client.keys("*:c:*"))  # an answer is there a moment before it is stored
        assert await ask("berenjena") == 200
        assert await asyncio.gather(ask("slow berenjena"), ask("slow berenjena")) == [200, 200]
        assert await ask("broken berenjena") == 500
        endless = {"model": "m", "prompt": "endless berenjena", "stream": True}
        async with stack.http.post(stack.url + "/v1/completions", json=endless) as response:
            await response.content.readany()
        await until(lambda: len(stack.records) == 6)
        assert (await stack.post("/v2/models/plain/infer", numbers))[0] == 200
        assert await ask("berenjena", "nobody") == 404
    trees = collector.trees()
    stages, call = ["server", "prepare", "limits and cache"], "text_completion m"
    first, hit, one, other, broken, left, infer, unknown = trees
    leader, follower = (one, other) if call in one else (other, one)
    assert [[*tree] for tree in (first, hit, leader, follower, broken, left, infer, unknown)] == [
        [*stages, call], stages, [*stages, call], [*stages, "shared answer"], [*stages, call], [*stages, call],
        [*stages, "infer plain"], stages,
    ]  # fmt: skip
    assert all(tree["server"].holds(span) for tree in trees for span in tree.values())
    assert len({tree["server"].trace for tree in trees}) == len(trees)
    assert all(len({span.trace for span in tree.values()}) == 1 for tree in trees)
    asked = [headers["traceparent"].split("-")[2] for headers in fake.headers]
    assert asked == [tree[call].id for tree in (first, leader, broken, left)]
    assert [tree["server"].attributes["truthgpt.cache"] for tree in (first, hit, follower)] == ["miss", "hit", "hit"]
    ends = [(tree["server"].attributes.get("error.type"), tree["server"].error) for tree in (broken, unknown, left)]
    assert ends == [
        ("internal", True), ("not_found", False), (None, False),
    ]  # fmt: skip
    assert broken[call].error and left["server"].attributes["truthgpt.outcome"] == "cancelled"
    assert infer["server"].attributes["http.route"] == "/v2/models/{model}/infer"
    sent = b"".join(collector.bodies)
    assert b"text_completion m" in sent  # words would be seen
    assert not [word for word in (b"berenjena", b"calabaza", b"too much", b"127.0.0.1", b"ip-") if word in sent]


async def test_grpc_is_traced_by_the_same_sink(fake: FakeTriton, collector: Collector) -> None:
    """A gRPC call with a traceparent in its metadata has the same spans, named after the method, up to Triton's header
    and down to the client's span.
    """
    async with serving(fake, otlp_endpoint=collector.url, grpc=True) as stack:
        async with InferenceServerClient(stack.grpc) as client:
            text = InferInput("text_input", [1], "BYTES")
            text.set_data_from_numpy(numpy.array([b"zanahoria"], dtype=numpy.object_))
            await client.infer("m", [text], headers={"traceparent": CLIENT})
    (tree,) = collector.trees()
    assert list(tree) == ["server", "prepare", "limits and cache", "text_completion m"]
    server = tree["server"]
    assert (server.name, server.kind) == ("inference.GRPCInferenceService/ModelInfer", "SERVER")
    assert (server.trace, server.parent) == (TRACE, PARENT)
    assert {"rpc.system.name": "grpc", "rpc.method": server.name}.items() <= server.attributes.items()
    assert fake.headers[0]["traceparent"] == f"00-{TRACE}-{tree['text_completion m'].id}-01"
    assert b"zanahoria" not in b"".join(collector.bodies)


async def test_a_request_that_is_refused_ends_in_its_stage(
    fake: FakeTriton, server: RealRedis, client: redis.Redis, collector: Collector
) -> None:
    """A limit that is used up ends a request in "limits and cache": that span ends with the request, without error."""
    async with serving(fake, redis_url=server.url, otlp_endpoint=collector.url, limit_per_minute=1) as stack:
        statuses = [(await stack.post("/v1/chat/completions", CHAT))[0] for _ in range(2)]
        assert statuses == [200, 429]
    refused = collector.trees()[1]
    assert list(refused) == ["server", "prepare", "limits and cache"]
    assert refused["limits and cache"].end == refused["server"].end
    assert refused["server"].attributes["error.type"] == "rate_limited" and not refused["server"].error


async def test_a_client_that_samples_nothing_is_obeyed(fake: FakeTriton, collector: Collector) -> None:
    """With flag 00 from the client, or a ratio of 0 and no client's word, Triton gets flag 00 and no span is sent."""
    async with serving(fake, otlp_endpoint=collector.url, trace_ratio=0.0) as stack:
        await stack.post("/v1/chat/completions", CHAT, traceparent=CLIENT[:-2] + "00")
        await stack.post("/v1/chat/completions", CHAT)
        await stack.post("/v1/chat/completions", CHAT, traceparent=CLIENT)
    passed = [headers["traceparent"] for headers in fake.headers]
    assert [one[-2:] for one in passed] == ["00", "00", "01"]
    assert [one[3:35] == TRACE for one in passed] == [True, False, True]
    assert len(collector.trees()) == 1


@pytest.fixture(scope="module")
def half() -> Iterator[Tracer]:
    sampling = tracer(ratio=0.5)
    yield sampling
    sampling.close()


@given(trace=hexes(32), parent=hexes(16), flags=hexes(2))
def test_a_clients_decision_outranks_the_ratio(half: Tracer, trace: str, parent: str, flags: str) -> None:
    """Any traceparent is gone on with in new spans, and its lowest flag decides."""
    began = half.begin(f"00-{trace}-{parent}-{flags}")
    assert (began.trace_id, began.parent_id, began.sampled) == (trace, parent, int(flags, 16) % 2 == 1)
    assert began.traceparent == f"00-{trace}-{began.upstream_id}-0{int(flags, 16) % 2}"
    assert len({began.span_id, began.upstream_id, parent}) == 3


def test_the_ratio_is_kept() -> None:
    """Of many requests without a client's word about the share `trace_ratio` is sampled, all or none at its ends."""
    shares = {}
    for ratio in (0.0, 0.25, 1.0):
        some = tracer(ratio=ratio)
        shares[ratio] = sum(some.begin(None).sampled for _ in range(4000)) / 4000
        some.close()
    assert (shares[0.0], shares[1.0]) == (0.0, 1.0)
    assert 0.2 < shares[0.25] < 0.3


@pytest.mark.parametrize("away", [True, False])
async def test_a_dead_collector_costs_nothing_but_spans(fake: FakeTriton, collector: Collector, away: bool) -> None:
    """A collector that is away or hangs fails no request, holds none up, keeps a bounded number of spans and does not
    keep the gateway from ending.
    """
    collector.hang = True
    url = f"http://127.0.0.1:{closed_port()}" if away else collector.url
    async with serving(fake, otlp_endpoint=url) as stack:
        for _ in range(20):
            assert (await stack.post("/v1/chat/completions", CHAT))[0] == 200
        sink = stack.server.config.app._tracer  # type: ignore[attr-defined]
        done = record(trace=sink.begin(None), stages=(("prepare", 0.001),))
        began = time.process_time()
        for _ in range(10_000):
            sink.record(done)
        assert time.process_time() - began < 2.0
        assert len(sink._outlet._processor._batch_processor._queue) <= 2048
        began = awake()
    assert awake() - began < 3.0


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return int(bound.getsockname()[1])


def test_off_nothing_of_it_is_imported() -> None:
    """A gateway without a collector has nothing in memory of what makes, packs or sends spans."""
    code = (
        "import asyncio, sys\n"
        "from orchestrator.worker import build\n"
        "from orchestrator.settings import Settings\n"
        "async def main():\n"
        "    application = build(Settings(audit=False, grpc=False)).config.app\n"
        "    await application.start()\n"
        "    assert application.gateway is not None\n"
        "    await application.stop()\n"
        "asyncio.run(main())\n"
        # redis-py imports the SDK's metrics by itself, where they are installed
        "ours = ('orchestrator.spans', 'opentelemetry.sdk.trace', 'opentelemetry.exporter', 'opentelemetry.proto')\n"
        "print([name for name in sys.modules if name.startswith((*ours, 'requests'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "[]", done.stderr


def test_without_the_extra_the_next_step_is_named() -> None:
    """Where OpenTelemetry is not installed a gateway that is to use it ends at once and says what to install."""
    code = "import sys; sys.modules['opentelemetry'] = None; from orchestrator.parent import main; sys.exit(main())"
    env = {**os.environ, "TRUTHGPT_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "pip install 'truthgpt[tracing]'" in done.stderr
