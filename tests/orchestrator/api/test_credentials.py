"""The credential in a request's headers."""

from __future__ import annotations

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import keys
from orchestrator.api.credentials import credential_of
from orchestrator.errors import Unauthenticated
from orchestrator.ops.keyring import Keyring
from tests.clock import awake
from tests.redis import RealRedis

from ..conftest import eventually, serving
from ..fake_triton import FakeTriton


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "found"),
    [
        (b"Bearer abc", None, "abc"), (b"bearer abc", None, "abc"), (b"  BEARER   abc ", None, "abc"),
        (None, b"abc", "abc"), (b"Bearer abc", b"abc", "abc"), (b"Basic dTpw", b"abc", "abc"),
        (None, None, None), (b"", b"", None), (b"Bearer", None, None), (b"Bearer  ", b" ", None),
        (b"Basic dTpw", None, None), (b"abc", None, None),
    ],
)  # fmt: skip
def test_either_header_holds_it(authorization: bytes | None, x_api_key: bytes | None, found: str | None) -> None:
    """Bearer in any case, x-api-key, or both with the same key; another scheme is no credential."""
    headers = {b"authorization": authorization, b"x-api-key": x_api_key}
    assert credential_of({name: value for name, value in headers.items() if value is not None}) == found


def test_two_different_keys_are_refused() -> None:
    """Nobody guesses which of two keys was meant; the text says so in both languages."""
    with pytest.raises(Unauthenticated) as caught:
        credential_of({b"authorization": b"Bearer abc", b"x-api-key": b"abd"})
    assert "x-api-key" in caught.value.text.en and "x-api-key" in caught.value.text.es


@pytest.mark.parametrize("value", [b"x" * 513, b"x" * 1_000_000, "ñ".encode(), b"\xff"])
def test_what_no_key_can_be_is_unknown(value: bytes) -> None:
    """Overlong and non-ASCII values are credentials that no key has, not missing ones."""
    for headers in ({b"authorization": b"Bearer " + value}, {b"x-api-key": value}):
        found = credential_of(headers)
        assert found is not None and keys.split(found) is None and len(found) < 513


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_any_bytes_are_read(authorization: bytes, x_api_key: bytes) -> None:
    """Whatever the headers hold is a credential, none, or Unauthenticated."""
    try:
        found = credential_of({b"authorization": authorization, b"x-api-key": x_api_key})
    except Unauthenticated:
        return
    assert found is None or found.isascii()


async def test_a_key_opens_the_gateway_until_it_is_revoked(fake: FakeTriton) -> None:
    """Over HTTP: 401 without a key, 200 with one in either header, 401 within a second of its revocation; probes
    need none, and while Redis is away a known key works and an unknown one gets 503 with Retry-After."""
    with RealRedis() as server, redis.Redis.from_url(server.url) as client:
        keyring = Keyring(client)
        key, credential = keyring.create("acme")
        _, other = keyring.create("acme")
        unknown = keys.credential(keys.new_id(), keys.new_secret())
        async with serving(fake, redis_url=server.url, redis_timeout_s=0.2, auth="keys") as stack:

            async def status(**headers: str) -> int:
                return (await stack.get("/v1/models", **headers))[0]

            async def known() -> bool:
                return await status(Authorization=f"Bearer {credential}") == 200

            await eventually(known)
            assert await status(**{"x-api-key": credential}) == 200
            assert await status() == 401 and await status(Authorization=f"Bearer {unknown}") == 401
            assert (await stack.get("/health/ready"))[0] == 200

            async def refused() -> bool:
                return await status(Authorization=f"Bearer {credential}") == 401

            keyring.revoke(key.id)
            began = awake()
            await eventually(refused)
            assert awake() - began < 1.0
            server.stop_answering()

            async def unsure() -> bool:
                return await status(Authorization=f"Bearer {unknown}") == 503

            await eventually(unsure)
            assert "retry-after" in (await stack.get("/v1/models", Authorization=f"Bearer {unknown}"))[2]
            assert await status(Authorization=f"Bearer {other}") == 200
