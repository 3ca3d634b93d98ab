"""The credential in a request's headers."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.errors import Text, Unauthenticated

MAX_BYTES = 512  # several times what a key has
_UNKNOWN = ""  # no key is an empty text

_TWO = Text(
    "Authorization and x-api-key hold different API keys: send one of them.",
    "Authorization y x-api-key contienen claves de API distintas: envíe solo una.",
)


def credential_of(headers: Mapping[bytes, bytes]) -> str | None:
    """What `Authorization: Bearer KEY` (RFC 6750) or `x-api-key: KEY` says, None without either.

    What no key can be, too long or not ASCII, comes back as a text that is no key. Raises Unauthenticated when the two
    headers differ. Header names are lower-case.
    """
    scheme, _, bearer = headers.get(b"authorization", b"").strip().partition(b" ")
    given = {bearer.strip() if scheme.lower() == b"bearer" else b"", headers.get(b"x-api-key", b"").strip()} - {b""}
    if len(given) > 1:
        raise Unauthenticated(_TWO, "two different credentials")
    if not given:
        return None
    credential = given.pop()
    return credential.decode("ascii") if len(credential) <= MAX_BYTES and credential.isascii() else _UNKNOWN
