"""What a connection says to what is not, or not yet, a request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from orchestrator.errors import Text


@dataclass(frozen=True)
class Refusal:
    """An answer for which nothing is known of the client's edge, key or language."""

    status: int
    kind: str
    code: str
    text: Text

    def encode(self, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
        error = {"message": f"{self.text.en} {self.text.es}", "type": self.kind, "param": None, "code": self.code}
        body = json.dumps({"error": error}, ensure_ascii=False).encode()
        fixed = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        if self.status == 503:
            fixed.append((b"retry-after", b"1"))
        lines = [b"%b: %b\r\n" % header for header in (*headers, *fixed)]
        return b"".join([STATUS_LINE[self.status], *lines, b"\r\n", body])


def _invalid(status: int, code: str, en: str, es: str) -> Refusal:
    return Refusal(status, "invalid_request_error", code, Text(en, es))


MALFORMED = _invalid(400, "malformed_request", "This is not HTTP/1.1.", "Esto no es HTTP/1.1.")
TOO_SLOW = _invalid(
    408, "request_timeout", "The request took too long to arrive.", "La solicitud tardó demasiado en llegar."
)
NO_UPGRADE = _invalid(400, "no_upgrade", "Only HTTP/1.1 is spoken here.", "Aquí solo se habla HTTP/1.1.")
LONG_TARGET = _invalid(414, "uri_too_long", "The request's URL is too long.", "La URL de la solicitud es muy larga.")
LARGE_HEAD = _invalid(
    431,
    "headers_too_large",
    "The request's headers are too many or too long.",
    "Hay demasiadas cabeceras o muy largas.",
)
CROWDED = Refusal(
    503,
    "service_unavailable_error",
    "too_many_connections",
    Text("Too many connections.", "Hay demasiadas conexiones."),
)
