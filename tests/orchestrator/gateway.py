"""A gateway of the tests' own on a real socket, and stacks that look running to the commands, for tests of the CLI."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from orchestrator.local import state, tritonserver


def chunk(text: str, reason: str | None = None, chat: bool = True) -> bytes:
    """One event of a stream, in OpenAI's form."""
    part: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
    choice = {"index": 0, **part, "finish_reason": reason}
    return b"data: " + json.dumps({"choices": [choice], "usage": None}, ensure_ascii=False).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\n'
DONE = b"data: [DONE]\n\n"
ANSWER = [chunk(""), chunk("¡Hola, "), chunk("mundo!"), chunk("", "stop"), USAGE, DONE]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is what some tests are about; anything else is printed as usual."""
        if not isinstance(sys.exc_info()[1], (BrokenPipeError, ConnectionResetError)):
            super().handle_error(request, client_address)


class Gateway:
    """Serves `health` and `models`, and answers completions with `events`, `pause_s` apart, or all with `answer`; keeps
    what was asked.

    With `cut_off` the connection is lost after the last event. `credentials` has the Authorization of each request.
    """

    def __init__(self) -> None:
        self.row: dict[str, Any] = {
            "name": "demo", "version": "1", "ready": True, "reason": None, "chat": True, "running": 0, "waiting": 0,
            "slots": 4,
        }  # fmt: skip
        self.tritons: list[dict[str, Any]] = []
        self.summary: dict[str, Any] | None = None  # what its ops port would say
        self.ready = True
        self.health_status = 200
        self.health_stall_s = 0.0
        self.stall_s = 0.0
        self.status, self.body, self.headers = 200, b"", {}  # type: int, bytes, dict[str, str]
        self.events: list[bytes] = list(ANSWER)
        self.answer: dict[str, Any] | None = None
        self.pause_s = 0.0
        self.cut_off = False
        self.whole_event_a_chunk = True
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.credentials: list[str | None] = []
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> Gateway:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def health(self) -> dict[str, Any]:
        return {
            "ready": self.ready, "draining": False, "uptime_s": 5.0, "in_flight": 0, "models": [self.row],
            "triton": {"url": "http://127.0.0.1:1", "up": True}, "redis": {"configured": True, "up": True},
            "tritons": self.tritons,
        }  # fmt: skip

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                """Tests say what they want to see."""

            def do_GET(self) -> None:
                gateway.credentials.append(self.headers["authorization"])
                time.sleep(gateway.health_stall_s)
                if self.path == "/v1/models":
                    return self._json(200, {"object": "list", "data": [{"id": gateway.row["name"]}]})
                if self.path == "/summary" and gateway.summary is not None:
                    return self._json(200, gateway.summary)
                if self.path == "/health/live":
                    return self._json(200, {"live": True})
                return self._json(gateway.health_status, gateway.health())

            def do_POST(self) -> None:
                length = int(self.headers["content-length"])
                gateway.credentials.append(self.headers["authorization"])
                gateway.asked.append((self.path, json.loads(self.rfile.read(length))))
                time.sleep(gateway.stall_s)
                if gateway.status != 200:
                    self.send_response(gateway.status)
                    for name, value in gateway.headers.items():
                        self.send_header(name, value)
                    self.send_header("content-length", str(len(gateway.body)))
                    self.end_headers()
                    self.wfile.write(gateway.body)
                    return
                if gateway.answer is not None:
                    return self._json(200, gateway.answer)
                self.send_response(200)
                self.send_header("content-type", "text/event-stream; charset=utf-8")
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                data = gateway.events
                if not gateway.whole_event_a_chunk:
                    data = [bytes([byte]) for event in data for byte in event]
                for part in data:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                    self.wfile.flush()
                    time.sleep(gateway.pause_s)
                if not gateway.cut_off:
                    self.wfile.write(b"0\r\n\r\n")
                self.close_connection = gateway.cut_off

            def _json(self, status: int, value: object) -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        return Handler


def write_state(home: Path, http: str, pid: int | None = None, **changes: Any) -> state.State:
    """A state file as the supervisor writes it, by default of the test's own process, which certainly runs."""
    pid = os.getpid() if pid is None else pid
    home.mkdir(parents=True, exist_ok=True)
    created = psutil.Process(pid).create_time()
    facts: dict[str, Any] = {
        "pid": pid, "created": created, "started": time.time() - 5, "http": http, "grpc": "127.0.0.1:1",
        "ops": "http://127.0.0.1:1", "triton_http": "http://127.0.0.1:1", "triton_grpc": "127.0.0.1:1",
        "redis": "unix:///nowhere/redis.sock", "model": "demo", "shm_prefix": tritonserver.shm_prefix(home),
        "processes": {},
    }  # fmt: skip
    found = state.State(**{**facts, **changes})
    state.write(home, found)
    return found


def eventually(holds: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait for a condition. Fails after the time-out."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)
