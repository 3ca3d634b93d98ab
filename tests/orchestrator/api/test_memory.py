"""Bodies that are remembered."""

from __future__ import annotations

import pytest

from orchestrator.api.memory import BODY_BYTES, ENTRIES
from tests.orchestrator.conftest import Stack

PATHS = ("/v1/completions", "/v1/chat/completions")


async def test_the_same_bytes_are_a_request_of_their_own(stack: Stack) -> None:
    """Who repeats a body gets an id, an answer and a record of its own, and headers that change it do."""
    body = {"model": "m", "prompt": "Hola"}
    seen = [await stack.post("/v1/completions", body, **{"x-request-id": f"r{number}"}) for number in range(2)]
    assert [answer[2]["x-request-id"] for answer in seen] == ["r0", "r1"]
    assert seen[0][1]["id"] != seen[1][1]["id"]
    await stack.post("/v1/completions", body, **{"x-truthgpt-task": "translation"})
    assert [record.id for record in stack.records[:2]] == ["r0", "r1"]
    assert [record.task for record in stack.records] == ["text_generation", "text_generation", "translation"]
    assert stack.records[1].accepted >= stack.records[0].accepted + stack.records[0].duration_s


async def test_a_path_does_not_take_what_was_read_for_another(stack: Stack) -> None:
    """A body that is right for one path is refused by the other, whichever came first."""
    body = {"model": "m", "prompt": "Hola"}
    assert [(await stack.post(path, body))[0] for path in (*PATHS, *PATHS)] == [200, 400, 200, 400]


@pytest.mark.parametrize("size", [10, 2 * BODY_BYTES])
async def test_what_is_remembered_is_bounded(stack: Stack, size: int) -> None:
    """The memory holds so many bodies and no long one."""
    application = stack.server.config.app
    openai = application._door.routes["/v1/completions"]["POST"].__self__
    memory = openai._memory
    for number in range(3):
        await stack.post("/v1/completions", {"model": "m", "prompt": f"{number} " + "x" * size})
    assert len(memory._calls) == (3 if size == 10 else 0)
    for number in range(2 * ENTRIES):
        memory.keep(("other", number), next(iter(memory._calls.values()))) if memory._calls else None
    assert len(memory._calls) <= ENTRIES
