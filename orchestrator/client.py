"""A small client of a gateway's HTTP API: blocking, standard library only, one request a connection."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from orchestrator.sse import EventParser

_BODY_LIMIT_BYTES = 8 << 20
_TRY_AGAIN = "`truthgpt status` shows whether the stack is well; try again"


class GatewayError(Exception):
    """The gateway refused, failed or did not answer. `status` is its HTTP status, None when there was none."""

    def __init__(self, message: str, hint: str, status: int | None = None) -> None:
        super().__init__(message)
        self.hint, self.status = hint, status


@dataclass(frozen=True)
class Piece:
    """A part of a streamed answer. `usage` comes with the last one: (prompt tokens, completion tokens)."""

    text: str = ""
    finish_reason: str | None = None
    usage: tuple[int, int] | None = None


@dataclass(frozen=True)
class Answer:
    """A whole answer. `ttft_s` and `latency_s`: seconds from sending the request to its first text and to its end."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    latency_s: float


class GatewayClient:
    """One gateway. `timeout_s` bounds a whole call, streams included; `api_key` goes with every request."""

    def __init__(self, url: str, timeout_s: float = 10.0, api_key: str | None = None) -> None:
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            self._port = parts.port
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(url)
        except ValueError as error:
            hint = "give one such as http://127.0.0.1:8080"
            raise GatewayError(f"{url} is not the URL of a gateway", hint) from error
        if api_key is not None and re.fullmatch(r"[\x21-\x7e]+", api_key) is None:
            raise GatewayError("the API key has characters that no key has", "copy it again into TRUTHGPT_API_KEY")
        self.url = url
        self.headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._scheme, self._host, self._prefix = parts.scheme, parts.hostname, parts.path.rstrip("/")
        self._timeout_s = timeout_s

    def health(self) -> dict[str, Any]:
        """The gateway's deep health. Raises GatewayError."""
        return self._get("/health")

    def summary(self) -> dict[str, Any]:
        """The main figures; of the ops port. Raises GatewayError."""
        return self._get("/summary")

    def metrics(self) -> str:
        """Its series as Prometheus reads them; of the ops port. Raises GatewayError."""
        response, data = self._send("GET", "/metrics", None)
        if response.status != 200:
            raise _refusal(response.status, data, self.url, response.getheader("retry-after"))
        return data.decode("utf-8", "replace")

    def live(self) -> bool:
        """Whether the gateway's process answers."""
        try:
            return self._get("/health/live").get("live") is True
        except GatewayError:
            return False

    def models(self) -> list[str]:
        """Names of the models that it serves. Raises GatewayError."""
        rows = self._get("/v1/models").get("data")
        rows = rows if isinstance(rows, list) else []
        return [str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row]

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Piece]:
        """The pieces of a streamed (chat) completion. Raises GatewayError, also for an error inside the stream."""
        deadline = time.monotonic() + self._timeout_s
        wanted = {**body, "stream": True, "stream_options": {"include_usage": True}}
        exchange = _Exchange(self, deadline)
        try:
            response = exchange.send("POST", path, json.dumps(wanted, ensure_ascii=False).encode())
            kind = (response.getheader("content-type") or "").partition(";")[0].strip()
            if response.status != 200 or kind != "text/event-stream":
                raise _refusal(response.status, exchange.body(), self.url, response.getheader("retry-after"))
            parser = EventParser()
            while data := exchange.read():
                try:
                    events = parser.feed(data)
                except ValueError as error:
                    raise _nonsense(self.url) from error
                for event in events:
                    if event.strip() == b"[DONE]":
                        return
                    yield _piece(event, self.url)
            raise _cut_off()
        finally:
            exchange.close()

    def ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The whole answer of an endpoint that does not stream. Raises GatewayError."""
        return self._exchange("POST", path, json.dumps(body, ensure_ascii=False).encode())

    def _get(self, path: str) -> dict[str, Any]:
        return self._exchange("GET", path, None)

    def _exchange(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        response, data = self._send(method, path, body)
        answer = _json(data)
        if response.status != 200:
            raise _refusal(response.status, data, self.url, response.getheader("retry-after"))
        if not isinstance(answer, dict):
            raise _nonsense(self.url)
        return answer

    def _send(self, method: str, path: str, body: bytes | None) -> tuple[http.client.HTTPResponse, bytes]:
        exchange = _Exchange(self, time.monotonic() + self._timeout_s)
        try:
            return exchange.send(method, path, body), exchange.body()
        finally:
            exchange.close()

    def connect(self, timeout_s: float) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._scheme == "https" else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=timeout_s)

    def path(self, path: str) -> str:
        return self._prefix + path


class _Exchange:
    """One request and its response; every wait ends at `deadline`, a time of `time.monotonic()`."""

    def __init__(self, client: GatewayClient, deadline: float) -> None:
        self._client, self._deadline = client, deadline
        self._connection = client.connect(self._left())
        self._socket: socket.socket | None = None
        self._response: http.client.HTTPResponse | None = None

    def send(self, method: str, path: str, body: bytes | None) -> http.client.HTTPResponse:
        headers = {**self._client.headers, **({"content-type": "application/json"} if body is not None else {})}
        try:
            self._connection.connect()
            self._socket = self._connection.sock  # the connection lets go of it when the response is to close it
            self._connection.request(method, self._client.path(path), body, headers)
            self._socket.settimeout(self._left())
            self._response = self._connection.getresponse()
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise self._failed(error) from error
        return self._response

    def read(self) -> bytes:
        """What has arrived; empty at the end."""
        if self._response is None or self._socket is None:
            raise RuntimeError("send first")
        try:
            self._socket.settimeout(self._left())
            return self._response.read1(65536)
        except (OSError, http.client.HTTPException) as error:
            raise self._failed(error) from error

    def body(self) -> bytes:
        data = bytearray()
        while part := self.read():
            data += part
            if len(data) > _BODY_LIMIT_BYTES:
                raise _nonsense(self._client.url)
        return bytes(data)

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
        self._connection.close()

    def _left(self) -> float:
        return max(0.001, self._deadline - time.monotonic())

    def _failed(self, error: Exception) -> GatewayError:
        url = self._client.url
        if isinstance(error, TimeoutError):
            hint = "`truthgpt doctor` looks for the cause; --timeout waits longer"
            return GatewayError(f"{url} did not answer in time", hint)
        if isinstance(error, http.client.IncompleteRead):
            return _cut_off()
        if not isinstance(error, OSError):
            return _nonsense(url)
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return GatewayError(f"the connection to {url} failed: {why}", "`truthgpt status` shows whether a stack runs")


def _piece(event: bytes, url: str) -> Piece:
    fields = _json(event)
    if not isinstance(fields, dict):
        raise _nonsense(url)
    if "error" in fields:
        raise GatewayError(_message(fields) or "the model failed", _TRY_AGAIN)
    try:
        usage = fields.get("usage")
        counts = (int(usage["prompt_tokens"]), int(usage["completion_tokens"])) if usage else None
        choices = fields["choices"]
        if not choices:
            return Piece(usage=counts)
        text = choices[0]["delta"].get("content") if "delta" in choices[0] else choices[0]["text"]
        return Piece(str(text or ""), choices[0].get("finish_reason"), counts)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise _nonsense(url) from error


def _refusal(status: int, body: bytes, url: str, retry_after: str | None) -> GatewayError:
    message = _message(_json(body)) or f"{url} answered with status {status}"
    hint = {
        400: "`truthgpt generate --help` describes the options",
        401: "set TRUTHGPT_API_KEY to a valid key; make one with `truthgpt keys create --tenant NAME`",
        403: "use a key of the scope that this needs; `truthgpt keys list` shows scopes",
        404: "`truthgpt models list` shows what there is",
        413: "send a shorter prompt",
        429: f"try again in {retry_after or 1} s",
        503: "`truthgpt status` shows what is not ready; try again shortly",
        504: "ask for fewer tokens, or try again when the stack is less busy",
    }.get(status, "the gateway's log is in TRUTHGPT_HOME/logs; `truthgpt doctor` looks for common causes")
    return GatewayError(message, hint, status)


def _message(fields: object) -> str:
    error = fields.get("error") if isinstance(fields, dict) else None
    return str(error.get("message") or "") if isinstance(error, dict) else str(error or "")


def _cut_off() -> GatewayError:
    return GatewayError("the answer ended before it was complete", _TRY_AGAIN)


def _nonsense(url: str) -> GatewayError:
    return GatewayError(f"the answer of {url} makes no sense", "check that this is the URL of a TruthGPT gateway")


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None  # the callers treat it as an answer that makes no sense
