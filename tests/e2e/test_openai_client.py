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


def test_several_prompts_of_one_completion(stack: Stack, client: openai.OpenAI):
    """A choice for each prompt, in order, whole and streamed, with the usage of both together."""
    ask = dict(model=stack.model, prompt=["one", "one two"], max_tokens=3, temperature=0)
    whole = client.completions.create(**ask)
    assert [(c.index, c.text) for c in whole.choices] == [(0, "two three one"), (1, "three one two")]
    assert [c.finish_reason for c in whole.choices] == ["length", "length"]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 6)
    *chunks, last = client.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "two three one", 1: "three one two"}
    assert last.choices == [] and last.usage == whole.usage
    ids = client.completions.create(**{**ask, "prompt": [[0], [0, 1]]})
    assert [c.text for c in ids.choices] == ["two three one", "three one two"]


def test_errors_are_the_clients_own_classes(stack: Stack, client: openai.OpenAI):
    """An unknown model is NotFoundError, a bad parameter BadRequestError that names it."""
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nothing", prompt="one")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=stack.model, prompt="one", temperature=-1)
    assert caught.value.param == "temperature"
