"""The instant upstream speaks what the gateway and its peers ask."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator

import aiohttp
import pytest

from benchmarks.gateway_mock import MODEL, TOKEN, Connection
from orchestrator.domain import Chunk, GenerateRequest
from orchestrator.triton import Deadlines, Triton
from orchestrator.triton.attendance import Attendance


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """Its address."""
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    await server.wait_closed()


async def test_the_gateways_own_client_understands_it(url: str) -> None:
    """Index, configuration, heartbeat, tokenizer and a stream of a chunk a token, read by the real Triton client."""
    triton = Triton(url, Deadlines(1, 1, 1, 1, 5, 1))
    try:
        assert await triton.index() == {MODEL: ("1", "READY")}
        config = await triton.model_config(MODEL)
        assert config.generates and config.chat
        assert not (await triton.heartbeat(MODEL)).busy
        request = GenerateRequest(id="1", model=MODEL, accepted_at=time.monotonic(), text="hi", max_tokens=16)
        assert (await triton.prompt(request, 1.0)).tokens == 8
        chunks: list[Chunk] = []
        await triton.stream(request, Attendance(), lambda chunk: chunks.append(chunk) is not None)
        assert [chunk.text for chunk in chunks] == [TOKEN] * 16 and chunks[-1].finish_reason == "stop"
    finally:
        await triton.close()


@pytest.mark.parametrize("tokens", [1, 16])
async def test_openai_answers_have_as_many_tokens_as_asked_for(url: str, tokens: int) -> None:
    """A chat completion is whole, or a stream with a token an event, a finish reason and [DONE]."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": tokens}
    async with aiohttp.ClientSession() as http:
        async with http.post(f"{url}/v1/chat/completions", json=body) as response:
            choice = (await response.json())["choices"][0]
        assert choice["message"]["content"] == TOKEN * tokens and choice["finish_reason"] == "stop"
        async with http.post(f"{url}/v1/chat/completions", json={**body, "stream": True}) as response:
            events = [event.removeprefix("data: ") for event in (await response.text()).split("\n\n") if event]
    assert events.pop() == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    assert [choice["delta"]["content"] for choice in choices] == [TOKEN] * tokens
    assert [choice["finish_reason"] for choice in choices] == [None] * (tokens - 1) + ["stop"]


async def test_an_unknown_path_is_404(url: str) -> None:
    """What nobody here asks for is not answered as if it were."""
    async with aiohttp.ClientSession() as http, http.post(f"{url}/v1/embeddings", json={}) as response:
        assert response.status == 404 and "error" in await response.json()
