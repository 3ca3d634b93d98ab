"""What every edge reads of a request first: its id, its trace and its language. Names are lower-case, as in HTTP/2."""

from __future__ import annotations

import re
from functools import lru_cache

from orchestrator.ids import random_id

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
# W3C Trace Context, version 00: an all-zero trace or parent id is invalid
_TRACEPARENT = re.compile(rb"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def request_id(given: bytes | None) -> str:
    """The client's own id of its request, where it is one that can be echoed and logged, else a new one."""
    return given.decode() if given and _REQUEST_ID.fullmatch(given) else random_id(16)


def traceparent_of(given: bytes | None) -> str | None:
    """The client's W3C trace context, None without a valid one."""
    return given.decode() if given and _TRACEPARENT.fullmatch(given) else None


@lru_cache(maxsize=64)
def language_of(accept: bytes) -> str:
    """en or es by Accept-Language (RFC 9110): highest weight, then order; English without either."""
    if not accept:
        return "en"
    best, weight = "en", 0.0
    for item in accept.decode("latin-1").lower().split(",")[:20]:
        tag, *parameters = (part.strip() for part in item.split(";"))
        language = tag.partition("-")[0]
        if language not in ("en", "es"):
            continue
        q = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    q = float(parameter[2:])
                except ValueError:
                    q = 0.0
        if q > weight:
            best, weight = language, q
    return best
