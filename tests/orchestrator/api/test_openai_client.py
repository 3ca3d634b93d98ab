"""The contract as OpenAI's own Python client reads it."""

from __future__ import annotations

import openai
import pytest

from ..conftest import Stack
from ..fake_triton import event, failure


def client(stack: Stack) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)


async def test_chat_and_completion(stack: Stack) -> None:
    """Typed answers, with usage and the request id, come back from both endpoints."""
    async with client(stack) as api:
        answer = await api.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hola"}])
        assert answer.choices[0].message.content == "Hola, ¿qué tal?"
        assert answer.usage is not None
        assert answer.usage.total_tokens == 6
        assert answer._request_id == stack.records[0].id
        text = await api.completions.create(model="m", prompt="Hola", max_tokens=5, extra_body={"top_k": 5})
        assert text.choices[0].text == "Hola, ¿qué tal?"


async def test_streaming(stack: Stack) -> None:
    """The client's stream yields every delta and the usage chunk, and ends."""
    async with client(stack) as api:
        stream = await api.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x"}], stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(deltas) == "Hola, ¿qué tal?"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 3


async def test_errors_are_the_clients_own_classes(stack: Stack) -> None:
    """Each failure raises the class that the client's users catch."""
    async with client(stack) as api:
        with pytest.raises(openai.NotFoundError) as missing:
            await api.completions.create(model="ghost", prompt="x")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            await api.completions.create(model="m", prompt="x", n=17)
        assert bad.value.param == "n"
        stack.fake.script = [failure("resource_exhausted: full"), "end"]
        with pytest.raises(openai.InternalServerError, match="queue is full"):
            await api.completions.create(model="m", prompt="x")
        stack.fake.script = [event("a"), failure("internal: NaN"), "end"]
        with pytest.raises(openai.APIError, match="internal error"):
            async for _ in await api.completions.create(model="m", prompt="x", stream=True):
                pass


async def test_models_list(stack: Stack) -> None:
    """models.list() and models.retrieve() parse."""
    async with client(stack) as api:
        assert [model.id async for model in await api.models.list()] == ["m"]
        assert (await api.models.retrieve("m")).owned_by == "truthgpt"
