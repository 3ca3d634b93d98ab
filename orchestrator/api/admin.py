"""The admin edge: Triton's model control, trace, log and shared-memory settings, handed on as they are.

It has a front door of its own on the ops port, where everything but the liveness of the process needs an admin key.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol
from urllib.parse import quote

from orchestrator.api.http import SLOW_READER_S, Exchange
from orchestrator.api.middleware import Routes

# What only an administrator may call: path -> methods (Triton's model repository, trace, logging and shared-memory
# extensions).
CONTROL: dict[str, tuple[str, ...]] = {
    "/v2/repository/index": ("POST",),
    "/v2/repository/models/{model}/load": ("POST",),
    "/v2/repository/models/{model}/unload": ("POST",),
    "/v2/trace/setting": ("GET", "POST"),
    "/v2/models/{model}/trace/setting": ("GET", "POST"),
    "/v2/logging": ("GET", "POST"),
}
for _kind in ("system", "cuda"):
    CONTROL |= {
        f"/v2/{_kind}sharedmemory/status": ("GET",),
        f"/v2/{_kind}sharedmemory/unregister": ("POST",),
        f"/v2/{_kind}sharedmemory/region/{{region}}/status": ("GET",),
        f"/v2/{_kind}sharedmemory/region/{{region}}/register": ("POST",),
        f"/v2/{_kind}sharedmemory/region/{{region}}/unregister": ("POST",),
    }


class Reply(Protocol):
    """An answer as it came; header names are lower-case."""

    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def body(self) -> bytes: ...


# method, path, body, headers, seconds
Forward = Callable[[str, str, bytes | None, Mapping[str, str], float], Awaitable[Reply]]


class Admin:
    """The handlers. `timeout_s` bounds each call: loading a model takes long."""

    def __init__(self, forward: Forward, timeout_s: float) -> None:
        self._forward, self._timeout_s = forward, timeout_s

    @property
    def routes(self) -> Routes:
        return {
            "/health/live": {"GET": self.live},
            **{path: {method: self._handler(method) for method in methods} for path, methods in CONTROL.items()},
        }

    async def live(self, exchange: Exchange) -> None:
        """200 as long as this process answers at all."""
        await exchange.reply_json(200, {"live": True})

    def _handler(self, method: str) -> Callable[[Exchange], Awaitable[None]]:
        async def hand_on(exchange: Exchange) -> None:
            body = await exchange.body() if method == "POST" else None
            path = exchange.template
            for name, value in exchange.params.items():
                path = path.replace(f"{{{name}}}", quote(value, safe=""))
            headers = {"content-type": exchange.headers.get(b"content-type", b"application/json").decode("latin-1")}
            async with exchange.cancelled_by_hang_up(self._timeout_s + SLOW_READER_S):
                reply = await self._forward(method, path, body, headers, self._timeout_s)
                content_type = reply.headers.get("content-type", "application/json").encode("latin-1")
                await exchange.reply(reply.status, reply.body, content_type)

        return hand_on
