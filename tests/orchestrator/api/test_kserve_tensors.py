"""Inference bodies: JSON and binary tensors as tritonclient writes and reads them, and everything that is wrong."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tritonclient.http import InferInput, InferRequestedOutput, InferResult
from tritonclient.http._utils import _get_inference_request
from tritonclient.utils import np_to_triton_dtype

from orchestrator.api.kserve_tensors import Wanted, read, write
from orchestrator.domain import Tensor
from orchestrator.errors import InvalidRequest, PermissionDenied

TYPES = ["?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8"]
A = {"name": "A", "datatype": "INT32", "shape": [2], "data": [1, 2]}


def request(
    inputs: list[InferInput], outputs: list[InferRequestedOutput] | None = None
) -> tuple[bytes, dict[bytes, bytes]]:
    """The body and headers of the client's own request."""
    body, length = _get_inference_request(inputs, "r1", outputs, 0, False, False, 0, None, None)
    return body, {} if length is None else {b"inference-header-content-length": str(length).encode()}


def body(*inputs: object, **fields: object) -> bytes:
    return json.dumps({"inputs": inputs, **fields}).encode()


@given(st.data(), st.booleans())
def test_what_the_client_writes_is_read(data: st.DataObject, binary: bool) -> None:
    """Any array of any datatype that tritonclient sends, as JSON or binary, arrives with its very bytes."""
    given_arrays = {}
    inputs = []
    for index in range(data.draw(st.integers(1, 3))):
        dtype = np.dtype(data.draw(st.sampled_from(TYPES)))
        finite = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else {}
        array = data.draw(
            arrays.arrays(
                dtype, arrays.array_shapes(max_dims=3, max_side=3), elements=arrays.from_dtype(dtype, **finite)
            )
        )
        one = InferInput(f"t{index}", list(array.shape), np_to_triton_dtype(dtype))
        one.set_data_from_numpy(array, binary_data=binary)
        inputs.append(one)
        given_arrays[f"t{index}"] = array
    parsed = read(*request(inputs))
    assert parsed.id == "r1"
    assert {t.name: (t.shape, t.data) for t in parsed.inputs} == {
        name: (array.shape, array.tobytes()) for name, array in given_arrays.items()
    }


@given(st.lists(st.text(max_size=10), min_size=1, max_size=5), st.booleans())
def test_texts_the_client_writes_are_read(texts: list[str], binary: bool) -> None:
    """BYTES tensors arrive as the UTF-8 of their texts in both forms."""
    one = InferInput("t", [len(texts)], "BYTES")
    one.set_data_from_numpy(np.array(texts, dtype=object), binary_data=binary)
    assert read(*request([one])).inputs[0].elements == tuple(text.encode() for text in texts)


@given(st.data(), st.booleans())
def test_what_is_written_the_client_reads(data: st.DataObject, binary: bool) -> None:
    """tritonclient finds every output of a response, JSON or binary, with its values."""
    dtype = np.dtype(data.draw(st.sampled_from(TYPES)))
    finite = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else {}
    array = data.draw(
        arrays.arrays(dtype, arrays.array_shapes(max_dims=2, max_side=3), elements=arrays.from_dtype(dtype, **finite))
    )
    tensors = [
        Tensor("N", np_to_triton_dtype(dtype), array.shape, array.tobytes()),
        Tensor("T", "BYTES", (2,), elements=("ñ".encode(), b"")),
    ]
    encoded, length = write({"model_name": "m", "model_version": "1"}, tensors, lambda _: binary)
    result = InferResult.from_response_body(encoded, False, length)
    assert result.get_response()["model_name"] == "m"
    assert np.array_equal(result.as_numpy("N"), array)
    assert [bytes(one) if binary else str(one).encode() for one in result.as_numpy("T")] == ["ñ".encode(), b""]


def test_outputs_and_parameters() -> None:
    """Each output says for itself whether it is binary; binary_data_output speaks for the rest; others are kept."""
    parsed = read(*request([], [InferRequestedOutput("a", True), InferRequestedOutput("b", False, class_count=3)]))
    assert parsed.outputs == (Wanted("a", True), Wanted("b", False, 3))
    parsed = read(body(A, parameters={"binary_data_output": True, "x": 1.5}, outputs=[{"name": "c"}]), {})
    assert (parsed.binary, parsed.outputs, parsed.parameters) == (True, (Wanted("c", True),), {"x": 1.5})


def test_nested_data_is_flattened() -> None:
    """Data nested like its shape, or not at all, is the same tensor."""
    flat = read(body({**A, "shape": [2, 2], "data": [1, 2, 3, 4]}), {})
    assert read(body({**A, "shape": [2, 2], "data": [[1, 2], [3, 4]]}), {}) == flat


@pytest.mark.parametrize(
    "change",
    [
        {"datatype": "INT33"}, {"datatype": 7}, {"datatype": None}, {"shape": 2}, {"shape": [2.0]}, {"shape": [True]},
        {"shape": [-2]}, {"shape": [3]}, {"shape": None}, {"data": None}, {"data": "ab"}, {"data": {}}, {"data": [1]},
        {"data": [1, 2, 3]}, {"data": [1, "2"]}, {"data": [1, 2.5]}, {"data": [1, True]}, {"data": [1, None]},
        {"data": [1, 2**31]}, {"data": [1, 10**300]}, {"datatype": "UINT32", "data": [1, -1]}, {"name": ""},
        {"name": 7}, {"name": "x" * 257}, {"datatype": "BOOL"}, {"datatype": "BYTES"},
        {"datatype": "BYTES", "data": ["a", "b", "c"]}, {"datatype": "FP16"}, {"datatype": "BF16"},
        {"datatype": "FP32", "data": [1, 10**300]}, {"datatype": "FP32", "data": [1, 1e300]}, {"parameters": []},
        {"parameters": {"a": [1]}}, {"parameters": {"a": None}},
        {"parameters": {"binary_data_size": 8}}, {"colour": "red"},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_json_tensors_are_refused(change: dict[str, object]) -> None:
    """A tensor whose parts do not fit each other is the client's error, with a short text in both languages."""
    with pytest.raises(InvalidRequest) as caught:
        read(body({**A, **change}), {})
    assert 0 < len(caught.value.text.en) < 600
    assert caught.value.text.en != caught.value.text.es


@pytest.mark.parametrize(
    "fields",
    [
        {"id": 7}, {"inputs": None}, {"inputs": {}}, {"inputs": [1]}, {"inputs": [A, A]}, {"outputs": {}},
        {"outputs": [{}]}, {"outputs": [{"name": "a", "parameters": {"binary_data": 1}}]}, {"parameters": 1},
        {"outputs": [{"name": "a", "parameters": {"classification": -1}}]}, {"parameters": {"binary_data_output": 1}},
        {"extra": 1},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_bodies_are_refused(fields: dict[str, Any]) -> None:
    """Each field of the body has its type, and unknown ones are refused."""
    with pytest.raises(InvalidRequest):
        read(json.dumps({"inputs": [A], **fields}).encode(), {})


@pytest.mark.parametrize("length", ["-1", "", "1e2", "99999", "9" * 30, "+5", "10"])
def test_wrong_lengths_of_the_json_are_refused(length: str) -> None:
    """Inference-Header-Content-Length is a number within the body, and the JSON ends there."""
    with pytest.raises(InvalidRequest):
        read(body(A), {b"inference-header-content-length": length.encode()})


@pytest.mark.parametrize("size", [0, 7, 9, 100, -1, 2**70, True, "8", 8.0])
def test_binary_sizes_must_fit(size: object) -> None:
    """The binary data of an input is as long as its size says, its shape needs, and the body has."""
    head = body({"name": "A", "datatype": "INT32", "shape": [2], "parameters": {"binary_data_size": size}})
    with pytest.raises(InvalidRequest):
        read(head + b"\0" * 8, {b"inference-header-content-length": str(len(head)).encode()})


@pytest.mark.parametrize("extra", [b"\0", b"x" * 100])
def test_bytes_that_belong_to_no_input_are_refused(extra: bytes) -> None:
    """Nothing of a body is dropped in silence."""
    head = body(A)
    with pytest.raises(InvalidRequest):
        read(head + extra, {b"inference-header-content-length": str(len(head)).encode()})


@pytest.mark.parametrize("where", ["inputs", "outputs"])
def test_shared_memory_is_refused_with_a_pointer_to_the_admin_port(where: str) -> None:
    """Tensors in shared memory are not for callers of the public port."""
    row = {"name": "A", "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 8}}
    fields = (
        {"inputs": [{**row, "datatype": "INT32", "shape": [2]}]}
        if where == "inputs"
        else {"inputs": [], "outputs": [row]}
    )
    with pytest.raises(PermissionDenied) as caught:
        read(json.dumps(fields).encode(), {})
    assert "admin port" in caught.value.text.en


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor("F", "FP32", (1,), np.float32(math.nan).tobytes()),
        Tensor("F", "FP64", (2,), np.array([1, math.inf]).tobytes()),
        Tensor("F", "FP16", (1,), b"\0\0"),
        Tensor("F", "BYTES", (1,), elements=(b"\xff",)),
    ],
)
def test_what_json_cannot_hold_has_to_be_asked_for_as_binary(tensor: Tensor) -> None:
    """NaN, infinity, half floats and bytes that are no text are an error in JSON and arrive as binary."""
    with pytest.raises(InvalidRequest) as caught:
        write({}, [tensor], lambda _: False)
    assert "binary_data" in caught.value.text.en
    assert write({}, [tensor], lambda _: True)[1] is not None


@given(st.binary(max_size=200), st.integers(0, 200))
def test_any_bytes_are_a_request_or_the_clients_error(raw: bytes, length: int) -> None:
    """Nothing but errors of the client's comes out of arbitrary bytes."""
    for headers in ({}, {b"inference-header-content-length": str(length).encode()}):
        try:
            read(raw, headers)
        except InvalidRequest:
            continue
