"""KServe v2's binary form of tensors."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from orchestrator.domain import Tensor
from orchestrator.errors import InvalidRequest
from orchestrator.tensors import SIZES, check, pack, unpack


@given(st.lists(st.binary(max_size=20), max_size=20))
def test_bytes_elements_are_packed_as_tritons_client_packs_them(elements: list[bytes]) -> None:
    """The binary form is that of tritonclient, and it comes back as the same elements."""
    tensor = Tensor("t", "BYTES", (len(elements),), elements=tuple(elements))
    packed = serialize_byte_tensor(np.array(elements, dtype=object))
    assert pack(tensor) == (packed.item() if elements else b"")
    assert unpack("t", "BYTES", (len(elements),), pack(tensor)) == tensor


@pytest.mark.parametrize("dtype", ["?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"])
def test_sizes_are_numpys(dtype: str) -> None:
    """Each datatype has as many bytes an element as the client's type for it."""
    array = np.zeros((2, 3), dtype)
    name = np_to_triton_dtype(array.dtype)
    assert SIZES[name] == array.itemsize
    check(Tensor("t", name, (2, 3), array.tobytes()))


@given(st.binary(max_size=60), st.lists(st.integers(0, 4), max_size=3))
def test_any_bytes_are_a_tensor_or_the_clients_error(raw: bytes, shape: list[int]) -> None:
    """Nothing but InvalidRequest comes out of bytes that are no tensor, and what is one packs to the same bytes."""
    for datatype in (*SIZES, "BYTES", "COMPLEX"):
        try:
            tensor = unpack("t", datatype, tuple(shape), raw)
        except InvalidRequest as error:
            assert error.param == "t"
        else:
            assert pack(tensor) == raw


@pytest.mark.parametrize(
    "shape", [(-1,), (3,), (2**63, 2**63), (2**5000,), (9,) * 500_000, (1,) * 33, (0, -1)], ids=lambda shape: len(shape)
)
def test_impossible_shapes_are_refused_at_once(shape: tuple[int, ...]) -> None:
    """Negative, wrong, endless and countless sizes are the client's error, without the time to multiply them."""
    began = time.thread_time()
    with pytest.raises(InvalidRequest) as caught:
        check(Tensor("t", "INT32", shape, b"\0" * 8))
    assert len(caught.value.text.en) < 300
    assert time.thread_time() - began < 1
