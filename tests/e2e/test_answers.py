"""Several answers to a request, what stands beside their text, and where they end: through the real Triton's edges."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .stack import Stack, wait_until
from .test_backend import generate, grpc_inputs, grpc_stream, raw_stream  # noqa: F401  (the last but one is a fixture)

COUNTS = {"return_num_input_tokens": True, "return_num_output_tokens": True, "return_num_cached_tokens": True}
WILD = {"temperature": 100, "seed": 5, "max_tokens": 8}  # the counting model's rows are so sure of themselves


def ask(stack: Stack, stream: bool = False, **sampling: object) -> list[dict[str, Any]]:
    """The events of an answer with these parameters, counts and finish reasons among them."""
    body = {"sampling_parameters": json.dumps(sampling), **COUNTS}
    return generate(stack, stream=stream, **body)[1]


def joined(events: list[dict[str, Any]], name: str, number: int) -> Any:
    """The texts, counts or log-probabilities of one answer of several, put together."""
    values = [event[name][number] for event in events]
    if name == "logprobs":
        return [entry for value in values for entry in json.loads(value)]
    return sum(values) if name == "num_output_tokens" else "".join(values)


def test_several_answers_are_each_what_a_request_of_their_own_would_be(stack: Stack):
    """Answer i is made with the seed plus i; in a stream every response has an element an answer."""
    alone = [ask(stack, **{**WILD, "seed": seed})[0]["text_output"] for seed in (5, 6, 7)]
    (whole,) = ask(stack, n=3, **WILD)
    assert whole["text_output"] == alone and len(set(alone)) > 1
    assert whole["finish_reason"] == ["length"] * 3 and whole["num_output_tokens"] == [8] * 3
    assert whole["num_input_tokens"] == 1 and whole["num_cached_tokens"] in (0, 1)
    events = ask(stack, True, n=3, **WILD)
    for number, text in enumerate(alone):
        assert joined(events, "text_output", number) == text
        assert joined(events, "finish_reason", number) == "length" and joined(events, "num_output_tokens", number) == 8
    assert max(event["num_input_tokens"] for event in events) == 1


def test_of_best_of_answers_the_likeliest_are_returned(stack: Stack):
    """The best n of them, best first, by the mean log-probability of their tokens; that cannot be streamed."""
    (every,) = ask(stack, n=4, logprobs=0, **WILD)
    means = [sum(e["logprob"] for e in json.loads(of_one)) / 8 for of_one in every["logprobs"]]
    best = sorted(range(4), key=lambda i: -means[i])[:2]
    (chosen,) = ask(stack, n=2, best_of=4, **WILD)
    assert chosen["text_output"] == [every["text_output"][i] for i in best] and "logprobs" not in chosen
    assert ask(stack, True, n=2, best_of=4, **WILD)[0]["error"].startswith("invalid_argument: best_of")
    assert ask(stack, n=17)[0]["error"].startswith("invalid_argument: n ")


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_stand_beside_the_tokens_that_are_counted(stack: Stack, stream):
    """An entry a token, its text as it stands in the answer; the likeliest first, and the same streamed or not."""
    events = ask(stack, stream, logprobs=2, temperature=0, max_tokens=5)
    entries = [entry for event in events for entry in json.loads(event["logprobs"])]
    assert (
        "".join(e["token"] for e in entries) == "".join(e["text_output"] for e in events) == "two three one two three"
    )
    assert [len(json.loads(e["logprobs"])) for e in events] == [e["num_output_tokens"] for e in events]
    for entry in entries:
        assert bytes(entry["bytes"]).decode() == entry["token"] and entry["logprob"] <= 0
        assert entry["top"][0] == {key: entry[key] for key in ("id", "token", "bytes", "logprob")}
        assert len(entry["top"]) == 2 and entry["top"][1]["logprob"] == pytest.approx(entry["logprob"] - 50, abs=0.1)


def test_log_probabilities_can_be_asked_for_as_an_output(stack: Stack):
    """return_logprobs alone means those of the chosen tokens."""
    (event,) = generate(stack, max_tokens=1, temperature=0, return_logprobs=True)[1]
    assert json.loads(event["logprobs"])[0]["top"] == [] and json.loads(event["logprobs"])[0]["id"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_token_ends_the_answer_once_enough_tokens_are_there(stack: Stack, stream):
    """It is counted and not shown; before min_tokens the next likeliest stands in its place."""
    ends = {"stop_token_ids": [0], "temperature": 0, "max_tokens": 9}
    for more, text, count in (({}, "two three", 3), ({"min_tokens": 4}, "two three two three", 5)):
        events = ask(stack, stream, **ends, **more)
        assert "".join(e["text_output"] for e in events) == text and events[-1]["finish_reason"] == "stop"
        assert sum(e["num_output_tokens"] for e in events) == count
    assert "stop_token_ids has 3" in ask(stack, stop_token_ids=[3])[0]["error"]
    assert "min_tokens" in ask(stack, min_tokens=5000)[0]["error"]


def test_stop_strings_are_not_looked_for_before_min_tokens(stack: Stack):
    """One that is complete with the third token is text while at least four are asked for."""
    ends = {"stop": ["one"], "temperature": 0, "max_tokens": 9}
    assert ask(stack, **ends)[0]["text_output"] == "two three "
    (event,) = ask(stack, **ends, min_tokens=4)
    assert event["text_output"] == "two three one two three " and event["num_output_tokens"] == 6


@pytest.mark.parametrize("prompt", ["text", "messages", "tokens"])
def test_the_prompt_is_echoed_however_it_was_given(stack: Stack, prompt):
    """Every answer begins with the prompt's text: as it was sent, else as the tokenizer decodes it."""
    given = {
        "text": {},
        "messages": {"messages": [{"role": "user", "content": "three one"}]},
        "tokens": {"prompt_token_ids": [2, 0]},
    }[prompt]
    for stream in (False, True):
        body = {"temperature": 0, "max_tokens": 2, "n": 2, **given}
        _, events = generate(
            stack, stream, text_input="three one" if prompt == "text" else "",
            exclude_input_in_output=False, sampling_parameters=json.dumps(body),
        )  # fmt: skip
        assert [joined(events, "text_output", number) for number in (0, 1)] == ["three onetwo three"] * 2


def test_tritonclient_grpc_gets_an_element_an_answer(stack: Stack, grpc_stream):  # noqa: F811  (the fixture)
    """Over ModelStreamInfer the tensors of every response have as many elements as there are answers."""
    client, got, ended = grpc_stream
    inputs = grpc_inputs(b"one", n=2, logprobs=1, temperature=0, max_tokens=4)
    client.async_stream_infer(stack.model, inputs, enable_empty_final_response=True)
    assert ended.wait(10)
    texts, logprobs = ([r.as_numpy(name) for r in got] for name in ("text_output", "logprobs"))
    texts, logprobs = ([t for t in tensors if t is not None] for tensors in (texts, logprobs))
    assert all(t.shape == (2,) for t in (*texts, *logprobs))
    for number in (0, 1):
        assert b"".join(t[number] for t in texts) == b"two three one two"
        assert [e["id"] for t in logprobs for e in json.loads(t[number])] == [1, 2, 0, 1]


def test_a_client_that_hangs_up_frees_the_slots_of_all_its_answers(stack: Stack):
    """Running and queued ones alike, within a second."""
    client = raw_stream(stack, n=6)
    wait_until(lambda: (stack.load()["running"], stack.load()["waiting"]) == (4, 2), 5, "four run and two wait")
    client.close()
    wait_until(lambda: stack.load()["running"] + stack.load()["waiting"] == 0, 1.0, "all places are free")


def test_a_deadline_ends_all_answers_with_one_error(stack: Stack):
    """The client gets deadline_exceeded, and no answer goes on."""
    status, events = generate(stack, n=6, max_tokens=1500, timeout_s=0.3)
    assert len(events) == 1 and events[0]["error"].startswith("deadline_exceeded: ")
    wait_until(lambda: stack.load()["running"] + stack.load()["waiting"] == 0, 1.0, "all places are free")
