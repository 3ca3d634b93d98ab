"""Compressed bodies within the size limit, and what is no JSON object."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.bodies import decompress
from orchestrator.errors import InvalidRequest, PayloadTooLarge

LIMIT = 10_000


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


PACKERS = {"gzip": [gzip.compress], "deflate": [zlib.compress, raw_deflate]}


@given(st.binary(max_size=LIMIT))
def test_every_container_comes_back_whole(data: bytes) -> None:
    """gzip, zlib's deflate and the raw one give back what was packed, up to the limit itself."""
    for coding, packers in PACKERS.items():
        for packer in packers:
            assert decompress(packer(data), coding, LIMIT) == data


def test_members_one_after_another_are_one_body() -> None:
    """A gzip body of several members is their data in a row, and the limit counts all of it."""
    members = gzip.compress(b"a" * 6000) + gzip.compress(b"b" * 4000)
    assert decompress(members, "gzip", LIMIT) == b"a" * 6000 + b"b" * 4000
    with pytest.raises(PayloadTooLarge):
        decompress(members, "gzip", LIMIT - 1)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_bomb_is_refused_in_little_memory(coding: str) -> None:
    """20 MB of zeros in 20 KB raise PayloadTooLarge, and no more than a few times the limit is ever held."""
    bomb = PACKERS[coding][0](bytes(20 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(PayloadTooLarge):
            decompress(bomb, coding, LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 10 * LIMIT + (1 << 20)
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=300), st.sampled_from(["gzip", "deflate"]))
def test_garbage_is_the_clients_error(data: bytes, coding: str) -> None:
    """Any bytes either decompress or are InvalidRequest."""
    try:
        assert len(decompress(data, coding, LIMIT)) <= LIMIT
    except InvalidRequest:
        return


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_body_cut_off_is_no_body(coding: str) -> None:
    """Every shortened body is refused, none is taken for complete; so is one with something behind it."""
    whole = PACKERS[coding][0](b"the body of a request" * 10)
    for length in range(1, len(whole)):
        with pytest.raises(InvalidRequest):
            decompress(whole[:length], coding, LIMIT)
    with pytest.raises(InvalidRequest):
        decompress(whole + b"x", coding, LIMIT)


def test_very_many_members_are_refused() -> None:
    """A body of empty members cannot keep the process busy for long."""
    with pytest.raises(InvalidRequest):
        decompress(gzip.compress(b"") * 2000, "gzip", LIMIT)
