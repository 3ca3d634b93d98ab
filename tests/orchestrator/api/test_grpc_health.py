"""The standard services beside inference, asked by the clients that gRPC itself has for them."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.grpc import service_pb2

from orchestrator.api import grpc_door

from ..conftest import serving, until
from ..fake_triton import FakeTriton

SERVICE = "inference.GRPCInferenceService"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def test_health_is_readiness(fake: FakeTriton) -> None:
    """Server and service are serving while the gateway is ready, others are not found; no key is asked for."""
    async with serving(fake, grpc=True, auth="keys") as stack, grpc.aio.insecure_channel(stack.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        fake.beat_error = "Stub process is not healthy."
        await until(lambda: not stack.gateway.ready)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING


async def test_a_watcher_hears_of_changes(fake: FakeTriton) -> None:
    """Watch tells the state at once and each change: not ready, ready again, draining; others are unknown."""
    async with serving(fake, grpc=True) as stack, grpc.aio.insecure_channel(stack.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == SERVING
        fake.beat_error = "Stub process is not healthy."
        assert (await watch.read()).status == NOT_SERVING
        fake.beat_error = None
        assert (await watch.read()).status == SERVING
        await stack.gateway.drain(0.0)
        assert (await watch.read()).status == NOT_SERVING
        unknown = health.Watch(health_pb2.HealthCheckRequest(service="other"))
        assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_reflection_tells_all_that_a_client_needs(fake: FakeTriton) -> None:
    """From nothing but reflection a client builds the services' messages, as those of Triton's own client."""
    async with serving(fake, grpc=True, auth="keys") as stack:
        found: dict[str, Any] = {}

        def ask() -> None:
            with grpc.insecure_channel(stack.grpc) as channel:
                database = ProtoReflectionDescriptorDatabase(channel)
                found["services"] = list(database.get_services())
                pool = DescriptorPool(database)
                found["service"] = pool.FindServiceByName(SERVICE)
                found["config"] = pool.FindMessageTypeByName("inference.ModelConfig")
                found["health"] = pool.FindServiceByName("grpc.health.v1.Health")
                with pytest.raises(KeyError):
                    pool.FindServiceByName("inference.Nothing")

        await asyncio.to_thread(ask)  # gRPC's own client of reflection blocks
        assert found["services"] == [
            "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection",
            SERVICE,
        ]  # fmt: skip
        theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
        assert [m.name for m in found["service"].methods] == [m.name for m in theirs.methods]
        request = found["service"].methods_by_name["ModelInfer"].input_type
        assert [f.name for f in request.fields] == [
            f.name for f in theirs.methods_by_name["ModelInfer"].input_type.fields
        ]
        assert len(found["config"].fields) > 20
        assert [m.name for m in found["health"].methods] == ["Check", "Watch"]


REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"


async def test_streams_without_a_key_leave_room_for_calls(fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of watchers and reflection together only so many are open at a time; other calls are taken meanwhile, and each
    stream that ends makes room.
    """
    monkeypatch.setattr(grpc_door, "OPEN_STREAMS", 4)
    async with serving(fake, grpc=True, auth="keys") as stack, grpc.aio.insecure_channel(stack.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        held = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
        assert [(await watch.read()).status for watch in held] == [SERVING] * 3
        silent = channel.stream_stream(REFLECTION)()
        application: Any = stack.server.config.app
        door = application.grpc.door
        await until(lambda: door._open_streams == 4)
        for refused in (health.Watch(health_pb2.HealthCheckRequest()), channel.stream_stream(REFLECTION)()):
            assert await refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
        held.pop().cancel()
        await until(lambda: door._open_streams == 3)
        assert (await health.Watch(health_pb2.HealthCheckRequest()).read()).status == SERVING
        silent.cancel()


async def test_a_stream_without_a_key_is_not_held_in_silence(fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reflection and a watch end where no message comes in time, also after one that was answered."""
    monkeypatch.setattr(grpc_door, "MESSAGE_S", 0.3)
    async with serving(fake, grpc=True) as stack, grpc.aio.insecure_channel(stack.grpc) as channel:
        asked = channel.stream_stream(REFLECTION)()
        await asked.write(b"")
        assert await asked.read()
        for silent in (
            asked,
            channel.stream_stream(REFLECTION)(),
            channel.stream_stream("/grpc.health.v1.Health/Watch")(),
        ):
            assert await asyncio.wait_for(silent.code(), 5) is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_one_task_looks_for_all_watchers(fake: FakeTriton) -> None:
    """However many watch, one task looks, and none without a watcher; all hear of the change."""

    def looking() -> int:
        return sum(task.get_name() == "health watch" for task in asyncio.all_tasks())

    async with serving(fake, grpc=True) as stack, grpc.aio.insecure_channel(stack.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(20)]
        assert [(await watch.read()).status for watch in watches] == [SERVING] * 20
        assert looking() == 1
        fake.beat_error = "Stub process is not healthy."
        assert [(await watch.read()).status for watch in watches] == [NOT_SERVING] * 20
        for watch in watches:
            watch.cancel()
        await until(lambda: looking() == 0)
