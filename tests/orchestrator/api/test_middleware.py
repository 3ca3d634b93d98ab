"""The front door: ids, languages, routes, body caps and hostile bodies."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest

from orchestrator.api.http import Exchange
from orchestrator.api.middleware import FrontDoor
from orchestrator.domain import Caller
from orchestrator.errors import Unauthenticated

from ..conftest import Stack, serving
from ..fake_triton import FakeTriton

BODY = {"model": "m", "prompt": "Hola"}


@pytest.mark.parametrize("path", ["/v1/models", "/nothing", "/v1/completions"])
@pytest.mark.parametrize("given_id", ["abc-1", "a.b:c/d+e=f@g", "x" * 128])
async def test_request_ids_are_echoed(stack: Stack, path: str, given_id: str) -> None:
    """A valid X-Request-Id comes back on answers, 404 and 405 alike."""
    assert (await stack.get(path, **{"x-request-id": given_id}))[2]["x-request-id"] == given_id


@pytest.mark.parametrize("bad", ["", "x" * 129, "a b", "a\tb", "ñ", '"><script>'])
async def test_bad_request_ids_are_replaced(stack: Stack, bad: str) -> None:
    """An id that could break a log or a header is replaced by one of ours."""
    assert len((await stack.get("/v1/models", **{"x-request-id": bad}))[2]["x-request-id"]) == 32


async def test_each_request_gets_its_own_id(stack: Stack) -> None:
    """Without the header every response has a fresh id."""
    ids = {(await stack.get("/health/live"))[2]["x-request-id"] for _ in range(5)}
    assert len(ids) == 5


async def test_traceparent_reaches_triton(stack: Stack) -> None:
    """A valid traceparent is forwarded and recorded, an invalid one is dropped."""
    good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    await stack.post("/v1/completions", BODY, traceparent=good)
    await stack.post("/v1/completions", BODY, traceparent="00-" + "0" * 32 + "-00f067aa0ba902b7-01")
    assert [headers.get("traceparent") for headers in stack.fake.headers] == [good, None]
    assert [record.traceparent for record in stack.records] == [good, None]


async def test_unknown_paths_and_methods(stack: Stack) -> None:
    """404 and 405 have OpenAI's error object, 405 says what is allowed, and KServe paths get KServe's."""
    for path in ("/", "/v1", "/v1/completion", "/v1/completions/", "/v1/models/", "/v1/models/a/b"):
        status, body, _ = await stack.get(path)
        assert (status, body["error"]["code"]) == (404, "not_found"), path
    status, body, headers = await stack.get("/v1/completions", **{"accept-language": "es"})
    assert (status, headers["allow"], body["error"]["message"]) == (405, "POST", "Esta ruta no admite este método.")
    for path in ("/v2/", "/v2/models", "/v2/models/m/tokens"):
        assert (await stack.get(path))[:2] == (404, {"error": "There is nothing at this path."})
    assert (await stack.get("/v2/models/m/infer"))[:2] == (405, {"error": "This path does not take this method."})
    async with stack.http.head(stack.url + "/health/live") as response:
        assert response.status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b'"x"', b"null", b'{"model": "\xff"}', b'{"model": "\\ud800"}', b'{"temperature": NaN}',
        b'{"temperature": -Infinity}', b"[" * 500_000, b'{"a":' * 100_000, b'{"model": ' + b"9" * 10_000 + b"}",
        b'{"metadata": ' + b"[" * 70 + b"]" * 70 + b"}", b"\xef\xbb\xbf{}", "{}".encode("utf-16"),
    ],
)  # fmt: skip
async def test_hostile_bodies_are_400(stack: Stack, body: bytes) -> None:
    """Bad JSON, bad UTF-8, lone surrogates, NaN, deep nesting and endless numbers are a 400 with a typed body."""
    status, answer, _ = await stack.post("/v1/completions", body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


async def test_valid_escapes_pass(stack: Stack) -> None:
    """An escaped emoji pair is text like any other."""
    status, _, _ = await stack.post("/v1/completions", b'{"model": "m", "prompt": "\\ud83d\\ude00"}')
    assert status == 200
    assert stack.fake.requests[0]["text_input"] == "😀"


async def test_body_cap(fake: FakeTriton) -> None:
    """A body over the cap is 413, declared or streamed, and one at the cap is read."""
    async with serving(fake, body_limit_bytes=2000) as stack:
        padding = 2000 - len(json.dumps({**BODY, "user": ""}))
        assert (await stack.post("/v1/completions", {**BODY, "user": "x" * padding}))[0] == 200
        status, body, headers = await stack.post("/v1/completions", {**BODY, "user": "x" * (padding + 1)})
        assert (status, body["error"]["code"], headers["connection"]) == (413, "payload_too_large", "close")

        async def endless():  # type: ignore[no-untyped-def]
            while True:
                yield b" " * 500

        async with aclosing(endless()) as data, stack.http.post(stack.url + "/v1/completions", data=data) as response:
            assert response.status == 413


@pytest.mark.parametrize("pack", [("gzip", gzip.compress), ("deflate", zlib.compress), ("GZIP", gzip.compress)])
async def test_compressed_bodies(stack: Stack, pack: tuple[str, Callable[[bytes], bytes]]) -> None:
    """A gzip or deflate body is read as what it was before, on either edge, and one that is none is 400."""
    coding, compress = pack
    for path, body in (("/v1/completions", BODY), ("/v2/models/m/generate", {"text_input": "Hola"})):
        packed = compress(json.dumps(body).encode())
        assert (await stack.post(path, packed, **{"content-encoding": coding}))[0] == 200
        assert (await stack.post(path, packed[:-9], **{"content-encoding": coding}))[0] == 400
    assert [request["text_input"] for request in stack.fake.requests] == ["Hola", "Hola"]


async def test_a_bomb_is_413_and_an_unknown_coding_415(stack: Stack) -> None:
    """The limit holds for what a body unpacks to; what cannot be unpacked is refused with what can."""
    bomb = gzip.compress(bytes(stack.server.config.app.settings.body_limit_bytes + 1))
    status, body, _ = await stack.post("/v1/completions", bomb, **{"content-encoding": "gzip"})
    assert (status, body["error"]["code"]) == (413, "payload_too_large")
    for coding in ("br", "gzip, gzip", "\xff"):
        status, body, headers = await stack.post("/v2/models/m/infer", b"{}", **{"content-encoding": coding})
        assert (status, list(body), headers["accept-encoding"]) == (415, ["error"], "gzip, deflate")


async def test_too_many_headers(stack: Stack) -> None:
    """More than 100 fields, or more than 64 KiB of them, is 431, whatever they ask for."""
    door = stack.server.config.app._door
    for headers in ([(b"x", b"y")] * 101, [(b"x", b"y" * (64 << 10))]):
        status, _, body = await ask(door, "/v1/models", headers)
        assert (status, body["error"]["code"]) == (431, "headers_too_large")
    assert (await ask(door, "/v1/models", [(b"x", b"y")] * 100))[0] == 200


async def ask(door: FrontDoor, path: str, headers: list[tuple[bytes, bytes]]) -> tuple[int, dict[bytes, bytes], Any]:
    """One GET without a server in between: status, headers, decoded body."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": headers, "client": ("192.0.2.7", 1)}
    await door(scope, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), json.loads(sent[1]["body"])


async def test_who_may_come_in() -> None:
    """Every path asks who it is but the probes and those that are not there; the caller reaches the handler."""
    asked: list[tuple[bytes | None, str]] = []
    seen: list[Caller] = []

    def identify(headers: dict[bytes, bytes], address: str) -> Caller:
        asked.append((headers.get(b"x-api-key"), address))
        if headers.get(b"x-api-key") != b"good":
            raise Unauthenticated
        return Caller("k1", tenant="t1")

    async def handler(exchange: Exchange) -> None:
        seen.append(exchange.caller)
        await exchange.reply_json(200, {})

    door = FrontDoor({path: {"GET": handler} for path in ("/v1/x", "/v2/{a}", "/health/live")}, 1000, identify)
    assert (await ask(door, "/health/live", []))[0] == 200
    assert (await ask(door, "/nothing", []))[0] == 404
    assert asked == []
    for path in ("/v1/x", "/v2/health"):
        status, headers, body = await ask(door, path, [(b"accept-language", b"es")])
        assert (status, headers[b"www-authenticate"]) == (401, b"Bearer")
        assert "Se necesita una clave" in json.dumps(body, ensure_ascii=False)
    assert (await ask(door, "/v1/x", [(b"x-api-key", b"good"), (b"accept-language", b"es")]))[0] == 200
    assert asked == [(None, "192.0.2.7"), (None, "192.0.2.7"), (b"good", "192.0.2.7")]
    assert seen == [Caller("anonymous"), Caller("k1", tenant="t1", language="es")]


async def test_where_keys_are_asked_for(fake: FakeTriton) -> None:
    """With auth=keys the real application answers 401 without a key on every edge, and its probes without one."""
    async with serving(fake, auth="keys", environment="staging") as stack:
        for path in ("/v1/models", "/v2", "/v2/models/m", "/v2/models/m/ready", "/v2/models/stats"):
            status, _, headers = await stack.get(path)
            assert (status, headers["www-authenticate"]) == (401, "Bearer"), path
        for path in ("/health", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"):
            assert (await stack.get(path))[0] == 200, path


async def test_a_declared_giant_is_refused_before_it_is_sent(stack: Stack) -> None:
    """The answer to a giant Content-Length comes before one byte of the body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(stack.url.rpartition(":")[2]))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999999999\r\n\r\n")
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 2)
    assert b" 413 " in head or b" 400 " in head
    writer.close()


async def test_a_client_that_leaves_while_sending_harms_nobody(stack: Stack) -> None:
    """Half a body and then nothing leaves no record and no request in flight."""
    _, writer = await asyncio.open_connection("127.0.0.1", int(stack.url.rpartition(":")[2]))
    writer.write(b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"model')
    await writer.drain()
    writer.close()
    await asyncio.sleep(0.1)
    assert stack.gateway.in_flight == 0
    assert stack.records == []
    assert (await stack.post("/v1/completions", BODY))[0] == 200


async def test_a_bug_shows_a_generic_text(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An unforeseen exception in a handler is a 500 without its text, which is only logged."""

    def broken(*_: object) -> None:
        raise RuntimeError("the secret detail")

    monkeypatch.setattr("orchestrator.api.openai._model", broken)
    status, body, _ = await stack.get("/v1/models")
    assert (status, body["error"]["code"]) == (500, "internal_error")
    assert "secret" not in json.dumps(body)
    assert "failed" in caplog.text
