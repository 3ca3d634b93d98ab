"""What a request's headers ask of the path: its cache policy and its task."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.domain import TASKS, CachePolicy
from orchestrator.errors import InvalidRequest, Text

_SAYS_NOTHING = CachePolicy()
_MAX_AGE_S = 2**31 - 1  # RFC 9111, section 1.2.2: more is as good as that


def cache_policy(headers: Mapping[bytes, bytes]) -> CachePolicy:
    """The request's `Cache-Control` (RFC 9111, section 5.2.1): no-cache, no-store and max-age; others say nothing here.

    A max-age that is no number of seconds means 0, so that what is not understood is never answered from the cache.
    Header names are lower-case.
    """
    given = headers.get(b"cache-control")
    if not given:
        return _SAYS_NOTHING
    lookup = store = True
    max_age_s = None
    for directive in given.decode("latin-1").lower().split(","):
        name, _, value = directive.strip().partition("=")
        if name == "no-cache":
            lookup = False
        elif name == "no-store":
            store = False
        elif name == "max-age":
            digits = value.strip('"')
            age = min(int(digits[:10]), _MAX_AGE_S) if digits.isascii() and digits.isdigit() else 0
            max_age_s = age if max_age_s is None else min(age, max_age_s)
    return CachePolicy(lookup, store, max_age_s)


def task(headers: Mapping[bytes, bytes], default: str) -> str:
    """The task that `X-TruthGPT-Task` names, else `default`. Raises InvalidRequest for an unknown one."""
    given = headers.get(b"x-truthgpt-task")
    if given is None:
        return default
    name = given.decode("latin-1").strip()
    if name not in TASKS:
        known = ", ".join(TASKS)
        raise InvalidRequest(
            Text(f"X-TruthGPT-Task must be one of {known}.", f"X-TruthGPT-Task debe ser uno de {known}."),
            "X-TruthGPT-Task",
        )
    return name
