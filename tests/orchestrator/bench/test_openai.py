"""OpenAI's dialect: what is sent, and how answers are read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.bench import openai
from orchestrator.bench.answers import Answer, Fault
from orchestrator.bench.plan import Prompt, Target

from .servers import ROLE, chat, chats, delta, event, load, usage

URL = "http://127.0.0.1:8080"


def read(*parts: bytes, target: Target | None = None, kind: str = "text/event-stream", asked: int = 8) -> Answer:
    """An answer whose parts come at 1, 2, 3 … seconds and whose end comes a second after the last."""
    answer = Answer(asked)
    reader = openai.reader(target or chats(URL), answer)
    reader.head(200, kind, "")
    for at, part in enumerate(parts, 1):
        reader.body(part, float(at))
    reader.end(float(len(parts) + 1))
    return answer


def fault(*parts: bytes, **more: Any) -> str:
    with pytest.raises(Fault) as caught:
        read(*parts, **more)
    return caught.value.kind


def test_what_is_sent() -> None:
    """The model, the prompt, the bounds, usage in the stream; an extra null takes a field away."""
    given = load(ignore_eos=True, extra_body={"top_k": 1, "temperature": None})
    sent = json.loads(openai.body(chats(URL), given, Prompt("hello"), 8))
    assert sent == {
        "model": "demo", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "stream": True,
        "stream_options": {"include_usage": True}, "ignore_eos": True, "top_k": 1,
    }  # fmt: skip
    turns = Prompt(turns=(("system", "be brief"), ("user", "hi")))
    assert json.loads(openai.body(chats(URL), load(), turns, 8))["messages"][0] == {
        "role": "system", "content": "be brief"
    }  # fmt: skip
    bare = json.loads(openai.body(chats(URL, endpoint="completions", stream=False), load(), Prompt("hello"), 8))
    assert bare == {"model": "demo", "prompt": "hello", "max_tokens": 8, "temperature": 0.0, "stream": False}
    encoder = chats(URL, endpoint="embeddings", task="encode")
    assert json.loads(openai.body(encoder, load(extra_body={"user": None}), Prompt("hello"), 8)) == {
        "model": "demo", "input": "hello"
    }  # fmt: skip


def test_the_first_token_is_the_first_text_and_the_last_is_not_the_usage() -> None:
    """Neither the role's chunk, an empty one, the finish reason nor the trailing usage is a token."""
    parts = [ROLE, delta(""), delta("one"), delta(" two"), delta(finish="stop"), usage(2)]
    answer = read(*(event(part) for part in parts), event(b"[DONE]"))
    assert (answer.first, answer.last, answer.tokens, answer.prompt_tokens) == (3.0, 4.0, 2, 4)
    assert answer.gaps == [(1.0, 1.0)]


@pytest.mark.parametrize(
    "first",
    [
        {"reasoning_content": "hm"}, {"reasoning": "hm"}, {"tool_calls": [{"index": 0}]}, {"refusal": "no"},
    ],
)  # fmt: skip
def test_what_was_generated_is_a_token_wherever_it_stands(first: dict[str, Any]) -> None:
    """Models that think or call tools generate as well."""
    thought = {"choices": [{"delta": first, "finish_reason": None}]}
    answer = read(event(ROLE), event(thought), event(delta("x", "stop")))
    assert answer.first == 2.0 and answer.tokens == 2


def test_usage_in_every_chunk_is_taken_as_it_grows() -> None:
    """Servers with continuous usage count in each chunk; the last count holds."""
    told = [delta(str(n), usage={"completion_tokens": n, "prompt_tokens": 7}) for n in (1, 2, 3)]
    answer = read(*(event(part) for part in told), event(delta(finish="length")))
    assert answer.tokens == 3 and answer.prompt_tokens == 7


def test_without_usage_pieces_are_counted() -> None:
    """And it is known that nobody counted."""
    answer = read(event(delta("a")), event(delta("b", "stop")), event(b"[DONE]"))
    assert answer.tokens == 2 and answer.counted is None


@given(st.lists(st.integers(1, 60), max_size=30), st.sampled_from([b"\n", b"\r\n"]))
def test_bytes_may_be_split_anywhere(sizes: list[int], line: bytes) -> None:
    """The same answer comes of them, with either end of a line and with comments in between."""
    data = (b": keep-alive\n\n" + chat("uno", " dós", " tres")).replace(b"\n", line)
    parts, at = [], 0
    for size in sizes:
        parts.append(data[at : at + size])
        at += size
    answer = read(*parts, data[at:])
    assert answer.tokens == answer.counted == answer.pieces == 3


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ([event(delta("one"))], "no_end"), ([], "no_end"), ([b"data: [DO"], "no_end"),
        ([event(b"[DONE]")], "no_tokens"), ([event(ROLE), event(delta(finish="stop")), event(b"[DONE]")], "no_tokens"),
        ([event(delta("a")), event({"error": {"message": "boom"}})], "in_band"),
        ([event(delta("a")), event({"error": "boom"}), event(b"[DONE]")], "in_band"),
        ([event(delta("a", "error"))], "in_band"), ([event(b"{garbage")], "nonsense"), ([event([1])], "nonsense"),
        ([event({"object": "x"})], "nonsense"), ([event({"choices": [3]})], "nonsense"),
        ([event({"choices": "a"})], "nonsense"), ([event(delta("a")), event(usage("many"))], "wrong_usage"),
        ([event(delta("a")), event(usage(9))], "wrong_usage"), ([event(delta("a", "stop")), event(usage(0))],
         "wrong_usage"), ([event({"choices": [], "usage": [1]})], "wrong_usage"),
        ([event(delta("a")), event(usage(1, -4))], "wrong_usage"), ([b"x" * 2_000_000], "too_large"),
        ([event(delta("a")), *[event(delta("a")) * 500] * 10], "endless"),
    ],
)  # fmt: skip
def test_a_bad_stream_is_no_answer(parts: list[bytes], kind: str) -> None:
    """Each way to fail inside a 200 has its kind."""
    assert fault(*parts) == kind


def test_what_follows_done_is_not_read() -> None:
    """[DONE] ends the stream for every client."""
    assert read(event(delta("a")), event(b" [DONE] "), event(b"{garbage"), event({"error": "x"})).tokens == 1


def test_an_answer_in_one_piece() -> None:
    """Its text, its usage and its finish reason; without one of them it is none."""
    target = chats(URL, stream=False)
    choice = {"message": {"content": "one two"}, "finish_reason": "stop"}
    whole = json.dumps({**usage(2), "choices": [choice]}).encode()
    answer = read(whole[:20], whole[20:], target=target, kind="application/json")
    assert answer.tokens == 2 and answer.first == answer.last == 3.0
    for wrong, kind in (
        ({"choices": []}, "nonsense"), ({"choices": [{**choice, "finish_reason": None}]}, "no_end"),
        ({"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]}, "no_tokens"),
        ({"error": {"message": "x"}}, "in_band"), ({"choices": [{"message": 3, "finish_reason": "stop"}]}, "no_tokens"),
    ):  # fmt: skip
        assert fault(json.dumps(wrong).encode(), target=target, kind="application/json") == kind
    assert fault(whole[:-5], target=target, kind="application/json") == "nonsense"


def test_embeddings() -> None:
    """An embedding of numbers or base64 is one; an empty list is none. They have no output tokens."""
    target = chats(URL, endpoint="embeddings", task="encode")

    def found(row: object) -> bytes:
        return json.dumps({"data": row, "usage": {"prompt_tokens": 5}}).encode()

    for good in ([0.1, 0.2], "zczMPQ=="):
        answer = read(found([{"embedding": good}]), target=target, kind="application/json", asked=0)
        assert answer.prompt_tokens == 5 and answer.tokens == 0 and answer.first == 2.0
    none: tuple[object, ...] = ([], [{"embedding": []}], [3], "x", None, [{"index": 0}])
    for bad in none:
        assert fault(found(bad), target=target, kind="application/json", asked=0) == "no_tokens"
