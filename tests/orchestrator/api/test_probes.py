"""Probes ask: each answer follows what the gateway can do."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from orchestrator.limiter import Limiter
from orchestrator.metrics_readings import readings

from ..conftest import serving, until
from ..fake_triton import FakeTriton


async def test_live_but_not_ready_without_triton() -> None:
    """With Triton away the process is live, not ready, and requests get 503."""
    async with FakeTriton() as fake:
        await fake.stop()
        try:
            async with serving(fake, wait=False) as stack:
                assert (await stack.get("/health/live"))[0] == 200
                status, body, headers = await stack.get("/health/ready")
                assert (status, body["ready"], body["triton"], headers["retry-after"]) == (503, False, False, "1")
                status, body, _ = await stack.post("/v1/completions", {"model": "m", "prompt": "x"})
                assert (status, body["error"]["code"]) == (503, "model_unavailable")
                assert (await stack.get("/v2/health/live"))[0] == 200
                assert (await stack.get("/v2/health/ready"))[0] == 503
        finally:
            await fake.start()


async def test_readiness_follows_the_stub(fake: FakeTriton) -> None:
    """Ready, not ready with the reason while the stub is dead, ready again."""
    async with serving(fake) as stack:
        assert (await stack.get("/health/ready"))[:2] == (
            200,
            {"ready": True, "draining": False, "triton": True, "models": {"m": "ready"}, "breakers": {}},
        )
        fake.beat_error = "Stub process 'm' is not healthy."
        assert await until(lambda: not stack.gateway.ready) < 0.5
        status, body, _ = await stack.get("/health/ready")
        assert status == 503
        assert "not healthy" in body["models"]["m"]
        fake.beat_error = None
        await until(lambda: stack.gateway.ready)
        assert (await stack.get("/v2/health/ready"))[0] == 200


async def test_one_dead_model_of_two_fails_readiness(fake: FakeTriton) -> None:
    """Readiness means that everything served answers."""
    fake.models["other"] = "READY"
    async with serving(fake) as stack:
        assert set((await stack.get("/health/ready"))[1]["models"]) == {"m", "other"}


async def test_a_model_that_moved_to_the_cpu_is_ready_and_says_so(
    fake: FakeTriton, caplog: pytest.LogCaptureFixture
) -> None:
    """A fallback does not fail readiness: the detail, deep health and the gauge have it, and the log once."""
    fake.beat |= {"device": "cuda", "fallback": False}
    async with serving(fake) as stack:
        gauge = readings(stack.gateway, cast(Limiter, None), None)["truthgpt_model_fallback"]
        assert (await stack.get("/health/ready"))[1]["models"] == {"m": "ready"} and gauge() == {("m",): 0}
        fake.beat |= {"device": "cpu", "fallback": True}
        await until(lambda: gauge() == {("m",): 1})
        status, body, _ = await stack.get("/health/ready")
        assert status == 200 and body["models"]["m"].startswith("ready, on the CPU")
        (model,) = (await stack.get("/health"))[1]["models"]
        assert (model["device"], model["fallback"], model["ready"]) == ("cpu", True, True)
        await asyncio.sleep(0.2)  # some heartbeats
    assert [r.message for r in caplog.records if "CPU" in r.message] == ["m runs on the CPU: its device failed"]


async def test_deep_health(fake: FakeTriton) -> None:
    """People see models with their load, Triton, Redis, uptime and requests in flight."""
    fake.beat |= {"running": 2, "waiting": 5}
    async with serving(fake) as stack:
        status, body, _ = await stack.get("/health")
        assert status == 200
        (model,) = body["models"]
        assert (model["name"], model["ready"], model["running"], model["waiting"], model["slots"]) == (
            "m",
            True,
            2,
            5,
            4,
        )
        assert body["triton"] == {"url": f"http://127.0.0.1:{fake.port}", "up": True}
        assert body["redis"] == {"configured": False, "up": False}
        assert (body["in_flight"], body["draining"], body["ready"]) == (0, False, True)
        assert 0 <= body["uptime_s"] < 60
