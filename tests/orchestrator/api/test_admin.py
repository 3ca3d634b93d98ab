"""The admin edge: what reaches Triton, as what, and from whom."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Mapping
from typing import Any

import pytest

from orchestrator.api.admin import CONTROL, Admin
from orchestrator.api.middleware import FrontDoor
from orchestrator.domain import Caller
from orchestrator.errors import PermissionDenied, Unauthenticated, UpstreamUnavailable
from orchestrator.incident import Incident
from orchestrator.triton import Reply


class Upstream:
    """Stands for Triton's fetch; tells what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, bytes | None, str]] = []
        self.reply: Reply | Exception = Reply(200, {"content-type": "application/json"}, b"[]")
        self.told: list[Incident] = []

    async def fetch(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> Reply:
        self.asked.append((method, path, body, headers["content-type"]))
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply


def identify(headers: dict[bytes, bytes], address: str) -> Caller:
    key = headers.get(b"x-api-key")
    if key is None:
        raise Unauthenticated
    if key != b"admin":
        raise PermissionDenied
    return Caller("k1", scope="admin")


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


async def exchange(
    upstream: Upstream, method: str, path: str, body: bytes = b"", key: bytes | None = b"admin", **more: bytes
) -> tuple[int, bytes, dict[bytes, bytes]]:
    """One request through the front door: status, body and headers."""
    sent: list[Any] = []
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not waiting:  # a client that stays and sends nothing more
            await asyncio.Event().wait()
        return waiting.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    admin = Admin(upstream.fetch, 5.0, scrape, lambda: {"requests": 3}, upstream.told.append)
    door = FrontDoor(admin.routes, 1000, identify)
    headers = [(b"content-type", b"text/x")] + ([(b"x-api-key", key)] if key else [])
    headers += [(name.replace("_", "-").encode(), value) for name, value in more.items()]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": headers}
    scope["extensions"] = {"truthgpt.when_gone": {"call": lambda call, within_s: None}}
    await door(scope, receive, send)
    return sent[0]["status"], sent[1]["body"], dict(sent[0]["headers"])


async def ask(
    upstream: Upstream, method: str, path: str, body: bytes = b"", key: bytes | None = b"admin"
) -> tuple[int, bytes]:
    """One request through the front door: status and body."""
    return (await exchange(upstream, method, path, body, key))[:2]


def scrape(accept: str) -> tuple[bytes, str]:
    return f"up 1 {accept}".encode(), "text/x"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/repository/index"), ("POST", "/v2/repository/models/a%2Fb%20%C3%B1/load"),
        ("GET", "/v2/trace/setting"), ("POST", "/v2/models/m/trace/setting"), ("GET", "/v2/logging"),
        ("POST", "/v2/systemsharedmemory/region/r/register"), ("GET", "/v2/cudasharedmemory/region/r/status"),
    ],
)  # fmt: skip
async def test_calls_are_handed_on_as_they_are(upstream: Upstream, method: str, path: str) -> None:
    """Method, path with its encoding, body and type reach Triton; its answer comes back, errors and all."""
    upstream.reply = Reply(418, {"content-type": "text/plain"}, b"no")
    body = b'{"x": 1}' if method == "POST" else b""
    assert await ask(upstream, method, path, body) == (418, b"no")
    assert upstream.asked == [(method, path, body if method == "POST" else None, "text/x")]


async def test_each_call_is_told_of_with_what_became_of_it(upstream: Upstream) -> None:
    """Who did what to which model, and Triton's status; also where Triton did not answer. A refused call is no call."""
    await ask(upstream, "POST", "/v2/repository/models/demo/load", b"{}")
    upstream.reply = UpstreamUnavailable()
    await ask(upstream, "POST", "/v2/repository/models/demo/unload", b"{}")
    await ask(upstream, "POST", "/v2/repository/index", key=None)
    assert [(told.kind, told.caller, told.operation, told.detail) for told in upstream.told] == [
        ("admin", "k1", "/v2/repository/models/{model}/load", "POST /v2/repository/models/demo/load 200"),
        ("admin", "k1", "/v2/repository/models/{model}/unload", "POST /v2/repository/models/demo/unload unanswered"),
    ]


async def test_nobody_but_an_admin_comes_in(upstream: Upstream) -> None:
    """Without a key every path is 401, with another key 403, and Triton hears nothing."""
    for path, methods in CONTROL.items():
        for method in methods:
            path = path.replace("{model}", "m").replace("{region}", "r")
            assert (await ask(upstream, method, path, key=None))[0] == 401
            assert (await ask(upstream, method, path, key=b"inference"))[0] == 403
    assert upstream.asked == []


async def test_liveness_needs_no_key(upstream: Upstream) -> None:
    """The probe answers anybody; it says nothing of Triton."""
    assert await ask(upstream, "GET", "/health/live", key=None) == (200, b'{"live":true}')
    assert upstream.asked == []


@pytest.mark.parametrize(
    ("accepted", "packed"),
    [(b"", False), (b"gzip", True), (b"br;q=1.0, gzip;q=0.8", True), (b"GZIP ; q=0.5", True), (b"gzip;q=0", False),
     (b"identity, gzip; q=0.00", False), (b"deflate", False)],
)  # fmt: skip
async def test_metrics_need_no_key(upstream: Upstream, accepted: bytes, packed: bool) -> None:
    """Prometheus reads them without one, in the form that it accepts, packed where it says so."""
    status, body, headers = await exchange(
        upstream, "GET", "/metrics", key=None, accept=b"application/x", accept_encoding=accepted
    )
    assert (status, headers[b"content-type"]) == (200, b"text/x")
    assert (headers.get(b"content-encoding") == b"gzip") is packed
    assert (gzip.decompress(body) if packed else body) == b"up 1 application/x"
    assert headers[b"vary"] == b"Accept, Accept-Encoding" and int(headers[b"content-length"]) == len(body)


async def test_inference_is_not_offered_here(upstream: Upstream) -> None:
    """Only what CONTROL lists is there: the admin port is no way around the limits."""
    for path in ("/v2/models/m/infer", "/v2/models/m/generate", "/v2/models/m", "/v1/completions"):
        assert (await ask(upstream, "POST", path, b"{}"))[0] == 404
    assert upstream.asked == []


async def test_failures_and_large_bodies(upstream: Upstream) -> None:
    """A Triton that is away is 503 in KServe's form; a body over the limit is 413 and goes no further."""
    assert (await ask(upstream, "POST", "/v2/repository/index", b"x" * 1001))[0] == 413
    assert upstream.asked == []
    upstream.reply = UpstreamUnavailable("Triton does not answer")
    status, body = await ask(upstream, "POST", "/v2/repository/index")
    assert (status, list(json.loads(body))) == (503, ["error"])


async def test_the_summary_is_for_all(upstream: Upstream) -> None:
    """The main figures need no key: they name no user and no text."""
    status, body = await ask(upstream, "GET", "/summary", key=None)
    assert (status, json.loads(body)) == (200, {"requests": 3})
