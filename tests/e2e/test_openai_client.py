"""Contract tests with the real openai client against the real stack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from .stack import Stack


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{stack.ports['HTTP']}/v1", api_key="unused", max_retries=0) as c:
        yield c


def counts(usage: Any) -> tuple[int, int, int]:
    """What is the same in the usage of an answer from the cache, which tells nothing of the engine's prefix cache."""
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


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
    assert chunks[-1].choices == [] and counts(chunks[-1].usage) == counts(whole.usage)
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
    assert last.choices == [] and counts(last.usage) == counts(whole.usage)
    ids = client.completions.create(**{**ask, "prompt": [[0], [0, 1]]})
    assert [c.text for c in ids.choices] == ["two three one", "three one two"]


# After "one" the model is sure of "two": with this it wavers between that and "three".
WAVERING = {"2": 50}


def test_several_answers_are_those_of_the_seeds_after_it(stack: Stack, client: openai.OpenAI):
    """Answer i of a request with a seed is that of a request of its own with seed + i, whole and streamed, and the best
    of several are the likeliest of them; all that were made are counted.
    """
    ask: dict[str, Any] = dict(model=stack.model, prompt="one", max_tokens=12, logit_bias=WAVERING, logprobs=0)
    alone = [client.completions.create(**ask, seed=70 + at).choices[0] for at in range(4)]
    many = client.completions.create(**ask, seed=70, n=4)
    assert [c.index for c in many.choices] == [0, 1, 2, 3]
    assert [(c.text, c.logprobs) for c in many.choices] == [(c.text, c.logprobs) for c in alone]
    assert len({c.text for c in alone}) > 1
    assert counts(many.usage) == (1, 48, 49)
    texts, reasons = dict.fromkeys(range(3), ""), dict.fromkeys(range(3), list[str]())
    for chunk in client.completions.create(**ask, seed=70, n=3, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        reasons[choice.index] = reasons[choice.index] + [choice.finish_reason] * bool(choice.finish_reason)
    assert [*texts.values()] == [c.text for c in alone[:3]] and [*reasons.values()] == [["length"]] * 3
    best = client.completions.create(**ask, seed=70, n=2, best_of=4)
    ranked = sorted(alone, key=lambda choice: -sum(choice.logprobs.token_logprobs))
    assert [c.text for c in best.choices] == [c.text for c in ranked[:2]]
    assert counts(best.usage) == (1, 48, 49)


def test_log_probabilities_and_their_replay(stack: Stack, client: openai.OpenAI):
    """Each token's own and the likeliest, whole, streamed, and the same again from the cache."""
    turns = [{"role": "user", "content": "one"}]
    ask: dict[str, Any] = dict(model=stack.model, messages=turns, max_tokens=3, logprobs=True, top_logprobs=2, seed=3)
    first = client.chat.completions.with_raw_response.create(**ask)
    again = client.chat.completions.with_raw_response.create(**ask)
    assert (first.headers["x-cache"], again.headers["x-cache"]) == ("miss", "hit")
    choice = first.parse().choices[0]
    assert again.parse().choices[0] == choice
    assert [one.token for one in choice.logprobs.content] == ["two", " three", " one"]
    assert [bytes(one.bytes) for one in choice.logprobs.content] == [b"two", b" three", b" one"]
    for one in choice.logprobs.content:
        assert abs(one.logprob) < 1e-6 and len(one.top_logprobs) == 2 and one.top_logprobs[0].token == one.token
        assert abs(one.top_logprobs[1].logprob + 50) < 1e-3
    streamed = client.chat.completions.create(**ask, stream=True, extra_headers={"cache-control": "no-cache"})
    found = [one for chunk in streamed if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert found == choice.logprobs.content


def test_what_else_steers_an_answer(stack: Stack, client: openai.OpenAI):
    """Bias, penalties, stop tokens, least tokens and echo do what they say; an id out of the vocabulary is named."""

    def say(**how: Any) -> str:
        extra = {name: how.pop(name) for name in ("stop_token_ids", "min_tokens", "repetition_penalty") if name in how}
        given = dict(model=stack.model, prompt="one", max_tokens=4, temperature=0) | how
        return client.completions.create(**given, extra_body=extra).choices[0].text

    assert say(logit_bias={"1": -100}) == "one one one one"
    assert say(logit_bias={"0": 50}, max_tokens=3) == "one one one"
    for penalty in ("presence_penalty", "frequency_penalty"):
        assert say(logit_bias={"0": 50}, max_tokens=3, **{penalty: 2}) == "one two three"
    assert say(stop_token_ids=[0]) == "two three"
    assert say(stop_token_ids=[1], min_tokens=2) == "one one"
    assert say(echo=True) == "onetwo three one two"
    with pytest.raises(openai.BadRequestError) as caught:
        say(logit_bias={"3": 1})
    assert caught.value.param == "logit_bias"


def test_errors_are_the_clients_own_classes(stack: Stack, client: openai.OpenAI):
    """An unknown model is NotFoundError, a bad parameter BadRequestError that names it."""
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nothing", prompt="one")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=stack.model, prompt="one", temperature=-1)
    assert caught.value.param == "temperature"
