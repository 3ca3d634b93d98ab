"""OpenAI's API on a real socket: bodies, streams, refusals, failures and hang-ups."""

from __future__ import annotations

import asyncio
import json
import math
import time
from typing import Any

import pytest

from orchestrator.api.openai_request import IGNORED, NEUTRAL_CHAT, NEUTRAL_COMPLETION
from tests.clock import awake

from ..conftest import Stack, serving, until
from ..fake_triton import FakeTriton, event, failure

PLAIN: dict[str, Any] = {"model": "m", "prompt": "Hola"}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hola"}]}
BOTH = [("/v1/completions", PLAIN), ("/v1/chat/completions", CHAT)]


def sampling(stack: Stack) -> dict[str, Any]:
    return dict(json.loads(stack.fake.requests[-1]["sampling_parameters"]))


async def test_completion(stack: Stack) -> None:
    """A completion has OpenAI's whole shape, with usage and the request's id."""
    status, body, headers = await stack.post("/v1/completions", PLAIN, **{"x-request-id": "abc-1"})
    assert status == 200
    assert body.pop("id").startswith("cmpl-")
    assert abs(body.pop("created") - time.time()) < 5
    assert body == {
        "object": "text_completion",
        "model": "m",
        "choices": [{"index": 0, "text": "Hola, ¿qué tal?", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
    }
    assert headers["x-request-id"] == "abc-1"
    assert stack.records[0].id == "abc-1"


async def test_chat_completion(stack: Stack) -> None:
    """A chat completion has OpenAI's whole shape and a length finish reason where the answer was cut."""
    stack.fake.script = [event("Hola"), event("!", "length"), "end"]
    _, body, _ = await stack.post("/v1/chat/completions", CHAT)
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hola!", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    assert body["usage"]["total_tokens"] == 5


@pytest.mark.parametrize(("path", "body"), BOTH)
@pytest.mark.parametrize("usage", [False, True])
async def test_streams(stack: Stack, path: str, body: dict[str, Any], usage: bool) -> None:
    """A stream joins to the answer, ends with [DONE], and mentions usage exactly when it was asked to."""
    options = {"stream_options": {"include_usage": True}} if usage else {}
    *events, done = await stack.events(path, {**body, "stream": True, **options})
    assert done == "[DONE]"
    chunks = [json.loads(data) for data in events]
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks}) == 1
    if usage:
        last = chunks.pop()
        assert last["choices"] == []
        assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
        assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    else:
        assert not any("usage" in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    if path == "/v1/completions":
        assert "".join(choice["text"] for choice in choices) == "Hola, ¿qué tal?"
    else:
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in choices) == "Hola, ¿qué tal?"
        assert choices[-1]["delta"] == {}


async def test_chunks_are_not_held_back(stack: Stack) -> None:
    """The first chunk is on the wire while the model still generates the second."""
    stack.fake.script = [event("a"), 0.4, event("b", "stop"), "end"]
    began = awake()
    async with stack.http.post(stack.url + "/v1/completions", json={**PLAIN, "stream": True}) as response:
        assert b'"text":"a"' in await response.content.readline()
        assert awake() - began < 0.3
        assert b"[DONE]" in await response.content.read()


async def test_defaults_and_parameters_reach_the_model(stack: Stack) -> None:
    """The profile's temperature and token default apply where the request is silent, else the request's values."""
    await stack.post("/v1/completions", PLAIN)
    assert sampling(stack) == {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "max_tokens": 50, "timeout_s": 600.0}
    values = {"temperature": 0, "top_p": 0.9, "top_k": -1, "seed": 5, "max_tokens": 8, "stop": ["a", "b"]}
    await stack.post("/v1/completions", {**PLAIN, **values})
    assert sampling(stack) == {**values, "temperature": 0.0, "top_k": 0, "timeout_s": 600.0}
    await stack.post("/v1/chat/completions", {**CHAT, "max_completion_tokens": 9, "stop": "x", "seed": None})
    got = sampling(stack)
    assert (got["max_tokens"], got["stop"], "seed" in got) == (9, ["x"], False)


@pytest.mark.parametrize(
    ("prompt", "text", "ids"),
    [("Hola", "Hola", None), (["Hola"], "Hola", None), ([1, 2, 3], "", [1, 2, 3]), ([[4, 5]], "", [4, 5])],
)
async def test_prompt_forms(stack: Stack, prompt: object, text: str, ids: list[int] | None) -> None:
    """A prompt may be a text, a list of one text, a token list or a list of one token list."""
    status, _, _ = await stack.post("/v1/completions", {**PLAIN, "prompt": prompt})
    assert status == 200
    assert stack.fake.requests[-1]["text_input"] == text
    assert sampling(stack).get("prompt_token_ids") == ids


async def test_message_forms(stack: Stack) -> None:
    """Text parts are joined, developer is system, and an assistant's turn may come back as the client got it."""
    turns = [
        {"role": "developer", "content": "Sé breve."},
        {"role": "user", "content": [{"type": "text", "text": "Ho"}, {"type": "text", "text": "la"}], "name": "ana"},
        {"role": "assistant", "content": "Sí", "refusal": None, "tool_calls": None, "annotations": []},
    ]
    status, _, _ = await stack.post("/v1/chat/completions", {"model": "m", "messages": turns})
    assert status == 200
    assert sampling(stack)["messages"] == [
        {"role": "system", "content": "Sé breve."},
        {"role": "user", "content": "Hola"},
        {"role": "assistant", "content": "Sí"},
    ]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model"),
    ({"model": 3}, "model"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"seed": 2**63}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.0}, "max_tokens"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"include_obfuscation": {}}}, "stream_options.include_obfuscation"),
    ({"stream": True, "stream_options": {"inclde": 1}}, "stream_options.inclde"),
    ({"n": 17}, "n"),
    ({"n": 0}, "n"),
    ({"n": True}, "n"),
    ({"n": "1"}, "n"),
    ({"logprobs": "yes"}, "logprobs"),
    ({"logit_bias": {"5": 100.5}}, "logit_bias.5"),
    ({"logit_bias": {"05": 1}}, "logit_bias"),
    ({"logit_bias": {"-5": 1}}, "logit_bias"),
    ({"logit_bias": {str(2**31): 1}}, "logit_bias"),
    ({"logit_bias": {str(id): 1 for id in range(301)}}, "logit_bias"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": True}, "repetition_penalty"),
    ({"typical_p": 1.5}, "typical_p"),
    ({"min_p": 2}, "min_p"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
    ({"stop_token_ids": ["1"]}, "stop_token_ids"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"priority": 1001}, "priority"),
    ({"temprature": 1}, "temprature"),
]
REFUSED_COMPLETION: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": ["a", [1]]}, "prompt"),
    ({"prompt": ["a", None]}, "prompt"),
    ({"prompt": ["a"] * 65}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt[1]"),
    ({"prompt": [[1], []]}, "prompt[1]"),
    ({"prompt": [[1], [2], [-1]]}, "prompt[2]"),
    ({"prompt": ["a"] * 33, "n": 2}, "n"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"best_of": 17}, "best_of"),
    ({"best_of": 2, "n": 3}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"echo": "yes"}, "echo"),
    ({"echo": True, "logprobs": 0}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"messages": []}, "messages"),
]
REFUSED_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hola"}, "messages"),
    ({"messages": ["Hola"]}, "messages[0]"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": "x", "color": 1}]}, "messages[0].color"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"best_of": 2}, "best_of"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"prompt": "x"}, "prompt"),
]


async def test_every_refusal_names_its_parameter(stack: Stack) -> None:
    """What is wrong or not supported is a 400 that names the parameter, in both languages, before any model."""
    cases = [
        (path, {**body, **change}, param)
        for (path, body), own in zip(BOTH, (REFUSED_COMPLETION, REFUSED_CHAT), strict=True)
        for change, param in [*REFUSED, *own]
    ]
    for path, body, param in cases:
        status, answer, _ = await stack.post(path, body)
        assert (status, answer["error"]["param"]) == (400, param), (path, body)
        assert answer["error"]["type"] == "invalid_request_error"
        assert param in answer["error"]["message"]
        _, spanish, _ = await stack.post(path, body, **{"accept-language": "es"})
        assert spanish["error"]["message"] != answer["error"]["message"], param
    assert stack.fake.requests == []
    assert stack.records == [], "what cannot be parsed is not a request of the gateway"


@pytest.mark.parametrize(("path", "body"), BOTH)
async def test_parameters_that_ask_for_nothing_are_taken(stack: Stack, path: str, body: dict[str, Any]) -> None:
    """Neutral values, nulls and the ignored parameters do not fail a request."""
    neutral = NEUTRAL_COMPLETION if path == "/v1/completions" else NEUTRAL_CHAT
    harmless = {name: values[-1] if values else None for name, values in neutral.items()}
    extra = {**dict.fromkeys(IGNORED, "x"), **harmless, "top_k": None, "stream_options": None}
    status, answer, _ = await stack.post(path, {**body, **extra})
    assert status == 200, answer


async def test_near_misses_are_suggested(stack: Stack) -> None:
    """An unknown parameter comes with the name that was probably meant."""
    _, answer, _ = await stack.post("/v1/completions", {**PLAIN, "max_token": 3})
    assert answer["error"]["message"] == "Unknown parameter: 'max_token'. Did you mean 'max_tokens'?"


async def test_chat_without_a_template(fake: FakeTriton) -> None:
    """A model whose entry has no chat template refuses chat and still completes."""
    fake.parameters["chat"] = "false"
    async with serving(fake) as stack:
        status, answer, _ = await stack.post("/v1/chat/completions", CHAT)
        assert (status, answer["error"]["param"]) == (400, "messages")
        assert "no chat template" in answer["error"]["message"]
        assert (await stack.post("/v1/completions", PLAIN))[0] == 200


async def test_models(stack: Stack) -> None:
    """The list and one model have OpenAI's shape; an unknown one is 404 with its code."""
    status, body, _ = await stack.get("/v1/models")
    assert (status, body["object"]) == (200, "list")
    (model,) = body["data"]
    assert {"id": "m", "object": "model", "owned_by": "truthgpt"}.items() <= model.items()
    assert isinstance(model["created"], int)
    assert (await stack.get("/v1/models/m"))[1] == model
    status, body, _ = await stack.get("/v1/models/ghost")
    assert (status, body["error"]["code"], body["error"]["param"]) == (404, "model_not_found", "model")
    assert (await stack.post("/v1/completions", {**PLAIN, "model": "../x"}))[0] == 404


@pytest.mark.parametrize(
    ("message", "status", "code"),
    [
        ("resource_exhausted: full", 503, "queue_full"),
        ("deadline_exceeded: late", 504, "deadline_exceeded"),
        ("unavailable: stopping", 503, "model_unavailable"),
        ("internal: the secret detail", 500, "upstream_error"),
        ("invalid_argument: the prompt has 70 tokens", 400, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_the_first_chunk_have_a_status(
    stack: Stack, message: str, status: int, code: str | None, stream: bool
) -> None:
    """An upstream error before any text has its own status, Retry-After where it helps, and no internal detail."""
    stack.fake.script = [event(), failure(message), "end"]
    got, body, headers = await stack.post("/v1/completions", {**PLAIN, "stream": stream})
    assert (got, body["error"]["code"]) == (status, code)
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (int(headers.get("retry-after", 0)) >= 1) == (status in (429, 503))
    assert "secret" not in json.dumps(body)
    assert stack.records[0].outcome == "error"


@pytest.mark.parametrize(("path", "body"), BOTH)
@pytest.mark.parametrize(
    ("tail", "code"), [([failure("internal: NaN"), "end"], "upstream_error"), (["close"], "model_unavailable")]
)
async def test_errors_inside_a_stream(
    stack: Stack, path: str, body: dict[str, Any], tail: list[Any], code: str
) -> None:
    """After the first chunk a failure is an error event, there is no [DONE], and the record says error."""
    stack.fake.script = [event("a"), *tail]
    *_, last = await stack.events(path, {**body, "stream": True})
    assert json.loads(last)["error"]["code"] == code
    assert (stack.records[0].outcome, stack.records[0].completion_tokens) == ("error", 1)
    status, whole, _ = await stack.post(path, body)
    assert (status in (500, 503), whole["error"]["code"]) == (True, code), "unstreamed, a cut answer is no answer"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [[math.inf], [event("a"), math.inf]])
async def test_hanging_up_cancels_upstream_at_once(fake: FakeTriton, stream: bool, script: list[Any]) -> None:
    """A client that leaves, streaming or not, before or after the first chunk, frees the slot well within a second."""
    fake.script = script
    async with serving(fake, stall_s=20.0) as stack:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(stack.url.rpartition(":")[2]))
        body = json.dumps({**PLAIN, "stream": stream}).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await until(lambda: fake.running == 1)
        if stream and len(script) > 1:
            await reader.readuntil(b'"text":"a"')
        writer.close()
        assert await until(lambda: fake.hang_ups == 1) < 0.3
        await until(lambda: len(stack.records) == 1)
        assert stack.records[0].outcome == "cancelled"
        assert stack.gateway.in_flight == 0
        fake.script = [event("b", "stop"), "end"]
        assert (await stack.post("/v1/completions", PLAIN))[0] == 200


async def test_streams_end_when_their_model_dies(fake: FakeTriton) -> None:
    """A stub that dies mid-stream ends its streams by the heartbeat, long before the stall deadline."""
    fake.script = [event("a"), math.inf]
    async with serving(fake, stall_s=20.0) as stack:
        reading = asyncio.create_task(stack.events("/v1/completions", {**PLAIN, "stream": True}))
        await until(lambda: fake.running == 1)
        await asyncio.sleep(0.05)
        began = awake()
        fake.beat_error = "Stub process 'm' is not healthy."
        *_, last = await reading
        assert awake() - began < 0.5
        assert json.loads(last)["error"]["code"] == "model_unavailable"
        status, _, headers = await stack.post("/v1/completions", PLAIN)
        assert (status, headers["retry-after"]) == (503, "2")


async def test_a_client_that_does_not_read_is_let_go(fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that stops reading its stream cannot hold a slot past the request's deadline."""
    monkeypatch.setattr("orchestrator.api.openai.SLOW_READER_S", 0.2)
    fake.script = [event("x" * 200_000)] * 200 + [event("", "stop"), "end"]
    async with serving(fake, request_timeout_s=0.5, first_token_s=0.5, max_output_chars=100_000_000) as stack:
        _, writer = await asyncio.open_connection("127.0.0.1", int(stack.url.rpartition(":")[2]), limit=1024)
        body = json.dumps({**PLAIN, "stream": True}).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await until(lambda: len(stack.records) == 1)
        assert (stack.records[0].outcome, stack.gateway.in_flight) == ("cancelled", 0)
        writer.close()


async def test_concurrent_streams_do_not_mix(stack: Stack) -> None:
    """Sixty-four streams at once each get their own answer."""

    async def one(index: int) -> None:
        *events, done = await stack.events("/v1/completions", {**PLAIN, "prompt": f"p{index}", "stream": True})
        text = "".join(json.loads(data)["choices"][0]["text"] for data in events)
        assert (text, done) == ("Hola, ¿qué tal?", "[DONE]")

    await asyncio.gather(*(one(index) for index in range(64)))
    assert {sent["text_input"] for sent in stack.fake.requests} == {f"p{index}" for index in range(64)}
    assert len({record.id for record in stack.records}) == 64


async def test_cache_control_and_task_of_a_request(stack: Stack) -> None:
    """An unknown task is 400 by its header's name; without Redis nothing is cached, and that is said."""
    status, body, _ = await stack.post("/v1/completions", PLAIN, **{"x-truthgpt-task": "dancing"})
    assert (status, body["error"]["param"]) == (400, "X-TruthGPT-Task")
    status, _, headers = await stack.post("/v1/completions", PLAIN, **{"x-truthgpt-task": "translation"})
    assert (status, headers["x-cache"]) == (200, "bypass")
    assert stack.records[-1].task == "translation"
