"""Several answers, log-probabilities and the other sampling parameters, as OpenAI's own Python client reads them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest

from orchestrator.ops.keyring import Keyring
from tests.redis import RealRedis

from ..conftest import Stack, serving
from ..fake_triton import FakeTriton, answer, answers, entry, event

TURNS: Any = [{"role": "user", "content": "Hola"}]


@pytest.fixture(scope="module")
def server() -> Iterator[RealRedis]:
    with RealRedis() as running:
        yield running


@pytest.fixture
async def cached(fake: FakeTriton, server: RealRedis) -> AsyncIterator[Stack]:
    """A gateway with a cache."""
    fake.beat["digest"] = fake.url
    async with serving(fake, redis_url=server.url) as stack:
        yield stack


def client(stack: Stack) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)


def sent(stack: Stack) -> dict[str, Any]:
    given: dict[str, Any] = json.loads(stack.fake.requests[-1]["sampling_parameters"])
    return given


async def test_several_answers_are_one_request(cached: Stack) -> None:
    """n choices come of one call of the model and leave one record; usage counts the prompt once and every answer."""
    async with client(cached) as api:
        chat = await api.chat.completions.create(model="m", messages=TURNS, n=3, seed=7)
    assert [(c.index, c.message.content, c.finish_reason, c.logprobs) for c in chat.choices] == [
        (0, "Hola, ¿qué tal?", "stop", None), (1, "Hola1, 1¿qué tal?1", "stop", None),
        (2, "Hola2, 2¿qué tal?2", "stop", None),
    ]  # fmt: skip
    assert chat.usage is not None
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (3, 9)
    assert (sent(cached)["n"], sent(cached)["seed"], len(cached.fake.requests)) == (3, 7, 1)
    assert [(r.completion_tokens, r.finish_reason) for r in cached.records] == [(9, "stop")]


async def test_a_stream_of_several_answers(cached: Stack) -> None:
    """Chunks carry the index of their choice, a choice begins with its role and ends once, usage is at the end."""
    cached.fake.script = [
        answers(["a", ""], ["", ""], [[entry("a")], []]),
        answers(["", ""], ["", ""], [[], [entry("b")]]),
        answers(["", "B"], ["length", ""], [[], [entry("b")]]),
        answers(["", "C"], ["", "stop"], [[], [entry("c")]]),
        "end",
    ]
    async with client(cached) as api:
        stream = await api.chat.completions.create(
            model="m", messages=TURNS, n=2, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    seen = [(c.choices[0].index, c.choices[0].delta.role, c.choices[0].delta.content, c.choices[0].finish_reason)
            for c in chunks if c.choices]  # fmt: skip
    assert seen == [
        (0, "assistant", "", None), (0, None, "a", None), (0, None, None, "length"),
        (1, "assistant", "", None), (1, None, "B", None), (1, None, "C", None), (1, None, None, "stop"),
    ]  # fmt: skip
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 4
    assert cached.records[-1].finish_reason == "length"


async def test_log_probabilities_of_a_chat(cached: Stack) -> None:
    """content has an entry a token with as many of the likeliest as were asked for, whole and streamed."""
    asked: dict[str, Any] = {"model": "m", "messages": TURNS, "logprobs": True, "top_logprobs": 2}
    async with client(cached) as api:
        whole = await api.chat.completions.create(**asked)
        chunks = [chunk async for chunk in await api.chat.completions.create(**asked, seed=1, stream=True)]
        none = await api.chat.completions.create(model="m", messages=TURNS, logprobs=True)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    first = logprobs.content[0]
    assert [one.token for one in logprobs.content] == ["Hola", ", ", "¿qué tal?"]
    assert (first.logprob, first.bytes) == (-0.5, list(b"Hola"))
    assert [(one.token, one.logprob, one.bytes) for one in first.top_logprobs] == [
        ("<1>", -1.5, list(b"<1>")), ("<2>", -2.5, list(b"<2>")),
    ]  # fmt: skip
    streamed = [one for c in chunks if c.choices[0].logprobs for one in c.choices[0].logprobs.content or []]
    assert streamed == logprobs.content
    assert none.choices[0].logprobs is not None and none.choices[0].logprobs.content is not None
    assert none.choices[0].logprobs.content[0].top_logprobs == []


async def test_log_probabilities_of_a_completion(cached: Stack) -> None:
    """Lists side by side: tokens, theirs, the likeliest with the chosen one, and offsets in characters; a token that is
    a part of a character is named by its bytes and has that character's place.
    """
    euro = "€".encode()
    parts = [entry("\ufffd", top=1, data=euro[:2]), entry("\ufffd", top=1, data=euro[2:]), entry("¡b", top=1)]
    cached.fake.script = [
        answers(["aé"], [""], [[entry("aé", top=1)]]), answers(["€¡b"], ["stop"], [parts]), "end",
    ]  # fmt: skip
    asked: dict[str, Any] = {"model": "m", "prompt": "x", "logprobs": 1}
    async with client(cached) as api:
        whole = (await api.completions.create(**asked)).choices[0].logprobs
        chunks = [c.choices[0].logprobs async for c in await api.completions.create(**asked, seed=1, stream=True)]
    assert whole is not None
    assert whole.tokens == ["aé", "bytes:\\xe2\\x82", "bytes:\\xac", "¡b"]
    assert whole.text_offset == [0, 2, 2, 3]
    assert whole.token_logprobs == [-0.5] * 4
    assert whole.top_logprobs is not None and whole.top_logprobs[0] == {"<1>": -1.5, "aé": -0.5}
    assert [one for c in chunks if c for one in c.text_offset or []] == whole.text_offset
    assert [one for c in chunks if c for one in c.tokens or []] == whole.tokens


async def test_the_best_of_several(cached: Stack) -> None:
    """The model makes best_of answers and tells their log-probabilities; the likeliest come back, all are counted."""
    async with client(cached) as api:
        best = await api.completions.create(model="m", prompt="x", best_of=3, n=2)
        one = await api.completions.create(model="m", prompt="x", best_of=3, logprobs=0)
    assert (sent(cached)["n"], sent(cached)["logprobs"], "best_of" in sent(cached)) == (3, 0, False)
    assert [(c.index, c.text, c.logprobs) for c in best.choices] == [
        (0, "Hola, ¿qué tal?", None), (1, "Hola1, 1¿qué tal?1", None),
    ]  # fmt: skip
    assert best.usage is not None and best.usage.completion_tokens == 9
    assert len(one.choices) == 1 and one.choices[0].logprobs is not None
    assert one.choices[0].logprobs.tokens == ["Hola", ", ", "¿qué tal?"]


async def test_echo(cached: Stack) -> None:
    """Each choice begins with the prompt as the model read it, of token ids and several prompts too, and streamed."""
    cached.fake.words = {1: "uno", 2: "dos"}
    cached.fake.by_text = {"a": answer("A"), "b": answer("B")}
    async with client(cached) as api:
        texts = await api.completions.create(model="m", prompt=["a", "b"], echo=True, n=2)
        ids = await api.completions.create(model="m", prompt=[1, 2], echo=True)
        stream = await api.completions.create(model="m", prompt="Hola\u202e ", echo=True, stream=True, n=2)
        seen: dict[int, str] = {0: "", 1: ""}
        async for chunk in stream:
            seen[chunk.choices[0].index] += chunk.choices[0].text
        plain = [c.choices[0].text async for c in await api.completions.create(
            model="m", prompt="a", echo=True, stream=True)]  # fmt: skip
    assert [(c.index, c.text) for c in texts.choices] == [(0, "aA"), (1, "aA1"), (2, "bB"), (3, "bB1")]
    assert ids.choices[0].text == "uno dosHola, ¿qué tal?"
    assert seen == {0: "HolaHola, ¿qué tal?", 1: "HolaHola1, 1¿qué tal?1"}
    assert plain == ["aA"]


async def test_a_replay_is_the_same(cached: Stack) -> None:
    """From the cache come the same choices with the same log-probabilities, whole and streamed, without the model."""
    asked: dict[str, Any] = {"model": "m", "messages": TURNS, "n": 2, "logprobs": True, "top_logprobs": 1}
    status, first, headers = await cached.post("/v1/chat/completions", asked)
    assert (status, headers["x-cache"]) == (200, "miss")
    status, again, headers = await cached.post("/v1/chat/completions", {**asked, "presence_penalty": 0, "min_p": 0})
    assert (status, headers["x-cache"], len(cached.fake.requests)) == (200, "hit", 1)
    assert (again["choices"], again["usage"]) == (first["choices"], first["usage"])
    events = [json.loads(e) for e in (await cached.events("/v1/chat/completions", {**asked, "stream": True}))[:-1]]
    for index in (0, 1):
        own = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert "".join(one["delta"].get("content", "") for one in own) == first["choices"][index]["message"]["content"]
        entries = [entry for one in own if one["logprobs"] for entry in one["logprobs"]["content"]]
        assert entries == first["choices"][index]["logprobs"]["content"]
        assert [one["finish_reason"] for one in own if one["finish_reason"]] == ["stop"]
    assert len(cached.fake.requests) == 1
    assert (await cached.post("/v1/chat/completions", {**asked, "n": 3}))[2]["x-cache"] == "miss"


async def test_every_parameter_reaches_the_model(cached: Stack) -> None:
    """As it was meant, by the names of the wire; what is at its default is left out."""
    given: dict[str, Any] = {
        "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.2, "min_tokens": 2, "stop_token_ids": [9, 3, 9],
        "ignore_eos": True, "priority": 5, "top_k": 4,
    }  # fmt: skip
    async with client(cached) as api:
        await api.completions.create(
            model="m", prompt="x", logit_bias={"50256": -100, "7": 0}, presence_penalty=0.5, frequency_penalty=-1,
            extra_body=given,
        )  # fmt: skip
        wanted = {**given, "logit_bias": {"50256": -100.0}, "presence_penalty": 0.5, "frequency_penalty": -1.0}
        wanted["stop_token_ids"] = [3, 9]
        assert sent(cached).items() >= wanted.items()
        await api.chat.completions.create(model="m", messages=TURNS, presence_penalty=0, n=1, logit_bias={})
        assert set(sent(cached)) == {"temperature", "top_p", "top_k", "timeout_s", "messages", "max_tokens"}


async def test_only_an_admin_goes_in_front(fake: FakeTriton, server: RealRedis) -> None:
    """A priority below 0 is 403 for an inference key, whatever an admin asked before with the same bytes."""
    import redis

    with redis.Redis.from_url(server.url) as connection:
        ring = Keyring(connection)
        keys = {scope: ring.create("acme", scope, {}, None, "")[1] for scope in ("admin", "inference")}
    body = {"model": "m", "prompt": "x", "priority": -1}
    async with serving(fake, redis_url=server.url, auth="keys") as stack:
        status, _, _ = await stack.post("/v1/completions", body, authorization=f"Bearer {keys['admin']}")
        assert (status, sent(stack)["priority"]) == (200, -1)
        status, refused, _ = await stack.post("/v1/completions", body, authorization=f"Bearer {keys['inference']}")
        assert (status, refused["error"]["param"], len(fake.requests)) == (403, "priority", 1)
        kserve = {"text_input": "x", "sampling_parameters": {"priority": -1}}
        status, _, _ = await stack.post("/v2/models/m/generate", kserve, authorization=f"Bearer {keys['inference']}")
        assert status == 403


async def test_cached_tokens_are_told_where_the_model_tells(fake: FakeTriton, server: RealRedis) -> None:
    """They are asked only of an entry that declares them, stand in the usage, and not in that of a cached answer."""
    told = [event(prompt_tokens=0, cached=0), event(prompt_tokens=9, cached=8), event("a", "stop", cached=8)]
    fake.script = [*told, "end"]
    fake.config_facts = {"output": [{"name": "num_cached_tokens"}]}
    fake.beat["digest"] = "tells"
    async with serving(fake, redis_url=server.url) as stack, client(stack) as api:
        first = await api.completions.create(model="m", prompt="x")
        assert first.usage is not None and first.usage.prompt_tokens_details is not None
        assert first.usage.prompt_tokens_details.cached_tokens == 8
        assert fake.requests[-1]["return_num_cached_tokens"] is True
        for _ in range(50):  # until it is kept: a Redis that a busy machine holds up is not waited for
            again = await api.completions.create(model="m", prompt="x")
            if again.usage is not None and again.usage.prompt_tokens_details is None:
                break
        assert again.usage is not None and again.usage.prompt_tokens_details is None
        both = await api.completions.create(model="m", prompt=["y", "z"])
        assert both.usage is not None and both.usage.prompt_tokens_details is not None
        assert both.usage.prompt_tokens_details.cached_tokens == 16
        flag = {"text_input": "w", "return_num_cached_tokens": True}
        assert (await stack.post("/v2/models/m/generate", flag))[1]["num_cached_tokens"] == 8


async def test_an_entry_that_does_not_tell_is_not_asked(stack: Stack) -> None:
    """Older entries know no such input."""
    await stack.post("/v1/completions", {"model": "m", "prompt": "x"})
    assert "return_num_cached_tokens" not in stack.fake.requests[-1]


@pytest.mark.parametrize("broken", [
    answers(["a"], ["stop"], [[entry("a")]]),  # one element where two were expected
    answers(["a", "b"], ["stop", "stop"], [[entry("a")], [entry("b")]], logprobs=["[]", "[]"]),
    answers(["a", "b"], ["stop", "stop"], [[entry("a")], [entry("b")]], logprobs=["[{", "[{"]),
    answers(["a", "b"], ["stop", "odd"], [[entry("a")], [entry("b")]]),
])  # fmt: skip
async def test_nonsense_is_an_error(stack: Stack, broken: bytes) -> None:
    """What the model could not have meant is 500, never shown as an answer."""
    stack.fake.script = [broken, "end"]
    status, body, _ = await stack.post("/v1/completions", {"model": "m", "prompt": "x", "n": 2, "logprobs": 0})
    assert (status, body["error"]["code"]) == (500, "upstream_error")


async def test_a_fallback_text_is_every_choice(fake: FakeTriton) -> None:
    """Where a text answers in place of the model there are as many choices as were asked for."""
    fake.script = ["close"]
    async with serving(fake, fallback_text="Sorry.", retries=0) as stack:
        body = {"model": "m", "messages": TURNS, "n": 2, "logprobs": True}
        status, answered, headers = await stack.post("/v1/chat/completions", body)
    assert (status, headers["x-truthgpt-fallback"]) == (200, "text")
    assert [(c["index"], c["message"]["content"], c["logprobs"]) for c in answered["choices"]] == [
        (0, "Sorry.", None), (1, "Sorry.", None),
    ]  # fmt: skip
