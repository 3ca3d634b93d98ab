"""The admin edge: Triton's model control, trace, log and shared-memory settings, handed on as they are; where there are
several servers, to each (fleet/control.py).

It has a front door of its own on the ops port, where everything needs an admin key but the liveness of the process,
what Prometheus reads and the summary of it, which name no user and no text.
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol
from urllib.parse import quote

from orchestrator.api.http import SLOW_READER_S, Exchange
from orchestrator.api.middleware import Routes
from orchestrator.incident import Incident

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
# what the Accept header says -> the metrics as text, and their media type
Scrape = Callable[[str], tuple[bytes, str]]
# the main figures, as JSON
Figures = Callable[[], Mapping[str, Any]]


class Admin:
    """The handlers. `timeout_s` bounds each call: loading a model takes long. `report` is told of each one."""

    def __init__(
        self, forward: Forward, timeout_s: float, scrape: Scrape, figures: Figures,
        report: Callable[[Incident], None] = lambda incident: None,
    ) -> None:  # fmt: skip
        self._forward, self._timeout_s, self._scrape, self._report = forward, timeout_s, scrape, report
        self._figures = figures

    @property
    def routes(self) -> Routes:
        return {
            "/health/live": {"GET": self.live},
            "/metrics": {"GET": self.metrics},
            "/summary": {"GET": self.summary},
            **{path: {method: self._handler(method) for method in methods} for path, methods in CONTROL.items()},
        }

    async def live(self, exchange: Exchange) -> None:
        """200 as long as this process answers at all."""
        await exchange.reply_json(200, {"live": True})

    async def metrics(self, exchange: Exchange) -> None:
        """The gateway's series in the text format or OpenMetrics, by Accept; packed where gzip is asked for."""
        body, media_type = self._scrape(exchange.headers.get(b"accept", b"").decode("latin-1"))
        headers = [(b"vary", b"Accept, Accept-Encoding")]
        if _takes_gzip(exchange.headers.get(b"accept-encoding", b"")):
            body = gzip.compress(body, compresslevel=1)
            headers.append((b"content-encoding", b"gzip"))
        await exchange.reply(200, body, media_type.encode(), headers)

    async def summary(self, exchange: Exchange) -> None:
        """The main figures of the last five minutes and of now, as one JSON object (docs/monitoring.md)."""
        await exchange.reply_json(200, dict(self._figures()))

    def _handler(self, method: str) -> Callable[[Exchange], Awaitable[None]]:
        async def hand_on(exchange: Exchange) -> None:
            body = await exchange.body() if method == "POST" else None
            path = exchange.template
            for name, value in exchange.params.items():
                path = path.replace(f"{{{name}}}", quote(value, safe=""))
            headers = {"content-type": exchange.headers.get(b"content-type", b"application/json").decode("latin-1")}
            status = "unanswered"
            try:
                async with exchange.cancelled_by_hang_up(self._timeout_s + SLOW_READER_S):
                    reply = await self._forward(method, path, body, headers, self._timeout_s)
                    status = str(reply.status)
                    content_type = reply.headers.get("content-type", "application/json").encode("latin-1")
                    await exchange.reply(reply.status, reply.body, content_type)
            finally:
                self._report(_call(exchange, f"{method} {path} {status}"))

        return hand_on


def _call(exchange: Exchange, detail: str) -> Incident:
    return Incident(
        kind="admin", id=exchange.id, edge=exchange.notes.edge, operation=exchange.template, caller=exchange.caller.id,
        address=exchange.address, at=time.time(), traceparent=exchange.traceparent, detail=detail,
    )  # fmt: skip


def _takes_gzip(accept: bytes) -> bool:
    """Whether Accept-Encoding names gzip, and not only to refuse it (RFC 9110, section 12.5.3)."""
    for item in accept.decode("latin-1").lower().split(","):
        coding, _, weight = item.replace(" ", "").partition(";")
        if coding == "gzip":
            return weight.removeprefix("q=").strip("0.") != "" or not weight
    return False
