"""Plain inference: what is sent to Triton, and what its answers and failures become."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

import pytest

from orchestrator.domain import InferRequest, Tensor
from orchestrator.errors import DeadlineExceeded, InvalidRequest, ModelNotFound, UpstreamError, UpstreamUnavailable
from orchestrator.triton import Attendance, Deadlines, Reply, Triton
from orchestrator.triton.infer import describe, infer

from .fake_triton import FakeTriton

A = Tensor("A", "INT16", (2,), b"\1\0\2\0")
TEXT = Tensor("T", "BYTES", (1,), elements=(b"x",))
LENGTH = "inference-header-content-length"


def request(**changes: Any) -> InferRequest:
    return InferRequest(id="r", model="a/b", accepted_at=time.monotonic(), inputs=(A, TEXT), **changes)


class Fetch:
    """Stands for Triton's fetch: answers once with what it was given."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply

    async def __call__(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float,
        attendance: Attendance | None = None,
    ) -> Reply:  # fmt: skip
        self.method, self.path, self.body, self.headers = method, path, body or b"", headers
        return self.reply


def answer(*rows: dict[str, Any], data: bytes = b"") -> Reply:
    head = json.dumps({"model_name": "a/b", "model_version": "3", "outputs": rows}).encode()
    return Reply(200, {LENGTH: str(len(head))}, head + data)


def row(name: str, datatype: str, shape: list[int], size: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}


async def test_tensors_go_and_come_as_binary() -> None:
    """The request is JSON and the tensors' bytes behind it; the answer's are cut from behind its JSON."""
    fetch = Fetch(answer(row("X", "UINT8", [3], 3), row("Y", "BYTES", [1], 6), data=b"abc\2\0\0\0de"))
    result = await infer(fetch, request(outputs={"X": 0, "Y": 5}, parameters={"p": 1}), Attendance(), 10)
    assert (result.model, result.version) == ("a/b", "3")
    assert result.outputs == (Tensor("X", "UINT8", (3,), b"abc"), Tensor("Y", "BYTES", (1,), elements=(b"de",)))
    assert fetch.path == "v2/models/a%2Fb/infer"
    length = int(fetch.headers[LENGTH])
    assert fetch.body[length:] == b"\1\0\2\0" + b"\1\0\0\0x"
    head = json.loads(fetch.body[:length])
    assert head["inputs"][0] == row("A", "INT16", [2], 4)
    assert head["outputs"][1] == {"name": "Y", "parameters": {"binary_data": True, "classification": 5}}
    assert head["parameters"] == {"p": 1}
    await infer(fetch, request(), Attendance(), 10)
    assert json.loads(fetch.body[: int(fetch.headers[LENGTH])])["parameters"] == {"binary_data_output": True}


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (400, "[request id: r] unexpected inference input 'C' for model 'm'", InvalidRequest),
        (400, "Stub process 'm' is not healthy.", UpstreamUnavailable),
        (404, "Request for unknown model", UpstreamUnavailable),
        (400, "Request for unknown model: 'm' is not found", UpstreamUnavailable), (503, "x", UpstreamUnavailable),
        (500, "in ensemble", UpstreamError), (200, "Failed to process the request", UpstreamError),
    ],
)  # fmt: skip
async def test_errors_of_tritons(status: int, error: str, kind: type[Exception]) -> None:
    """What the client did wrong is told in Triton's words, a model on its way out is unavailable, the rest is ours."""
    with pytest.raises(kind) as caught:
        await infer(Fetch(Reply(status, {}, json.dumps({"error": error}).encode())), request(), Attendance(), 10)
    assert type(caught.value) is kind
    if isinstance(caught.value, InvalidRequest):
        assert caught.value.text.en == "unexpected inference input 'C' for model 'm'"


@pytest.mark.parametrize("name", ["unavailable", "internal: x", "x is not healthy", "Stub process 'm' is not healthy."])
async def test_what_a_client_calls_its_tensors_says_nothing_of_the_model(name: str) -> None:
    """Triton quotes names; one that reads like an outage would count against the model, for everybody who uses it."""
    error = f"[request id: unavailable] unexpected inference input '{name}' for model 'm'"
    with pytest.raises(InvalidRequest):
        await infer(Fetch(Reply(400, {}, json.dumps({"error": error}).encode())), request(), Attendance(), 10)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(200, {}, b""), Reply(200, {}, b"nonsense"), Reply(200, {}, b"[]"), Reply(200, {LENGTH: "-1"}, b"{}"),
        Reply(200, {}, b'{"model_version": "1"}'), answer({"name": "X"}), answer(row("X", "UINT8", [3], 3), data=b"ab"),
        answer(row("X", "INT99", [1], 1), data=b"a"), answer(row("X", "UINT8", [1], "x")),
        answer(row("X", "BYTES", [1], 4), data=b"\xff\xff\xff\xff"),
    ],
)  # fmt: skip
async def test_answers_that_make_no_sense(reply: Reply) -> None:
    """Whatever is wrong with an answer is an UpstreamError, never the client's fault nor a bug's exception."""
    with pytest.raises(UpstreamError):
        await infer(Fetch(reply), request(), Attendance(), 10)


async def test_deadlines_and_a_model_that_dies(fake: FakeTriton) -> None:
    """The request's own time ends a silent call, and so does at once the model's health."""
    fake.stopped = True
    triton = Triton(fake.url, Deadlines(request_s=0.1))
    try:
        with pytest.raises(DeadlineExceeded):
            await triton.infer(request(timeout_s=0.03), Attendance())
        with pytest.raises(DeadlineExceeded):
            await triton.infer(request(), Attendance())
        attendance = Attendance()
        asyncio.get_running_loop().call_later(0.02, attendance.fail, UpstreamUnavailable("it died"))
        with pytest.raises(UpstreamUnavailable, match="it died"):
            await triton.infer(request(), attendance)
    finally:
        await triton.close()


async def test_describe() -> None:
    """Each kind of description has its path; what is not there is ModelNotFound and nonsense is an UpstreamError."""
    for model, version, what, path in (
        ("m", "", "", "v2/models/m"), ("a/b", "2", "config", "v2/models/a%2Fb/versions/2/config"),
        ("", "", "stats", "v2/models/stats"),
    ):  # fmt: skip
        fetch = Fetch(Reply(200, {}, b'{"x": 1}'))
        assert await describe(fetch, model, version, what, 1) == {"x": 1}
        assert (fetch.method, fetch.path) == ("GET", path)
    with pytest.raises(ModelNotFound):
        await describe(Fetch(Reply(404, {}, b'{"error": "x"}')), "m", "7", "", 1)
    with pytest.raises(UpstreamError):
        await describe(Fetch(Reply(200, {}, b"nonsense")), "m", "", "", 1)
