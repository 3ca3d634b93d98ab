"""Contract tests with the real openai client against the real stack."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from .stack import Stack


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{stack.ports['HTTP']}/v1", api_key="unused", max_retries=0) as c:
        yield c


def test_models_are_listed(stack: Stack, client: openai.OpenAI):
    """The client sees the served model by its name."""
    assert [m.id for m in client.models.list()] == [stack.model]


def test_a_chat_completion_whole_and_streamed(stack: Stack, client: openai.OpenAI):
    """The same answer either way, with usage and a finish reason."""
    ask = dict(model=stack.model, messages=[{"role": "user", "content": "one two"}], max_tokens=4, temperature=0)
    whole = client.chat.completions.create(**ask)
    assert whole.choices[0].message.content == "three one two three"
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (2, 4, 6)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "three one two three"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_a_completion_whole_and_streamed(stack: Stack, client: openai.OpenAI):
    """/v1/completions with a text and with token ids."""
    text = client.completions.create(model=stack.model, prompt="one", max_tokens=3)
    ids = client.completions.create(model=stack.model, prompt=[0], max_tokens=3)
    assert text.choices[0].text == ids.choices[0].text == "two three one"
    chunks = client.completions.create(model=stack.model, prompt="one", max_tokens=3, stream=True)
    assert "".join(c.choices[0].text for c in chunks) == "two three one"


def test_errors_are_the_clients_own_classes(stack: Stack, client: openai.OpenAI):
    """An unknown model is NotFoundError, a bad parameter BadRequestError that names it."""
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nothing", prompt="one")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=stack.model, prompt="one", temperature=-1)
    assert caught.value.param == "temperature"
