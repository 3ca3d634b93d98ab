"""One trace from the client through the gateway into the real Triton."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.local import tritonserver
from orchestrator.settings import Settings
from tests.collector import Collector
from tests.counting import write_entry
from tests.orchestrator.conftest import serving, until
from tests.orchestrator.fake_triton import FakeTriton

from .stack import free_ports

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.slow  # a server of its own: how Triton traces is fixed at its start
async def test_tritons_own_spans_hang_below_the_gateways(tmp_path: Path) -> None:
    """Triton, tracing by OpenTelemetry, goes on with the traceparent that the gateway sends: its span's parent is the
    gateway's call, whose trace is the client's.
    """
    write_entry(tmp_path / "repository", slots=4, step_delay_ms=1)
    http, grpc, metrics = free_ports(3)
    settings = replace(
        Settings(), home=tmp_path / "home", model_repository=tmp_path / "repository", triton_http_port=http,
        triton_grpc_port=grpc, triton_metrics_port=metrics,
    )  # fmt: skip
    found, fake = tritonserver.find(), FakeTriton()  # of the fake only its port is used
    fake.port = http
    with Collector() as collector:
        given = ("mode=opentelemetry", f"opentelemetry,url={collector.url}/v1/traces", "rate=1", "level=TIMESTAMPS")
        argv = [*tritonserver.command(found, settings, ["counting"]), *(f"--trace-config={one}" for one in given)]
        with (tmp_path / "log").open("wb") as log:
            triton = subprocess.Popen(  # noqa: ASYNC220 (that it takes a moment does no harm here)
                argv, env=tritonserver.environment(found), stdout=log, stderr=log, start_new_session=True
            )
        try:
            async with serving(fake, wait=False, otlp_endpoint=collector.url, heartbeat_timeout_s=5.0) as stack:
                gateway = stack.gateway
                await until(lambda: gateway.ready, 30.0)
                body = {"model": "counting", "prompt": "one two", "max_tokens": 2}
                status, *_ = await stack.post("/v1/completions", body, traceparent=f"00-{TRACE}-{PARENT}-01")
                assert status == 200
        finally:
            triton.terminate()  # it sends what it has when it ends
            triton.wait(30)
            tritonserver.sweep(tritonserver.shm_prefix(settings.home), kill=True)
        (mine,) = collector.trees()
    call = mine["text_completion counting"]
    assert (mine["server"].trace, mine["server"].parent) == (TRACE, PARENT)
    (below,) = [span for span in collector.spans() if span.parent == call.id]
    assert below.trace == TRACE
    assert call.holds(below)
