"""`/v1/embeddings` and `/v1/classify`: what a body may say, what comes back, and that every policy applies."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import struct
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
import redis

from orchestrator.ops.keyring import Keyring
from tests.encoding import CLASSIFIES, EMBEDS, scores, tokens, vector
from tests.redis import RealRedis

from ..conftest import Stack, serving, until
from ..fake_triton import FakeTriton

EMBED, CLASSIFY = "/v1/embeddings", "/v1/classify"


@pytest.fixture
def encoders(fake: FakeTriton) -> FakeTriton:
    """A Triton with a generation model, one that embeds and one that classifies."""
    fake.models |= {"e": "READY", "c": "READY"}
    fake.encoders = {"e": dict(EMBEDS), "c": dict(CLASSIFIES)}
    return fake


@pytest.fixture
async def stack(encoders: FakeTriton) -> AsyncIterator[Stack]:
    async with serving(encoders) as running:
        yield running


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RealRedis]:
    with RealRedis() as running:
        yield running


@pytest.fixture
async def cached(encoders: FakeTriton, redis_server: RealRedis) -> AsyncIterator[Stack]:
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    async with serving(encoders, redis_url=redis_server.url, redis_timeout_s=2.0) as running:
        yield running


def floats(encoded: str) -> list[float]:
    data = base64.b64decode(encoded)
    return list(struct.unpack(f"<{len(data) // 4}f", data))


async def test_one_text_and_several(stack: Stack) -> None:
    """The vectors come in the texts' order, exactly as the model gave them, in numbers and in base64 alike."""
    status, body, _ = await stack.post(EMBED, {"model": "e", "input": "Hola, mundo"})
    assert status == 200
    assert body == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": vector("Hola, mundo", 8)}],
        "model": "e",
        "usage": {"prompt_tokens": 4, "total_tokens": 4},
    }
    texts = ["uno", "dos dos", "¿tres?"]
    _, plain, _ = await stack.post(EMBED, {"model": "e", "input": texts, "encoding_format": "float"})
    _, packed, _ = await stack.post(EMBED, {"model": "e", "input": texts, "encoding_format": "base64", "user": "me"})
    assert [row["embedding"] for row in plain["data"]] == [vector(text, 8) for text in texts]
    assert [floats(row["embedding"]) for row in packed["data"]] == [vector(text, 8) for text in texts]
    assert [row["index"] for row in packed["data"]] == [0, 1, 2]
    assert packed["usage"] == plain["usage"] == {"prompt_tokens": 10, "total_tokens": 10}
    record = stack.records[-1]
    assert (record.operation, record.task, record.outcome, record.prompt_tokens) == ("embed", "embeddings", "ok", 10)
    assert (record.completion_tokens, record.output_chars, record.ttft_s, record.finish_reason) == (0, 0, None, None)


async def test_classes(stack: Stack) -> None:
    """Every text has its best label and the score of each."""
    texts = ["me gusta", "no me gusta"]
    status, body, _ = await stack.post(CLASSIFY, {"model": "c", "input": texts})
    assert status == 200
    for index, (row, text) in enumerate(zip(body["data"], texts, strict=True)):
        by_label = dict(zip(("negative", "positive"), scores(text, 2), strict=True))
        best = max(by_label, key=lambda label: by_label[label])
        assert row == {"index": index, "label": best, "score": by_label[best], "scores": by_label}
    assert (body["object"], body["model"]) == ("list", "c")
    assert body["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    assert (stack.records[-1].operation, stack.records[-1].task) == ("classify", "sentiment_analysis")


async def test_openais_own_client(stack: Stack) -> None:
    """Its default, which is base64, and float give the same vectors; its errors are its own classes."""
    async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as api:
        answer = await api.embeddings.create(model="e", input=["a", "b b"])
        plain = await api.embeddings.create(model="e", input=["a", "b b"], encoding_format="float")
        assert [row.embedding for row in answer.data] == [row.embedding for row in plain.data]
        assert answer.data[1].embedding == vector("b b", 8)
        assert (answer.usage.prompt_tokens, answer.model) == (7, "e")
        cut = await api.embeddings.create(model="e", input="a", dimensions=3)
        assert len(cut.data[0].embedding) == 3
        with pytest.raises(openai.BadRequestError) as caught:
            await api.embeddings.create(model="e", input=[[1, 2]])
        assert caught.value.param == "input"


@pytest.mark.parametrize("normalized", ["true", "false"])
async def test_dimensions(encoders: FakeTriton, normalized: str) -> None:
    """A cut vector has length 1 again where the model's have, and is only cut where not; both forms agree."""
    encoders.encoders["e"]["normalized"] = normalized
    async with serving(encoders) as stack:
        body = {"model": "e", "input": "Hola", "dimensions": 5}
        (row,) = (await stack.post(EMBED, body))[1]["data"]
        (packed,) = (await stack.post(EMBED, {**body, "encoding_format": "base64"}))[1]["data"]
        assert floats(packed["embedding"]) == row["embedding"]
        whole = vector("Hola", 8)[:5]
        length = math.hypot(*whole) if normalized == "true" else 1.0
        assert row["embedding"] == pytest.approx([value / length for value in whole], rel=1e-6)
        assert (await stack.post(EMBED, {**body, "dimensions": 8}))[1]["data"][0]["embedding"] == vector("Hola", 8)
        status, refused, _ = await stack.post(EMBED, {**body, "dimensions": 9})
        assert (status, refused["error"]["param"]) == (400, "dimensions")
        assert "from 1 to 8" in refused["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "input", "required"),
        ({"input": None}, "input", "required"),
        ({"input": []}, "input", "at least one"),
        ({"input": ""}, "input", "empty"),
        ({"input": ["a", ""]}, "input[1]", "empty"),
        ({"input": ["a", None]}, "input[1]", "string"),
        ({"input": {"a": 1}}, "input", "string"),
        ({"input": 1.5}, "input", "string"),
        ({"input": [1, 2, 3]}, "input", "token ids"),
        ({"input": [[1, 2], [3]]}, "input", "token ids"),
        ({"input": ["a", [3]]}, "input", "token ids"),
        ({"input": ["a"] * 2049}, "input", "2048"),
        ({"input": "   "}, "input", "no text"),
        ({"input": ["a", "\u0000"]}, "input[1]", "no text"),
        ({"input": " ".join("a" * 15)}, "input", "has 17 tokens; the model reads at most 16"),
        ({"input": ["a", "b", " ".join("a" * 20)]}, "input[2]", "has 22 tokens"),
        ({"input": "a", "truncate": "yes"}, "truncate", "true or false"),
        ({"input": "a", "temperature": 1}, "temperature", "Unknown"),
        ({"input": "a", "model": 1}, "model", "string"),
        ({"input": "a", "model": "m"}, "model", "does not"),
    ],
)
async def test_what_is_wrong_is_named(stack: Stack, body: dict[str, Any], param: str, said: str) -> None:
    """At both endpoints, a 400 with the parameter and, in a list, the text's index; in Spanish where that is asked."""
    for path, model in ((EMBED, "e"), (CLASSIFY, "c")):
        status, answer, _ = await stack.post(path, {"model": model, **body})
        assert (status, answer["error"]["param"]) == (400, param), answer
        assert said in answer["error"]["message"]
        assert "text_input" not in answer["error"]["message"]
        _, spanish, _ = await stack.post(path, {"model": model, **body}, **{"accept-language": "es"})
        assert spanish["error"]["message"] != answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"encoding_format": ["float"]}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": "8"}, "dimensions"),
    ],
)
async def test_wrong_forms_of_an_embedding(stack: Stack, body: dict[str, Any], param: str) -> None:
    """They are 400 by name, and no parameters at all of a classification."""
    status, answer, _ = await stack.post(EMBED, {"model": "e", "input": "a", **body})
    assert (status, answer["error"]["param"]) == (400, param)
    status, answer, _ = await stack.post(CLASSIFY, {"model": "c", "input": "a", **body})
    assert "Unknown parameter" in answer["error"]["message"]


async def test_truncate(stack: Stack) -> None:
    """It lets the model cut what is too long for it."""
    long = " ".join(["word"] * 40)
    status, body, _ = await stack.post(EMBED, {"model": "e", "input": ["a", long], "truncate": True})
    assert (status, body["usage"]["prompt_tokens"]) == (200, 3 + 16)


async def test_a_model_that_is_for_something_else(stack: Stack) -> None:
    """Whoever asks a model for what it does not do is told which models do it, and that is no secret of one edge."""
    asked = [
        (EMBED, {"model": "m", "input": "a"}, "does not make embeddings: it generates text. Models that do: e."),
        (EMBED, {"model": "c", "input": "a"}, "Models that do: e."),
        (CLASSIFY, {"model": "e", "input": "a"}, "does not classify text: it makes embeddings. Models that do: c."),
        ("/v1/completions", {"model": "e", "prompt": "a"}, "does not generate text: it makes embeddings"),
    ]
    for path, body, said in asked:
        status, answer, _ = await stack.post(path, body)
        assert (status, answer["error"]["param"]) == (400, "model")
        assert said in answer["error"]["message"]
    status, answer, _ = await stack.post("/v2/models/e/generate", {"text_input": "a"})
    assert status == 400 and "Models that do: m" in answer["error"]
    assert (await stack.post(EMBED, {"model": "ghost", "input": "a"}))[0] == 404


async def test_no_model_for_it(fake: FakeTriton) -> None:
    """Where nothing embeds, that is said."""
    async with serving(fake) as stack:
        status, answer, _ = await stack.post(EMBED, {"model": "m", "input": "a"})
        assert status == 400 and "No model here does." in answer["error"]["message"]


async def test_a_model_of_which_nothing_is_known_yet(encoders: FakeTriton) -> None:
    """It is not said to be of the wrong kind: it is not available, at every edge."""
    encoders.stopped = True
    async with serving(encoders, wait=False, heartbeat_timeout_s=0.2) as stack:
        assert (await stack.post(EMBED, {"model": "e", "input": "a"}))[0] == 503
        inputs = [{"name": "text_input", "datatype": "BYTES", "shape": [2, 1], "data": ["a", "b"]}]
        assert (await stack.post("/v2/models/e/infer", {"inputs": inputs}))[0] == 503


async def test_the_list_of_models_says_what_they_are(stack: Stack) -> None:
    """Task, dimensions and labels are in it."""
    _, body, _ = await stack.get("/v1/models")
    facts = {row["id"]: (row["task"], row["dimensions"], row["labels"]) for row in body["data"]}
    assert facts == {
        "c": ("sentiment_analysis", None, ["negative", "positive"]),
        "e": ("embeddings", 8, None),
        "m": ("text_generation", None, None),
    }


async def test_long_lists_go_in_parts(encoders: FakeTriton) -> None:
    """A list goes to Triton in parts of the model's largest batch, two at a time, and comes back in its order."""
    encoders.encode_pause_s = 0.02
    async with serving(encoders) as stack:
        texts = [f"text number {i}" for i in range(64 * 4 + 3)]
        status, body, _ = await stack.post(EMBED, {"model": "e", "input": texts})
        assert status == 200
        assert [row["embedding"] for row in body["data"]] == [vector(text, 8) for text in texts]
        assert body["usage"]["prompt_tokens"] == sum(map(tokens, texts))
        assert sorted(map(len, encoders.read)) == [3, 64, 64, 64, 64]
        assert encoders.most_running == 2
        texts[130] = " ".join(["long"] * 30)
        status, body, _ = await stack.post(EMBED, {"model": "e", "input": texts})
        assert (status, body["error"]["param"]) == (400, "input[130]")
        await until(lambda: encoders.running == 0)
        assert stack.gateway.in_flight == 0


async def test_sanitising_reads_each_text_by_itself(encoders: FakeTriton) -> None:
    """Each text has the whole limit, is cleaned or refused by its index, and what was changed is said."""
    async with serving(encoders, max_input_chars=20) as stack:
        texts = ["a" * 15, "b" * 15, "<script>x</script>ok", "c" * 30]
        status, _, headers = await stack.post(EMBED, {"model": "e", "input": texts})
        assert (status, headers["x-truthgpt-sanitized"]) == (200, "script, cut")
        assert encoders.read == [["a" * 15, "b" * 15, "ok", "c" * 20]]
    async with serving(encoders, sanitize="reject", max_input_chars=20) as stack:
        for wrong, code in (("<script>x</script>", "unsafe_input"), ("c" * 30, "unsafe_input")):
            status, body, _ = await stack.post(CLASSIFY, {"model": "c", "input": ["a", wrong]})
            assert (status, body["error"]["param"], body["error"]["code"]) == (400, "input[1]", code)


async def test_answers_are_cached(cached: Stack) -> None:
    """The same texts again are answered without the model, in whatever form; other texts, and truncate, are not."""
    body: dict[str, Any] = {"model": "e", "input": ["uno", "dos"]}
    first = await cached.post(EMBED, body)
    packed = await cached.post(EMBED, {**body, "encoding_format": "base64", "dimensions": 4})
    again = await cached.post(EMBED, body)
    assert [answer[2]["x-cache"] for answer in (first, packed, again)] == ["miss", "hit", "hit"]
    assert again[1] == first[1]
    assert len(floats(packed[1]["data"][0]["embedding"])) == 4
    for other in ({"input": ["dos", "uno"]}, {"input": "uno"}, {"truncate": True}):
        assert (await cached.post(EMBED, {**body, **other}))[2]["x-cache"] == "miss"
    for control in ("no-cache", "no-store"):
        assert (await cached.post(EMBED, body, **{"cache-control": control}))[2]["x-cache"] == "bypass"
    assert len(cached.fake.read) == 6
    classes = [await cached.post(CLASSIFY, {"model": "c", "input": "uno"}) for _ in range(2)]
    assert [answer[2]["x-cache"] for answer in classes] == ["miss", "hit"]
    assert classes[0][1] == classes[1][1]


async def test_identical_requests_at_once_ask_once(cached: Stack) -> None:
    """Who comes while the answer is made shares it, over both protocols."""
    cached.fake.encode_pause_s = 0.2
    body = {"model": "e", "input": ["uno", "dos"]}
    inputs = [{"name": "text_input", "datatype": "BYTES", "shape": [2, 1], "data": ["uno", "dos"]}]
    answers = await asyncio.gather(
        *(cached.post(EMBED, body) for _ in range(10)), cached.post("/v2/models/e/infer", {"inputs": inputs})
    )
    assert {answer[0] for answer in answers} == {200}
    assert len(cached.fake.read) == 1
    assert sorted(answer[2]["x-cache"] for answer in answers) == ["hit"] * 10 + ["miss"]


async def test_failures_are_not_cached(cached: Stack) -> None:
    """An error is told to all who share it, and the next one asks again."""
    cached.fake.encode_errors = [(500, "internal: NaN")]
    body = {"model": "e", "input": "uno"}
    assert (await cached.post(EMBED, body))[0] == 500
    assert (await cached.post(EMBED, body))[2]["x-cache"] == "miss"


async def test_limits_are_the_operations(encoders: FakeTriton, redis_server: RealRedis) -> None:
    """Both protocols count in one window; embed, classify and generate have a window each; tokens are settled."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    settings = {"redis_url": redis_server.url, "redis_timeout_s": 2.0}
    async with serving(encoders, limit_per_hour=3, limit_tokens_per_minute=100, **settings) as stack:
        inputs = [{"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": ["dos"]}]
        first = await stack.post(EMBED, {"model": "e", "input": "uno"})
        second = await stack.post("/v2/models/e/infer", {"inputs": inputs})
        wrong = await stack.post(EMBED, {"model": "m", "input": "uno"})
        fourth = await stack.post("/v2/models/e/infer", {"inputs": inputs})
        assert [answer[0] for answer in (first, second, wrong, fourth)] == [200, 200, 400, 429]
        assert int(fourth[2]["retry-after"]) > 0
        classified = await stack.post(CLASSIFY, {"model": "c", "input": "uno"})
        assert (classified[0], classified[2]["x-ratelimit-remaining-requests"]) == (200, "2")
        # 3 tokens were used by the first; this one reserves 14 more words' bytes, but not above what the model reads
        again = await stack.post(CLASSIFY, {"model": "c", "input": "ab " * 14})
        assert again[2]["x-ratelimit-remaining-tokens"] == str(100 - 3 - 16)
        many = await stack.post(CLASSIFY, {"model": "c", "input": ["ab " * 14] * 7})
        assert (many[0], many[1]["error"]["param"]) == (400, "input")
        assert "may have 112 tokens, and your limit is 100" in many[1]["error"]["message"]


async def test_tenants_share_nothing(encoders: FakeTriton, redis_server: RealRedis) -> None:
    """A key is needed, and an answer of one tenant is a miss for another."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
        keys = [Keyring(client).create(tenant)[1] for tenant in ("acme", "other")]
    async with serving(encoders, redis_url=redis_server.url, redis_timeout_s=2.0, auth="keys") as stack:
        body = {"model": "c", "input": "uno"}
        seen = [await stack.post(CLASSIFY, body, authorization=f"Bearer {key}") for key in (*keys, keys[0])]
        assert [answer[2]["x-cache"] for answer in seen] == ["miss", "miss", "hit"]
        assert (await stack.post(CLASSIFY, body))[0] == 401


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (500, "resource_exhausted: full", (503, "queue_full")),
        (503, "Exceeds maximum queue size", (503, "queue_full")),
        (503, "Request timeout expired", (504, "deadline_exceeded")),
        (500, "internal: non-finite scores", (500, "upstream_error")),
        (400, "deadline_exceeded: late", (504, "deadline_exceeded")),
        (400, "Stub process 'x' is not healthy.", (503, "model_unavailable")),
        (400, "Request for unknown model: 'e' is not found", (503, "model_unavailable")),
        (500, "invalid_argument: text_input[0] is a poem", (400, None)),
    ],
)
async def test_tritons_errors(encoders: FakeTriton, status: int, said: str, expected: tuple[int, str | None]) -> None:
    """They are those of generation, by their kind or Triton's own sentence."""
    encoders.encode_errors = [(status, said)]
    async with serving(encoders, retries=0) as stack:
        got, body, headers = await stack.post(EMBED, {"model": "e", "input": "a"})
        assert (got, body["error"]["code"]) == expected
        assert ("retry-after" in headers) is (got == 503)
        if got == 400:
            assert (body["error"]["param"], body["error"]["message"]) == ("input", "input is a poem")


async def test_retries_and_breaker(encoders: FakeTriton) -> None:
    """A model that was away for a moment is asked again; one that is away opens its breaker, and no other's."""
    encoders.encode_errors = [(503, "unavailable: stopping")]
    async with serving(encoders, retries=1, breaker_failures=2) as stack:
        assert (await stack.post(EMBED, {"model": "e", "input": "a"}))[0] == 200
        encoders.encode_errors = [(500, "internal: broken")] * 2
        assert [(await stack.post(EMBED, {"model": "e", "input": "a"}))[0] for _ in range(2)] == [500, 500]
        status, body, _ = await stack.post(EMBED, {"model": "e", "input": "a"})
        assert (status, body["error"]["code"]) == (503, "breaker_open")
        assert (await stack.post(CLASSIFY, {"model": "c", "input": "a"}))[0] == 200
        encoders.encode_errors = []


@pytest.mark.parametrize(
    ("model", "change"),
    [
        ("e", {"embedding": ("FP32", 8, [math.nan] * 8)}),
        ("e", {"embedding": ("FP32", 8, [math.inf] + [0.0] * 7)}),
        ("e", {"embedding": ("FP32", 7, [0.0] * 7)}),
        ("e", {"embedding": ("FP32", 8, [0.0] * 16)}),
        ("e", {"embedding": ("UINT32", 8, [0] * 8)}),
        ("e", {"num_input_tokens": ("UINT32", 1, [1, 2])}),
        ("c", {"label": ("BYTES", 1, [b"unheard of"])}),
        ("c", {"scores": ("FP32", 3, [0.1, 0.2, 0.7])}),
        ("c", {"label": None}),
    ],
)
async def test_an_answer_that_makes_no_sense(encoders: FakeTriton, model: str, change: dict[str, Any]) -> None:
    """It is an error of the model, never a null, a wrong row or half an answer."""

    def changed(outputs: dict[str, Any]) -> None:
        outputs.update(change)
        for name in [name for name, value in outputs.items() if value is None]:
            del outputs[name]

    encoders.broken_encoder = changed
    async with serving(encoders) as stack:
        path = EMBED if model == "e" else CLASSIFY
        status, body, _ = await stack.post(path, {"model": model, "input": "a"})
        assert (status, body["error"]["code"]) == (500, "upstream_error")


async def test_metrics(cached: Stack) -> None:
    """Tokens are counted as the model's reading, or as answered without it; nothing is counted as generated."""
    body = {"model": "e", "input": "uno dos"}
    for _ in range(2):
        await cached.post(EMBED, body)
    application: Any = cached.server.config.app
    cached.gateway.record()
    shot = application.metrics.snapshot()
    assert sorted(shot["truthgpt_tokens_total"]) == [["e", "cached", 4], ["e", "prompt", 4]]
    assert shot["truthgpt_generations_total"] == [] == shot["truthgpt_time_to_first_token_seconds"]
    assert ["embed", "openai", "ok", 2] in shot["truthgpt_requests_total"]
    assert sorted(shot["truthgpt_cache_requests_total"]) == [["embeddings", "hit", 1], ["embeddings", "miss", 1]]
    assert ["e", "ok", 1] in shot["truthgpt_upstream_requests_total"]


async def test_a_hang_up_frees_the_place(encoders: FakeTriton) -> None:
    """Who hangs up in the middle of a long list leaves nothing behind, and no further part is asked."""
    encoders.encode_pause_s = 0.3
    async with serving(encoders) as stack:
        body = json.dumps({"model": "e", "input": ["a"] * 640}).encode()
        task = asyncio.create_task(stack.post(EMBED, body))
        await until(lambda: encoders.running == 2)
        task.cancel()
        await until(lambda: stack.gateway.in_flight == 0)
        assert stack.records[-1].outcome == "cancelled"
        await until(lambda: encoders.running == 0)
        assert len(encoders.read) == 2


async def test_health_of_an_encoder(encoders: FakeTriton) -> None:
    """It has a heartbeat as others have, a full queue is no death, and a dead process is."""
    encoders.beat["digest"] = "a" * 32
    async with serving(encoders) as stack:
        _, health, _ = await stack.get("/health")
        rows = {row["name"]: row for row in health["models"]}
        assert (rows["e"]["slots"], rows["e"]["max_len"], rows["e"]["task"]) == (4, 16, "embeddings")
        assert {model.name: model.digest for model in stack.gateway.models}["e"] == "a" * 32
        encoders.beat_error = "Exceeds maximum queue size"
        asked = len(encoders.calls)
        await until(lambda: len(encoders.calls) > asked + 12)
        assert all(model.ready for model in stack.gateway.models)
        encoders.beat_error = "Stub process 'e' is not healthy"
        await until(lambda: not any(model.ready for model in stack.gateway.models))
        assert (await stack.post(EMBED, {"model": "e", "input": "a"}))[0] == 503


async def test_a_batch_that_takes_long_is_no_death(encoders: FakeTriton) -> None:
    """An encoder that answers its heartbeat only behind its batch stays ready for as long as a step may take."""
    encoders.encode_pause_s = 0.6
    async with serving(encoders, heartbeat_timeout_s=0.2) as stack:
        encoders.beats_wait = True
        status, _, _ = await stack.post(EMBED, {"model": "e", "input": "a"})
        assert status == 200


def reload(fake: FakeTriton, version: str, **facts: dict[str, str]) -> None:
    """Triton switches to another version at once; `facts` change the entries of these models."""
    fake.version, fake.beat["digest"] = version, version * 32
    for name, changes in facts.items():
        fake.encoders[name] = {**fake.encoders[name], **changes}


@pytest.fixture
async def unaware(encoders: FakeTriton, redis_server: RealRedis) -> AsyncIterator[Stack]:
    """A gateway with a cache that no heartbeat tells of a reload."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    reload(encoders, "1")
    kept = {"redis_url": redis_server.url, "redis_timeout_s": 2.0, "heartbeat_interval_s": 60.0}
    async with serving(encoders, **kept) as running:
        yield running


async def test_a_reload_that_no_heartbeat_has_told_of(unaware: Stack) -> None:
    """A version with another dim and other labels answers before the gateway knows it: by its own facts, once."""
    embed, classify = {"model": "e", "input": "uno"}, {"model": "c", "input": "uno"}
    assert len((await unaware.post(EMBED, embed))[1]["data"][0]["embedding"]) == 8
    assert [(await unaware.post(CLASSIFY, classify))[0]] == [200]
    reload(unaware.fake, "2", e={"dim": "4"}, c={"labels": '["bad", "so-so", "good"]'})
    asked = len(unaware.fake.read)
    status, body, _ = await unaware.post(EMBED, {**embed, "input": "dos"})
    assert (status, body["data"][0]["embedding"]) == (200, vector("dos", 4))
    status, body, _ = await unaware.post(CLASSIFY, {**classify, "input": "dos"})
    assert (status, list(body["data"][0]["scores"])) == (200, ["bad", "so-so", "good"])
    inputs = [{"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": ["tres"]}]
    assert (await unaware.post("/v2/models/c/infer", {"inputs": inputs}))[1]["model_version"] == "2"
    assert len(unaware.fake.read) == asked + 3
    models = {model.name: model for model in unaware.gateway.models}
    assert (models["e"].version, models["e"].digest, models["e"].dim) == ("2", "2" * 32, 4)
    reload(unaware.fake, "3", e={"dim": "3"})
    status, body, _ = await unaware.post(EMBED, {**embed, "input": "tres", "dimensions": 4})
    assert (status, body["error"]["param"]) == (400, "dimensions")


async def test_an_answer_is_wholly_of_one_version(unaware: Stack) -> None:
    """Parts that two versions have answered are asked once more, all of them; the rows are the new version's."""
    reload(unaware.fake, "1", e={"max_batch_size": "2"})

    def switch(outputs: dict[str, Any]) -> None:
        if len(unaware.fake.read) >= 3 and unaware.fake.version == "9":
            reload(unaware.fake, "2", e={"dim": "4"})

    unaware.fake.broken_encoder = switch
    unaware.fake.version = "9"  # it is read anew once, with the batches of two
    await unaware.post(EMBED, {"model": "e", "input": "nueve"})
    unaware.fake.read.clear()
    texts = [f"text {number}" for number in range(8)]
    status, body, _ = await unaware.post(EMBED, {"model": "e", "input": texts})
    assert (status, [row["embedding"] for row in body["data"]]) == (200, [vector(text, 4) for text in texts])
    assert len(unaware.fake.read) == 8


async def test_an_answer_is_not_kept_for_another_version(unaware: Stack) -> None:
    """What a newer version answered is not found under the old one's key once that is back; its own key has it."""
    body = {"model": "e", "input": "uno"}
    reload(unaware.fake, "2", e={"dim": "4"})
    seen = [await unaware.post(EMBED, body) for _ in range(3)]
    assert [answer[2]["x-cache"] for answer in seen] == ["miss", "miss", "hit"]
    reload(unaware.fake, "1", e={"dim": "8"})
    await unaware.post(EMBED, {"model": "e", "input": "tells the gateway"})
    status, answer, headers = await unaware.post(EMBED, body)
    assert (status, headers["x-cache"], len(answer["data"][0]["embedding"])) == (200, "miss", 8)


async def test_a_reload_while_no_heartbeat_fits_in_the_queue(unaware: Stack) -> None:
    """What the new version answers is taken all the same: its facts are read from Triton, not from its full queue."""
    reload(unaware.fake, "2", e={"dim": "4"})
    unaware.fake.beat_error = "Exceeds maximum queue size"
    status, body, _ = await unaware.post(EMBED, {"model": "e", "input": "uno"})
    assert (status, body["data"][0]["embedding"]) == (200, vector("uno", 4))


async def test_a_model_that_changes_with_every_part(unaware: Stack) -> None:
    """It is asked twice, and its client told to come back."""
    versions = iter(range(2, 99))
    unaware.fake.broken_encoder = lambda outputs: reload(unaware.fake, str(next(versions)))
    status, body, _ = await unaware.post(EMBED, {"model": "e", "input": ["a"] * 200})
    assert (status, body["error"]["code"]) == (503, "model_unavailable")
    assert len(unaware.fake.read) == 8
