"""Inference messages: raw and typed tensors, parameters, and what is wrong with them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.grpc_messages import InferRequest
from orchestrator.api.grpc_tensors import read, write
from orchestrator.api.kserve_tensors import Wanted
from orchestrator.domain import InferResult, Tensor
from orchestrator.errors import InvalidRequest, PermissionDenied

# Each datatype with its field of typed contents, struct's letter, and values that it can hold.
TYPES: dict[str, tuple[str, str, Any]] = {
    "BOOL": ("bool_contents", "?", st.booleans()),
    **{
        f"{sign}INT{bits}": (field, letter, st.integers(low, high))
        for sign, bits, field, letter, low, high in (
            ("", 8, "int_contents", "b", -(2**7), 2**7 - 1), ("", 16, "int_contents", "h", -(2**15), 2**15 - 1),
            ("", 32, "int_contents", "i", -(2**31), 2**31 - 1), ("", 64, "int64_contents", "q", -(2**63), 2**63 - 1),
            ("U", 8, "uint_contents", "B", 0, 2**8 - 1), ("U", 16, "uint_contents", "H", 0, 2**16 - 1),
            ("U", 32, "uint_contents", "I", 0, 2**32 - 1), ("U", 64, "uint64_contents", "Q", 0, 2**64 - 1),
        )
    },
    "FP32": ("fp32_contents", "f", st.floats(width=32, allow_nan=False)),
    "FP64": ("fp64_contents", "d", st.floats(allow_nan=False)),
    "BYTES": ("bytes_contents", "", st.binary(max_size=20)),
}  # fmt: skip


def one(datatype: str = "INT32", shape: tuple[int, ...] = (2,), name: str = "x", **contents: list[Any]) -> Any:
    request = InferRequest(model_name="m", id="i")
    row = request.inputs.add(name=name, datatype=datatype, shape=shape)
    for field, values in contents.items():
        getattr(row.contents, field).extend(values)
    return request


@given(datatype=st.sampled_from(sorted(TYPES)), data=st.data())
def test_raw_and_typed_are_the_same_tensor(datatype: str, data: st.DataObject) -> None:
    """Whatever the values, their typed form and their raw form are read into one and the same tensor."""
    field, letter, strategy = TYPES[datatype]
    values = data.draw(st.lists(strategy, max_size=6))
    typed = one(datatype, (len(values),), **{field: values})
    raw = one(datatype, (len(values),))
    packed = [struct.pack("<I", len(v)) + v for v in values] if datatype == "BYTES" else [
        struct.pack(f"<{letter}", v) for v in values
    ]  # fmt: skip
    raw.raw_input_contents.append(b"".join(packed))
    assert read(typed).inputs == read(raw).inputs


@given(st.binary(max_size=300))
def test_no_bytes_break_the_reader(data: bytes) -> None:
    """Whatever parses as a request is read or refused, never anything else."""
    try:
        request = InferRequest.FromString(data)
    except Exception:  # not a message: the door refuses it
        return
    try:
        read(request)
    except (InvalidRequest, PermissionDenied):
        return


def test_outputs_and_parameters_are_read() -> None:
    """Names, classes and parameters of every kind arrive, but for the one that asks for an empty final response."""
    request = one(int_contents=[1, 2])
    request.outputs.add(name="a").parameters["classification"].int64_param = 3
    request.outputs.add(name="b")
    for name, kind, value in (
        ("flag", "bool_param", True), ("n", "int64_param", -3), ("s", "string_param", "x"), ("d", "double_param", 0.5),
        ("u", "uint64_param", 2**64 - 1), ("triton_enable_empty_final_response", "bool_param", True),
    ):  # fmt: skip
        setattr(request.parameters[name], kind, value)
    body = read(request)
    assert body.outputs == (Wanted("a", True, 3), Wanted("b", True, 0))
    assert body.parameters == {"flag": True, "n": -3, "s": "x", "d": 0.5, "u": 2**64 - 1}
    assert body.id == "i"


def changed(change: Callable[[Any], object], **contents: list[Any]) -> Any:
    request = one(**(contents or {"int_contents": [1, 2]}))
    change(request)
    return request


WRONG: dict[str, tuple[Any, str]] = {
    "raw and typed": (changed(lambda r: r.raw_input_contents.append(bytes(8))), "contents field must not"),
    "too few raw": (changed(lambda r: r.raw_input_contents.extend([b"", b""])), "2 elements for 1 inputs"),
    "no data": (one(), "need 8 bytes, there are 0"),
    "too much data": (one(int_contents=[1, 2, 3]), "there are 12"),
    "another field": (one(int64_contents=[1, 2]), "int64_contents is not for 'INT32'"),
    "two fields": (one(int_contents=[1, 2], bool_contents=[True]), "bool_contents is not"),
    "typed FP16": (one("FP16", fp32_contents=[1.0, 2.0]), "fp32_contents is not for 'FP16'"),
    "out of range": (one("INT8", int_contents=[1, 200]), "values of INT8"),
    "unknown datatype": (one("TEXT"), "invalid datatype"),
    "negative size": (one(shape=(-1,), int_contents=[]), "sizes of 0 and more"),
    "twice": (
        changed(lambda r: r.inputs.add(name="x", datatype="INT32", shape=[0])), "input 'x' already exists in request"
    ),
    "no name": (one(name="", int_contents=[1, 2]), "inputs[].name"),
    "long output name": (changed(lambda r: r.outputs.add(name="x" * 300)), "outputs[].name"),
    "empty parameter": (changed(lambda r: r.parameters["p"]), "parameters.p"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named(what: str) -> None:
    """Each kind of wrong request is refused with a sentence that says what."""
    request, part = WRONG[what]
    with pytest.raises(InvalidRequest) as caught:
        read(request)
    assert part in caught.value.text.en
    assert caught.value.text.es != caught.value.text.en


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_shared_memory_is_refused(side: str) -> None:
    """A tensor in shared memory is for the admin port, on either side."""
    request = one(int_contents=[1, 2])
    row = request.inputs[0] if side == "inputs" else request.outputs.add(name="y")
    row.parameters["shared_memory_region"].string_param = "r"
    with pytest.raises(PermissionDenied):
        read(request)


def test_an_answer_is_raw() -> None:
    """Every output has its name, datatype and shape, and its bytes in the same place of the raw contents."""
    tensors = (Tensor("a", "INT32", (2,), bytes(8)), Tensor("b", "BYTES", (1,), elements=(b"xy",)))
    answer = write(InferResult("m", "3", tensors), "id")
    assert (answer.model_name, answer.model_version, answer.id) == ("m", "3", "id")
    assert [(o.name, o.datatype, list(o.shape)) for o in answer.outputs] == [("a", "INT32", [2]), ("b", "BYTES", [1])]
    assert list(answer.raw_output_contents) == [bytes(8), b"\2\0\0\0xy"]
