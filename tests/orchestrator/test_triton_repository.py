"""The model repository extension against a Triton that refuses; the real one is in the end-to-end tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import orjson
import pytest

from orchestrator.errors import UpstreamError, UpstreamUnavailable
from orchestrator.triton import Deadlines, Repository, Row, Triton
from orchestrator.triton.repository import load_request

from .fake_triton import FakeTriton


@pytest.fixture
async def repository(fake: FakeTriton) -> AsyncIterator[Repository]:
    triton = Triton(fake.url, Deadlines(heartbeat_s=0.3))
    yield Repository(triton)
    await triton.close()


async def test_rows_and_unload(repository: Repository, fake: FakeTriton) -> None:
    """Rows are typed, and Triton's refusal is the error."""
    fake.models["other"] = "UNAVAILABLE"
    assert await repository.rows("m") == [Row("m", "1", "READY")]
    assert [row.occupied for row in await repository.rows()] == [True, False]
    await repository.unload("m", 1.0)
    assert fake.calls[-1] == "POST /v2/repository/models/m/unload"
    with pytest.raises(UpstreamError, match="failed to load 'x'"):
        await repository.unload("x", 1.0)


@pytest.mark.parametrize("size", [0, 1, 100, 20_000])
def test_a_load_is_the_message_that_triton_reads(size: int) -> None:
    """Whatever its length, the request is what Triton's own client makes of it."""
    from tritonclient.grpc import service_pb2

    config, file = "c" * size, b"\0" * size
    wanted = service_pb2.RepositoryModelLoadRequest(model_name="m")
    assert service_pb2.RepositoryModelLoadRequest.FromString(load_request("m", {})) == wanted
    wanted.parameters["config"].string_param = config
    wanted.parameters["file:1/model.onnx"].bytes_param = file
    made = load_request("m", {"config": config, "file:1/model.onnx": file})
    assert service_pb2.RepositoryModelLoadRequest.FromString(made) == wanted


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"parameters": 1}', b'{"parameters": {"file:1/a": "no base64!"}}'])
async def test_a_load_of_the_admin_edge_that_makes_no_sense_is_refused(repository: Repository, body: bytes) -> None:
    """With 400 and an error of KServe's form, before anybody is asked."""
    reply = await repository.forward("POST", "/v2/repository/models/m/load", body, {}, 1.0)
    assert reply.status == 400 and "error" in orjson.loads(reply.body)


async def test_a_server_that_is_away_is_an_error_of_ours(fake: FakeTriton) -> None:
    """A load that reaches nobody is UpstreamUnavailable, within its time."""
    triton = Triton(fake.url, Deadlines())
    with pytest.raises(UpstreamUnavailable):
        await Repository(triton, "127.0.0.1:1").load("m", 2.0)
    await triton.close()


async def test_only_our_models_have_a_heartbeat(repository: Repository, fake: FakeTriton) -> None:
    """A model of another backend is asked whether it is ready."""
    fake.models["addsub"] = "READY"
    fake.other_backends.add("addsub")
    assert await repository.beat("addsub", 30) is None
    beat = await repository.beat("m", 30)
    assert beat is not None and beat.slots == 4
