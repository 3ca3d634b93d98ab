"""`truthgpt generate`: what is asked, what is printed, and how it fails."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.orchestrator.gateway import DONE, USAGE, chunk, eventually


def test_the_answer_is_printed_with_a_newline(place: Any, gateway: Any) -> None:
    """Text only, whole characters, one newline at the end, streamed or not."""
    for flag in ("--stream", "--no-stream"):
        result = place.run("generate", "¿Qué tal?", flag)
        assert (result.exit_code, result.stdout, result.stderr) == (0, "¡Hola, mundo!\n", "")
    path, body = gateway.asked[0]
    assert path == "/v1/chat/completions" and body["model"] == "demo"
    assert body["messages"] == [{"role": "user", "content": "¿Qué tal?"}]


def test_text_appears_while_it_is_generated(place: Any, gateway: Any) -> None:
    """With --stream (the default) the first words are readable while the rest is still to come."""
    gateway.events = [chunk("first"), *[chunk("")] * 20, chunk(" last", "stop"), USAGE, DONE]
    gateway.pause_s = 0.1
    with place.process("generate", "Hola") as process:
        assert process.stdout.read(5) == "first" and process.poll() is None
        assert process.stdout.read() == " last\n"
    assert process.returncode == 0


def test_json_is_one_document_with_true_times(place: Any, gateway: Any) -> None:
    """The promised keys; the time to first token is measured on a stream, before the end of the answer."""
    gateway.events, gateway.pause_s = [chunk(""), chunk("a"), chunk("b"), chunk("", "length"), USAGE, DONE], 0.05
    document = place.json("generate", "Hola")
    assert set(document) == {"text", "finish_reason", "usage", "model", "ttft_s", "latency_s"}
    assert (document["text"], document["finish_reason"], document["model"]) == ("ab", "length", "demo")
    assert document["usage"] == {"prompt_tokens": 3, "completion_tokens": 2}
    assert 0.04 < document["ttft_s"] < document["latency_s"] - 0.1


def test_every_option_reaches_the_gateway(place: Any, gateway: Any) -> None:
    """Sampling options keep OpenAI's names, what is not given is left to the gateway."""
    place.run(
        "generate", "Hola", "--model", "other", "--max-tokens", "7", "--temperature", "0", "--top-p", "0.5",
        "--top-k", "0", "--seed", "-3", "--stop", ".", "--stop", "\n", "--system", "Be kind",
        "--min-p", "0.1", "--typical-p", "0.9", "--repetition-penalty", "1.2", "--presence-penalty", "-1",
        "--frequency-penalty", "2", "--min-tokens", "0",
    )  # fmt: skip
    place.run("generate", "Hola")
    assert gateway.asked[0][1] == {
        "model": "other", "max_tokens": 7, "temperature": 0.0, "top_p": 0.5, "top_k": 0, "seed": -3,
        "stop": [".", "\n"], "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.2, "presence_penalty": -1.0,
        "frequency_penalty": 2.0, "min_tokens": 0,
        "messages": [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hola"}],
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert set(gateway.asked[1][1]) == {"model", "messages", "stream", "stream_options"}


@pytest.mark.parametrize(("flags", "chat"), [(("--raw",), True), ((), False)])
def test_completions_are_used_without_a_chat(place: Any, gateway: Any, flags: tuple[str, ...], chat: bool) -> None:
    """--raw, or a model without a chat template, continues the prompt as it is."""
    gateway.row["chat"] = chat
    gateway.events = [chunk("text", "stop", chat=False), USAGE, DONE]
    assert place.run("generate", "Hola", *flags).stdout == "text\n"
    path, body = gateway.asked[0]
    assert path == "/v1/completions" and body["prompt"] == "Hola" and "messages" not in body


def test_system_without_a_chat_template_is_refused(place: Any, gateway: Any) -> None:
    """A system message that would be dropped in silence is an error."""
    gateway.row["chat"] = False
    assert "no chat template" in place.refused("generate", "Hola", "--system", "x")


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("uno\n", "uno"),
        ("uno\n\n", "uno\n"),
        ("uno\r\n", "uno"),
        ("uno", "uno"),
        ("uno\r", "uno\r"),
        ("ñ 你\n", "ñ 你"),
    ],
)
def test_standard_input_loses_one_newline(place: Any, gateway: Any, given: str, asked: str) -> None:
    """`-` reads UTF-8 and strips the one newline that a shell adds."""
    assert place.run("generate", "-", input=given.encode()).exit_code == 0
    assert gateway.asked[0][1]["messages"][0]["content"] == asked


def test_standard_input_that_is_no_text_is_refused(place: Any, gateway: Any) -> None:
    """Bytes that are not UTF-8 never reach the model."""
    assert "not UTF-8 (byte 4)" in place.refused("generate", "-", input=b"hola\xff")
    assert gateway.asked == []


def test_an_argument_that_is_no_text_is_refused(place: Any, gateway: Any) -> None:
    """A prompt with bytes that are not UTF-8 on the command line is an error of one sentence."""
    with place.process("generate", b"hola\xff") as process:
        stdout, stderr = process.communicate(timeout=10)
    assert (process.returncode, stdout) == (1, "") and "error: the prompt is not UTF-8 text" in stderr


def test_an_error_inside_the_stream_fails_the_command(place: Any, gateway: Any) -> None:
    """Text that came is shown, then the error; the exit code is 1. With --json standard output stays empty."""
    gateway.events = [chunk("half"), b'data: {"error": {"message": "the model died"}}\n\n']
    result = place.run("generate", "Hola")
    assert (result.exit_code, result.stdout) == (1, "half") and "error: the model died" in result.stderr
    result = place.run("generate", "Hola", "--json")
    assert (result.exit_code, result.stdout) == (1, "") and "error: the model died" in result.stderr


@pytest.mark.parametrize("status", [400, 404, 429, 503])
def test_a_refusal_fails_the_command(place: Any, gateway: Any, status: int) -> None:
    """The gateway's message is the error."""
    gateway.status, gateway.body = status, json.dumps({"error": {"message": "no, because"}}).encode()
    assert "error: no, because" in place.refused("generate", "Hola")


def test_nothing_running_says_how_to_start(place: Any) -> None:
    """Without a stack and without --url the hint is `truthgpt up`."""
    assert "truthgpt up" in place.refused("generate", "Hola")


def test_url_asks_another_gateway(place: Any, gateway: Any) -> None:
    """--url needs no stack of this home, takes the first served model, and names it in the document."""
    place.set(HOME=place.home / "elsewhere")
    assert place.json("generate", "Hola", "--url", gateway.url)["model"] == "demo"
    gateway.health_status = 404  # an OpenAI server of another make
    assert place.run("generate", "Hola", "--url", gateway.url).exit_code == 0
    assert gateway.asked[-1][0] == "/v1/chat/completions"


def test_the_timeout_ends_a_stalled_answer(place: Any, gateway: Any) -> None:
    """--timeout bounds the whole call."""
    gateway.stall_s = 3
    assert "did not answer in time" in place.refused("generate", "Hola", "--timeout", "0.3")
    eventually(lambda: gateway.asked)


def test_the_api_key_is_sent(place: Any, gateway: Any) -> None:
    """TRUTHGPT_API_KEY, or --api-key before it, goes with every request; without one no credential is sent."""
    assert place.run("generate", "Hola").exit_code == 0 and set(gateway.credentials) == {None}
    place.set(API_KEY="tg_one")
    for flags, sent in (((), "Bearer tg_one"), (("--api-key", "tg_two"), "Bearer tg_two")):
        gateway.credentials.clear()
        assert place.run("generate", "Hola", "--url", gateway.url, *flags).exit_code == 0
        assert set(gateway.credentials) == {sent} and len(gateway.credentials) == 3


def test_a_refused_key_says_how_to_make_one(place: Any, gateway: Any) -> None:
    """The hint of a 401 is the command that makes a key; a key that cannot be sent is told before and not shown."""
    gateway.status, gateway.body = 401, b'{"error": {"message": "A valid API key is needed"}}'
    stderr = place.refused("generate", "Hola")
    assert "error: A valid API key is needed" in stderr and "truthgpt keys create" in stderr
    gateway.asked.clear()
    place.set(API_KEY="tg_\n\u00f1")
    stderr = place.refused("generate", "Hola")
    assert "characters that no key has" in stderr and "\u00f1" not in stderr and gateway.asked == []


@pytest.mark.parametrize(
    ("operation", "path"),
    [("embed", "/v1/embeddings"), ("classify", "/v1/classify"), ("infer", "/v2/models/demo/infer")],
)
def test_a_model_that_does_not_generate_is_refused_with_what_asks_it(
    place: Any, gateway: Any, operation: str, path: str
) -> None:
    """Nothing is sent; the hint has the endpoint that takes texts for this model."""
    gateway.row["operation"] = operation
    for raw in ((), ("--raw",)):
        told = place.refused("generate", "Hola", *raw)
        assert "demo does not generate text" in told and f"{gateway.url}{path}" in told
    assert gateway.asked == []
