"""KServe v2 at encoders, over HTTP and gRPC: rows of texts in, their outputs out, and what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.api import kserve_encode
from orchestrator.api.kserve_request import Asked
from orchestrator.api.kserve_tensors import InferBody, Wanted
from orchestrator.domain import Caller, Model, Notes, Tensor
from orchestrator.errors import InvalidRequest, TruthGPTError
from orchestrator.tensors import check
from tests.encoding import CLASSIFIES, EMBEDS, scores, texts_of, vector

from ..conftest import Stack, serving
from ..fake_triton import FakeTriton
from .calls import raw, rows, stub, told

EMBED, CLASSIFY = "/v2/models/e/infer", "/v2/models/c/infer"


@pytest.fixture
async def stack(fake: FakeTriton) -> AsyncIterator[Stack]:
    fake.models |= {"e": "READY", "c": "READY"}
    fake.encoders = {"e": dict(EMBEDS), "c": dict(CLASSIFIES)}
    async with serving(fake, grpc=True) as running:
        yield running


def texts(*data: Any, **changes: Any) -> dict[str, Any]:
    return {"name": "text_input", "datatype": "BYTES", "shape": [len(data), 1], "data": list(data), **changes}


async def test_json_rows(stack: Stack) -> None:
    """Every output has a row for each text, in order; the id is echoed."""
    status, body, _ = await stack.post(EMBED, {"id": "a1", "inputs": [texts("uno", "dos dos")]})
    assert status == 200
    assert {key: body[key] for key in ("model_name", "model_version", "id")} == {
        "model_name": "e", "model_version": "1", "id": "a1",
    }  # fmt: skip
    outputs = {row["name"]: row for row in body["outputs"]}
    assert outputs["embedding"]["shape"] == [2, 8]
    assert outputs["embedding"]["data"] == vector("uno", 8) + vector("dos dos", 8)
    assert (outputs["num_input_tokens"]["datatype"], outputs["num_input_tokens"]["data"]) == ("UINT32", [3, 4])
    assert stack.records[-1].operation == "embed"
    _, body, _ = await stack.post(CLASSIFY, {"inputs": [texts("uno")], "outputs": [{"name": "label"}]})
    (only,) = body["outputs"]
    best = scores("uno", 2).index(max(scores("uno", 2)))
    assert (only["name"], only["data"]) == ("label", [["negative", "positive"][best]])
    assert stack.records[-1].operation == "classify"


async def test_binary_rows(stack: Stack) -> None:
    """Binary tensors come and go, as Triton's clients send them."""
    data = raw("uno", "¿dos?")
    row = {"name": "text_input", "datatype": "BYTES", "shape": [2, 1], "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [row], "parameters": {"binary_data_output": True, "truncate": False}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    async with stack.http.post(stack.url + CLASSIFY, data=head + data, headers=headers) as response:
        assert response.status == 200
        body = await response.read()
        length = int(response.headers["Inference-Header-Content-Length"])
    at, found = length, {}
    for output in json.loads(body[:length])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        found[output["name"]] = body[at : at + size]
        at += size
    assert struct.unpack("<4f", found["scores"]) == (*scores("uno", 2), *scores("¿dos?", 2))
    assert len(texts_of(found["label"])) == 2


async def test_grpc_rows(stack: Stack) -> None:
    """Unary and in a stream; truncate is a parameter, and heartbeat, which metadata declares, is in no answer."""
    long = "word " * 40
    async with stub(stack.grpc) as calls:
        answer = await calls.ModelInfer(rows("e", "uno", long, truncate=True))
        assert [(output.name, list(output.shape)) for output in answer.outputs] == [
            ("embedding", [2, 8]), ("num_input_tokens", [2, 1]),
        ]  # fmt: skip
        assert struct.unpack("<2I", answer.raw_output_contents[1]) == (3, 16)
        assert struct.unpack_from("<8f", answer.raw_output_contents[0]) == tuple(vector("uno", 8))
        asked = rows("c", "uno")
        for name in ("scores", "heartbeat"):
            asked.outputs.add(name=name)
        (only,) = [response async for response in calls.ModelStreamInfer(iter([asked]))]
        assert only.error_message == ""
        assert [output.name for output in only.infer_response.outputs] == ["scores"]
        assert only.infer_response.parameters["triton_final_response"].bool_param
        code, details, _ = await told(calls.ModelInfer(rows("e", "uno", long)))
        assert (code, "text_input[1] has 42 tokens" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        expired = calls.ModelInfer(rows("e", "dos"), timeout=0.05)
        stack.fake.encode_pause_s = 5.0
        assert (await expired.code()) is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"inputs": []}, "text_input is required"),
        ({"inputs": [texts()]}, "Expected [n,1]"),
        ({"inputs": [texts("a", shape=[1])]}, "got [1]"),
        ({"inputs": [texts("a", "b", shape=[1, 2])]}, "got [1,2]"),
        ({"inputs": [texts("a", shape=[1, 1, 1])]}, "got [1,1,1]"),
        ({"inputs": [texts("a", shape=[2, 1])]}, "need 2 elements"),
        ({"inputs": [texts(1, datatype="INT32")]}, "expects 'BYTES'"),
        ({"inputs": [texts(1)]}, "must be strings"),
        ({"inputs": [texts("a"), texts("b", name="stream")]}, "unexpected inference input 'stream'"),
        ({"inputs": [texts("")]}, "text_input[0] must not be empty"),
        ({"inputs": [texts("a", "  ")]}, "text_input[1]"),
        ({"inputs": [texts(*["a"] * 2049)]}, "at most 2048"),
        ({"inputs": [texts("a", "b " * 20)]}, "text_input[1] has 22 tokens; the model reads at most 16"),
        ({"inputs": [texts("a")], "outputs": [{"name": "text_output"}]}, "unexpected inference output 'text_output'"),
        (
            {"inputs": [texts("a")], "outputs": [{"name": "embedding", "parameters": {"classification": 2}}]},
            "unexpected inference output 'embedding'",
        ),
        ({"inputs": [texts("a")], "parameters": {"truncate": 1}}, "truncate must be true or false"),
        ({"inputs": [texts("a")], "parameters": {"heartbeat": True}}, "Unknown parameter: 'heartbeat'"),
        ({"inputs": [texts("a")], "parameters": {"timeout": -1}}, "timeout"),
    ],
)
async def test_what_is_refused(stack: Stack, body: dict[str, Any], said: str) -> None:
    """A 400 that says what was expected; nothing of it reaches the model."""
    status, answer, _ = await stack.post(EMBED, body)
    assert (status, said in answer["error"]) == (400, True), answer
    assert len(stack.fake.read) == ("tokens" in said)


async def test_bytes_that_are_no_text(stack: Stack) -> None:
    """They are 400 by their index, over both protocols."""
    async with stub(stack.grpc) as calls:
        request = rows("e", "a")
        request.inputs[0].shape[:] = [2, 1]
        request.raw_input_contents[0] = raw("a") + struct.pack("<I", 2) + b"\xff\xfe"
        code, details, _ = await told(calls.ModelInfer(request))
        assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "text_input[1] is not valid UTF-8 text.")


async def test_a_timeout_is_kept(stack: Stack) -> None:
    """KServe's timeout, in microseconds, ends a request whose model takes longer."""
    stack.fake.encode_pause_s = 5.0
    status, _, _ = await stack.post(EMBED, {"inputs": [texts("a")], "parameters": {"timeout": 100_000}})
    assert status == 504


ANY = st.one_of(
    st.sampled_from(["BYTES", "FP32", "INT32", "BOOL", "", "bytes"]), st.text(max_size=5)
)  # fmt: skip
SHAPES = st.lists(st.integers(-2, 2**40), max_size=4).map(tuple)
TENSORS = st.builds(
    Tensor, st.sampled_from(["text_input", "text_input ", "x"]), ANY,
    st.one_of(SHAPES, st.sampled_from([(1, 1), (2, 1)])),
    st.binary(max_size=8), st.lists(st.binary(max_size=8), max_size=3).map(tuple),
)  # fmt: skip
PARAMETERS = st.dictionaries(
    st.sampled_from(["truncate", "timeout", "timeout_s", "priority", "heartbeat", "x"]),
    st.one_of(st.booleans(), st.integers(), st.floats(), st.text(max_size=3)), max_size=3,
)  # fmt: skip
NAMED = st.lists(TENSORS, max_size=2, unique_by=lambda tensor: tensor.name)


class Asking:
    """As an edge does."""

    id, caller, accepted_at, traceparent = "r", Caller("c"), 0.0, None
    headers: dict[bytes, bytes] = {}
    notes = Notes()


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(NAMED, PARAMETERS, st.lists(st.text(max_size=5), max_size=2))
def test_any_tensors_are_read_or_refused(tensors: list[Tensor], parameters: dict[str, Any], wanted: list[str]) -> None:
    """Whatever comes is texts, none empty and one for each row, or an InvalidRequest that speaks both languages."""
    body = InferBody(None, tuple(tensors), tuple(Wanted(name, False) for name in wanted), False, parameters)
    model, asked = Model("e", "1", 0, True, operation="embed", seen=True), Asking()
    given: Asked = asked
    try:
        for tensor in tensors:
            check(tensor)
        request = kserve_encode.request(body, given, model, None)
    except TruthGPTError as error:
        assert isinstance(error, InvalidRequest)
        assert error.text.en and error.text.es
    else:
        assert all(request.texts) and len(request.texts) == tensors[0].shape[0]
