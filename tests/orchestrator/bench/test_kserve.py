"""KServe's dialect: what is sent, and how answers are read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator.bench import kserve
from orchestrator.bench.answers import Answer, Fault
from orchestrator.bench.plan import Prompt, Target

from .servers import event, load

TARGET = Target("http://127.0.0.1:8000/pre", "kserve-http", "de mo/1")
WHOLE = Target(TARGET.url, "kserve-http", "demo", stream=False)
ENCODER = Target(TARGET.url, "kserve-http", "demo", task="encode")


def response(text: str, tokens: object = None, reason: str = "", prompt: object = 4) -> dict[str, Any]:
    return {"text_output": text, "finish_reason": reason, "num_output_tokens": tokens, "num_input_tokens": prompt}


def read(*parts: bytes, target: Target = TARGET, asked: int = 8) -> Answer:
    """An answer whose parts come at 1, 2, 3 … seconds."""
    answer = Answer(asked)
    reader = kserve.reader(target, answer)
    reader.head(200, "text/event-stream" if target.streams else "application/json", "")
    for at, part in enumerate(parts, 1):
        reader.body(part, float(at))
    reader.end(float(len(parts) + 1))
    return answer


def test_what_is_sent() -> None:
    """The vLLM backend's names; a name with a slash stays one part of the path."""
    assert kserve.path(TARGET) == "/pre/v2/models/de%20mo%2F1/generate_stream"
    assert kserve.path(WHOLE).endswith("/generate") and kserve.path(ENCODER).endswith("/infer")
    sent = json.loads(kserve.body(TARGET, load(extra_body={"top_k": 1}, ignore_eos=True), Prompt("hi"), 8))
    assert json.loads(sent.pop("sampling_parameters")) == {
        "max_tokens": 8, "temperature": 0.0, "ignore_eos": True, "top_k": 1
    }  # fmt: skip
    assert sent == {"text_input": "hi", "stream": True, **dict.fromkeys(kserve.FLAGS, True)}
    turns = json.loads(kserve.sampling(load(), Prompt(turns=(("user", "hi"),)), 8))
    assert turns["messages"] == [{"role": "user", "content": "hi"}]
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": ["hi"]}
    assert json.loads(kserve.body(ENCODER, load(), Prompt("hi"), 8)) == {"inputs": [tensor]}


def test_tokens_without_text_come_with_the_text_after_them() -> None:
    """Half a character is a token that shows nothing yet: it is counted where its text appears."""
    parts = [response("a", 1), response("", 2), response("é", 1), response("", 0, "stop")]
    answer = read(*(event(part) for part in parts))
    assert answer.tokens == 4 and answer.gaps == [(2.0, 3)] and answer.first == 1.0


def test_a_scalar_may_be_a_list_of_one() -> None:
    """Triton writes both."""
    listed = {name: [value] for name, value in response("a", 1, "stop").items()}
    assert read(event(listed)).prompt_tokens == 4


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ([], "no_end"), ([event(response("a", 1))], "no_end"), ([event(response("", 0, "stop"))], "no_tokens"),
        ([event(response("a", 1)), event({"error": "in flight"})], "in_band"), ([event(b"oops")], "nonsense"),
        ([event({"text": "a"})], "nonsense"), ([event({"text_output": ["a", "b"]})], "nonsense"),
        ([event(response("a", -1))], "wrong_usage"), ([event(response("a", [1, 2]))], "wrong_usage"),
        ([event(response("a", 9))], "wrong_usage"), ([event(response("a", 0, "stop"))], "wrong_usage"),
        ([b"\x00" * 2_000_000], "too_large"), ([event(response("a", 0)) * 2000], "endless"),
    ],
)  # fmt: skip
def test_a_bad_stream_is_no_answer(parts: list[bytes], kind: str) -> None:
    """Each way to fail inside a 200 has its kind; a 200 with an error as well."""
    with pytest.raises(Fault) as caught:
        read(*parts)
    assert caught.value.kind == kind


def test_an_answer_in_one_piece_and_an_error_in_a_200() -> None:
    """`generate` of Triton may say 200 and mean an error: the body decides."""
    assert read(json.dumps(response("one two", 2, "stop")).encode(), target=WHOLE).tokens == 2
    with pytest.raises(Fault, match="no such tensor") as caught:
        read(b'{"error": "no such tensor"}', target=WHOLE)
    assert caught.value.kind == "in_band"


def test_an_encoders_outputs() -> None:
    """Any output with data is an answer; its number of tokens is taken where it is told."""
    outputs = [{"name": "embedding", "data": [0.1]}, {"name": "num_input_tokens", "data": [5]}]
    answer = read(json.dumps({"outputs": outputs}).encode(), target=ENCODER, asked=0)
    assert answer.prompt_tokens == 5 and answer.tokens == 0
    for bad, kind in (
        ({"outputs": []}, "no_tokens"), ({"outputs": outputs[1:]}, "no_tokens"), ({}, "nonsense"),
        ({"outputs": [1]}, "nonsense"), ({"outputs": [{"name": ["a"], "data": []}]}, "no_tokens"),
        ({"outputs": [outputs[0], {"name": "num_input_tokens", "data": ["x"]}]}, "wrong_usage"),
    ):  # fmt: skip
        with pytest.raises(Fault) as caught:
            read(json.dumps(bad).encode(), target=ENCODER, asked=0)
        assert caught.value.kind == kind
