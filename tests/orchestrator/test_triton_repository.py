"""The model repository extension against a Triton that refuses; the real one is in the end-to-end tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from orchestrator.errors import UpstreamError
from orchestrator.triton import Deadlines, Repository, Row, Triton

from .fake_triton import FakeTriton


@pytest.fixture
async def repository(fake: FakeTriton) -> AsyncIterator[Repository]:
    triton = Triton(fake.url, Deadlines(heartbeat_s=0.3))
    yield Repository(triton)
    await triton.close()


async def test_rows_load_and_unload(repository: Repository, fake: FakeTriton) -> None:
    """Rows are typed, calls go to Triton's paths, and its refusal is the error."""
    fake.models["other"] = "UNAVAILABLE"
    assert await repository.rows("m") == [Row("m", "1", "READY")]
    assert [row.occupied for row in await repository.rows()] == [True, False]
    await repository.load("m", 1.0, {"name": "m"})
    await repository.unload("m", 1.0)
    assert fake.calls[-2:] == ["POST /v2/repository/models/m/load", "POST /v2/repository/models/m/unload"]
    with pytest.raises(UpstreamError, match="failed to load 'x'"):
        await repository.load("x", 1.0)


async def test_only_our_models_have_a_heartbeat(repository: Repository, fake: FakeTriton) -> None:
    """A model of another backend is asked whether it is ready."""
    fake.models["addsub"] = "READY"
    fake.other_backends.add("addsub")
    assert await repository.beat("addsub") is None
    beat = await repository.beat("m")
    assert beat is not None and beat.slots == 4
