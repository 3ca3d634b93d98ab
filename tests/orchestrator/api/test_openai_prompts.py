"""Several prompts in one completion: order, interleaving, the bound, and one end for all of them."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest

from ..conftest import serving, until
from ..fake_triton import FakeTriton, Step, answer, event, failure

PATH = "/v1/completions"


def asking(*prompts: object, **more: object) -> dict[str, Any]:
    return {"model": "m", "prompt": list(prompts), **more}


async def test_choices_are_in_order_and_usage_is_summed(fake: FakeTriton) -> None:
    """Whoever ends first, choice i answers prompt i; every prompt has its own upstream request and record."""
    fake.by_text = {
        "a": [0.3, event("A1"), event("A2", "length"), "end"],
        "b": [event("B", "stop", prompt_tokens=5), "end"],
        "c": [0.1, *answer("C1", "C2", "C3")],
    }
    async with serving(fake, max_batch_size=3) as stack:
        status, body, headers = await stack.post(PATH, asking("a", "b", "c"), **{"x-request-id": "abc"})
        assert (status, headers["x-request-id"]) == (200, "abc")
        assert body["choices"] == [
            {"index": 0, "text": "A1A2", "logprobs": None, "finish_reason": "length"},
            {"index": 1, "text": "B", "logprobs": None, "finish_reason": "stop"},
            {"index": 2, "text": "C1C2C3", "logprobs": None, "finish_reason": "stop"},
        ]
        assert body["usage"] == {"prompt_tokens": 11, "completion_tokens": 6, "total_tokens": 17}
        assert {sent["id"]: sent["text_input"] for sent in fake.requests} == {"abc-0": "a", "abc-1": "b", "abc-2": "c"}
        assert [(record.id, record.outcome) for record in stack.records] == [
            ("abc-1", "ok"), ("abc-2", "ok"), ("abc-0", "ok"),
        ]  # fmt: skip


async def test_token_lists_and_lists_of_one(fake: FakeTriton) -> None:
    """Token lists go as they are with the same sampling; a list of one is a single request under its own id."""
    async with serving(fake) as stack:
        status, body, _ = await stack.post(PATH, asking([1, 2], [3], seed=7), **{"x-request-id": "abc"})
        assert (status, len(body["choices"])) == (200, 2)
        sent = [json.loads(one["sampling_parameters"]) for one in fake.requests]
        assert [(one["prompt_token_ids"], one["seed"]) for one in sent] == [([1, 2], 7), ([3], 7)]
        assert [one["text_input"] for one in fake.requests] == ["", ""]
        await stack.post(PATH, asking([4]), **{"x-request-id": "alone"})
        assert fake.requests[-1]["id"] == "alone"


@pytest.mark.parametrize("usage", [False, True])
async def test_streams_interleave(fake: FakeTriton, usage: bool) -> None:
    """Chunks come as they are made, each with its index; one finish reason a choice, one usage chunk, one [DONE]."""
    fake.by_text = {
        "a": [event("a1"), 0.3, event("a2", "stop"), "end"],
        "b": [event("b1", prompt_tokens=4), 0.3, event("b2"), event("", "length"), "end"],
    }
    options = {"stream_options": {"include_usage": True}} if usage else {}
    async with serving(fake, max_batch_size=2) as stack:
        *events, done = await stack.events(PATH, asking("a", "b", stream=True, **options))
    assert (done, events.count("[DONE]")) == ("[DONE]", 0)
    chunks = [json.loads(data) for data in events]
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    if usage:
        last = chunks.pop()
        assert last["choices"] == []
        assert last["usage"] == {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}
    assert all(("usage" in chunk) == usage for chunk in chunks)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert len(choices) == len(chunks)
    assert {choice["index"] for choice in choices[:2]} == {0, 1}, "neither waits for the other's end"
    for index, (text, reason) in enumerate([("a1a2", "stop"), ("b1b2", "length")]):
        own = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["text"] for choice in own) == text
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + [reason]


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_parallelism_is_bounded(fake: FakeTriton, at_once: int, stream: bool) -> None:
    """Never more upstream streams than max_batch_size, and as many as that while prompts wait."""
    prompts = [f"p{index}" for index in range(8)]
    fake.by_text = {prompt: [event(prompt), 0.05, event("!", "stop"), "end"] for prompt in prompts}
    async with serving(fake, max_batch_size=at_once) as stack:
        if stream:
            texts = dict.fromkeys(range(8), "")
            for data in (await stack.events(PATH, asking(*prompts, stream=True)))[:-1]:
                (choice,) = json.loads(data)["choices"]
                texts[choice["index"]] += choice["text"]
            assert list(texts.values()) == [f"{prompt}!" for prompt in prompts]
        else:
            _, body, _ = await stack.post(PATH, asking(*prompts))
            assert [choice["text"] for choice in body["choices"]] == [f"{prompt}!" for prompt in prompts]
        assert fake.most_running == at_once
        assert len(fake.requests) == 8
        assert {record.outcome for record in stack.records} == {"ok"}
        assert stack.gateway.in_flight == 0


async def test_a_slow_prompt_holds_up_one_place_only(fake: FakeTriton) -> None:
    """Whichever place is free takes the next prompt: nothing waits for the slowest of its group."""
    fake.by_text = {"slow": [event("s"), 0.5, event("!", "stop"), "end"]}
    async with serving(fake, max_batch_size=2) as stack:
        await stack.post(PATH, asking("slow", "b", "c", "d"), **{"x-request-id": "r"})
        assert [record.id for record in stack.records] == ["r-1", "r-2", "r-3", "r-0"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_byte_has_its_status(fake: FakeTriton, stream: bool) -> None:
    """The first prompt that fails fails the request; those that run are cancelled, those that wait never sent."""
    fake.by_text = {"a": [math.inf], "b": [0.05, failure("resource_exhausted: full"), "end"]}
    async with serving(fake, max_batch_size=2, stall_s=20.0) as stack:
        status, body, headers = await stack.post(PATH, asking("a", "b", "c", stream=stream), **{"x-request-id": "r"})
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "queue_full", "1")
        await until(lambda: fake.running == 0)
        assert fake.hang_ups == 1
        assert {sent["text_input"] for sent in fake.requests} == {"a", "b"}
        assert {(record.id, record.outcome, record.error) for record in stack.records} == {
            ("r-0", "cancelled", None), ("r-1", "error", "overloaded"),
        }  # fmt: skip
        assert stack.gateway.in_flight == 0
        assert (await stack.post(PATH, asking("d", "e")))[0] == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_after_the_first_byte_is_an_event(fake: FakeTriton, stream: bool) -> None:
    """Once a stream has begun, the failure of any prompt is its last event; whole answers still get a status."""
    ends: list[Step] = [event("b"), 0.1, failure("internal: the secret detail"), "end"]
    fake.by_text = {"a": [event("a"), math.inf], "b": ends}
    async with serving(fake, max_batch_size=2, stall_s=20.0) as stack:
        if stream:
            *events, last = await stack.events(PATH, asking("a", "b", "c", stream=True))
            assert [json.loads(data)["choices"][0]["text"] for data in events] in (["a", "b"], ["b", "a"])
        else:
            status, body, _ = await stack.post(PATH, asking("a", "b", "c"))
            assert status == 500
            last = json.dumps(body)
        assert json.loads(last)["error"]["code"] == "upstream_error"
        assert "secret" not in last
        await until(lambda: fake.running == 0)
        assert (fake.hang_ups, len(fake.requests), stack.gateway.in_flight) == (1, 2, 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [[math.inf], [event("a"), math.inf]])
async def test_hanging_up_cancels_all_at_once(fake: FakeTriton, stream: bool, script: list[Step]) -> None:
    """A client that leaves frees every place well within a second, and no prompt that waits is sent."""
    fake.script = script
    async with serving(fake, max_batch_size=3, stall_s=20.0) as stack:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(stack.url.rpartition(":")[2]))
        body = json.dumps(asking("p", "q", "r", "s", stream=stream)).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await until(lambda: fake.running == 3)
        if stream and len(script) > 1:
            await reader.readuntil(b'"text":"a"')
        writer.close()
        assert await until(lambda: fake.hang_ups == 3) < 0.3
        await until(lambda: len(stack.records) == 3)
        assert [record.outcome for record in stack.records] == ["cancelled"] * 3
        assert (stack.gateway.in_flight, len(fake.requests)) == (0, 3)
        await until(lambda: not stack.server.server_state.tasks)


async def test_a_client_that_does_not_read_is_let_go(fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that stops reading holds its places no longer than the request's deadline and a little."""
    monkeypatch.setattr("orchestrator.api.openai.SLOW_READER_S", 0.2)
    fake.script = [event("x" * 200_000)] * 200 + [event("", "stop"), "end"]
    async with serving(
        fake, max_batch_size=2, request_timeout_s=0.5, first_token_s=0.5, max_output_chars=100_000_000
    ) as stack:
        _, writer = await asyncio.open_connection("127.0.0.1", int(stack.url.rpartition(":")[2]), limit=1024)
        body = json.dumps(asking("p", "q", "r", stream=True)).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await until(lambda: len(stack.records) == 2)
        await until(lambda: fake.running == 0)
        assert [record.outcome for record in stack.records] == ["cancelled", "cancelled"]
        assert stack.gateway.in_flight == 0
        writer.close()


async def test_the_deadline_is_the_whole_requests(fake: FakeTriton) -> None:
    """Prompts that wait for their turn do not get a new deadline each: the request as a whole is late."""
    fake.script = [event("a"), 1.3, event("b", "stop"), "end"]
    async with serving(fake, max_batch_size=1, request_timeout_s=2.3, first_token_s=2.3) as stack:
        status, body, _ = await stack.post(PATH, asking("p", "q", "r"))
        assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
        assert [(record.outcome, record.error) for record in stack.records] == [
            ("ok", None), ("error", "deadline_exceeded"),
        ]  # fmt: skip


async def test_at_most_sixty_four_prompts(fake: FakeTriton) -> None:
    """Sixty-four are answered; one more is refused with the limit in the sentence, before any is sent."""
    async with serving(fake, max_batch_size=64) as stack:
        status, body, _ = await stack.post(PATH, asking(*["p"] * 65))
        assert (status, body["error"]["param"], fake.requests) == (400, "prompt", [])
        assert body["error"]["message"] == "prompt: at most 64 prompts a request; there are 65."
        status, body, _ = await stack.post(PATH, asking(*["p"] * 64))
        assert (status, [choice["index"] for choice in body["choices"]]) == (200, list(range(64)))


async def test_every_prompt_passes_admission(fake: FakeTriton) -> None:
    """One request alone never asks for more places than there are; beside others it is refused as they are."""
    fake.script = [event("a"), 0.2, event("b", "stop"), "end"]
    async with serving(fake, max_batch_size=8, max_concurrency=2) as stack:
        assert (await stack.post(PATH, asking("p", "q", "r")))[0] == 200
        assert fake.most_running == 2
        other = asyncio.create_task(stack.post(PATH, {"model": "m", "prompt": "other"}))
        await until(lambda: fake.running == 1)
        status, body, _ = await stack.post(PATH, asking("p", "q"))
        assert (status, body["error"]["code"]) == (503, "gateway_full")
        assert (await other)[0] == 200
        await until(lambda: fake.running == 0)
        assert stack.gateway.in_flight == 0


@pytest.mark.parametrize("prompts", [["bad", "good"], ["good", "bad"]])
async def test_a_fallback_for_any_prompt_marks_the_whole_answer(fake: FakeTriton, prompts: list[str]) -> None:
    """Whichever prompt it stands in for, and whoever is let in last; the records tell them apart."""
    fake.by_text = {"bad": [0.1, "close"], "good": [0.2, *answer("fine")]}
    async with serving(fake, retries=0, fallback_text="Nada.", max_batch_size=2) as stack:
        status, body, headers = await stack.post(PATH, asking(*prompts))
        assert (status, headers["x-truthgpt-fallback"]) == (200, "text")
        assert {choice["text"] for choice in body["choices"]} == {"Nada.", "fine"}
        assert {record.fallback for record in stack.records} == {None, "text"}


async def test_a_fallback_that_headers_no_longer_mark_is_an_error(fake: FakeTriton) -> None:
    """A stream has begun with the model's own answer to one prompt: no unmarked text may stand in for the other."""
    fake.by_text = {"good": [event("fine"), 0.4, event("", "stop"), "end"], "bad": [0.2, "close"]}
    async with serving(fake, retries=0, fallback_text="Nada.", max_batch_size=2) as stack:
        *events, last = await stack.events(PATH, asking("good", "bad", stream=True))
        assert json.loads(last)["error"]["code"] == "model_unavailable"
        assert "Nada." not in "".join(events)


async def test_what_was_changed_in_any_prompt_is_said(fake: FakeTriton) -> None:
    """The header names the changes of all prompts, each once."""
    async with serving(fake, max_batch_size=1) as stack:
        _, _, headers = await stack.post(PATH, asking("a <script>b</script>", "javascript:c d", "plain", "a  b"))
        assert headers["x-truthgpt-sanitized"] == "script, uri, whitespace"
