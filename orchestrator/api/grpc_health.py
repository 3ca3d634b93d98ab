"""gRPC's health checking protocol (grpc/doc/health-checking.md): readiness, of the server and of its service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from orchestrator.api.grpc_door import Door, Methods, Rpc, Stream, Unary, parse, soon
from orchestrator.api.grpc_messages import SERVICE
from orchestrator.api.grpc_schema import declare, message
from orchestrator.gateway import Gateway

HEALTH = "grpc.health.v1.Health"
LOOK_S = 0.2  # how late a watcher may hear of a change

declare(
    "truthgpt/health.proto",
    "grpc.health.v1",
    """
HealthCheckRequest: string service 1
HealthCheckResponse: ServingStatus status 1
HealthCheckResponse.ServingStatus = UNKNOWN 0, SERVING 1, NOT_SERVING 2, SERVICE_UNKNOWN 3
Health ! Check(HealthCheckRequest) returns (HealthCheckResponse)
Health ! Watch(HealthCheckRequest) returns (stream HealthCheckResponse)
""",
)
_Request = message("grpc.health.v1.HealthCheckRequest")
_Response = message("grpc.health.v1.HealthCheckResponse")


class Checks:
    """The handlers; while draining nothing is served."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._watchers, self._ready, self._changed = 0, False, asyncio.Event()

    def methods(self) -> Methods:
        return {
            f"{HEALTH}/Check": Unary(_Request, self._check, open=True),
            f"{HEALTH}/Watch": Stream(self._watch, open=True),
        }

    async def _check(self, rpc: Rpc, request: Any) -> Any:
        status = _status(request.service, self._gateway.ready)
        if status == "SERVICE_UNKNOWN":
            await rpc.context.abort(grpc.StatusCode.NOT_FOUND, "There is no such service here.", rpc.end())
        return _Response(status=status)

    async def _watch(self, door: Door, rpc: Rpc, messages: AsyncIterator[bytes]) -> None:
        async with soon():
            service, said = parse(_Request, await anext(messages, b"")).service, ""
        with self._looking():
            while True:
                status, changed = _status(service, self._ready), self._changed
                if status != said:
                    await rpc.context.write(_Response(status=status).SerializeToString())
                    said = status
                await changed.wait()

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Keep `_ready` true to the gateway. One task looks for all watchers, from the first one to the last."""
        if not self._watchers:
            self._ready, self._looker = self._gateway.ready, asyncio.create_task(self._look(), name="health watch")
        self._watchers += 1
        try:
            yield
        finally:
            self._watchers -= 1
            if not self._watchers:
                self._looker.cancel()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if self._gateway.ready != self._ready:
                self._ready = not self._ready
                self._changed.set()
                self._changed = asyncio.Event()


def _status(service: str, ready: bool) -> str:
    if service not in ("", SERVICE):
        return "SERVICE_UNKNOWN"
    return "SERVING" if ready else "NOT_SERVING"
