"""A way to a gateway that begins with a refusal: the first request is told to come back, and all later ones pass."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from types import TracebackType
from typing import Self

REFUSAL = (
    b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b'Content-Length: 73\r\n\r\n{"error": {"message": "no", "type": "x", "param": null, "code": "refused"}}'
)
RETRY_AFTER_S = 1.0
TOGETHER_S = 0.5


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        way = self.server
        assert isinstance(way, Refusing)
        head, body = self._first_request()
        if way.refuses(body):
            self.request.sendall(REFUSAL)
            return
        with socket.create_connection(("127.0.0.1", way.target)) as onward:
            onward.sendall(head + body)
            back = threading.Thread(target=_pour, args=(onward, self.request), daemon=True)
            back.start()
            _pour(self.request, onward)
            back.join()

    def _first_request(self) -> tuple[bytes, bytes]:
        read = b""
        while b"\r\n\r\n" not in read:
            read += self.request.recv(65536)
        end = read.index(b"\r\n\r\n") + 4
        lines = read[:end].lower().split(b"\r\n")
        length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
        while len(read) < end + length:
            read += self.request.recv(65536)
        return read[:end], read[end:]


def _pour(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:  # one of them has hung up: the other learns of it by the closing of both
        return


class Refusing(socketserver.ThreadingTCPServer):
    """In front of a port of this machine. `waited_s`: seconds from the refusal of a request until it came again, the
    least where several were sent at once.
    """

    daemon_threads = True

    def __init__(self, target: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.waited_s = 0.0
        self._lock = threading.Lock()
        self._refused: dict[bytes, float] = {}
        self._began: float | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def refuses(self, body: bytes) -> bool:
        """Whether to refuse the request with this body: the first one, and others that were sent together with it."""
        with self._lock:
            now = time.monotonic()
            if body in self._refused:
                waited_s = now - self._refused.pop(body)
                self.waited_s = min(waited_s, self.waited_s or waited_s)
                return False
            if self._began is not None and now - self._began > TOGETHER_S:
                return False
            self._began = self._began or now
            self._refused[body] = now
            return True

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self.server_close()
