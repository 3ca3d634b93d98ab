"""`truthgpt chat` with its input from a pipe; tests/e2e/test_chat.py has it at a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import lineedit
from tests.orchestrator.gateway import DONE, USAGE, chunk


def said(gateway: Any, number: int = -1) -> list[tuple[str, str]]:
    return [(message["role"][0], message["content"]) for message in gateway.asked[number][1]["messages"]]


def test_every_line_is_a_turn_that_knows_those_before(place: Any, gateway: Any) -> None:
    """Lines without text are none; answers and nothing else are on standard output, a line end behind each."""
    result = place.run("chat", "--system", "Be brief", input="Hola\n\n  \n¿y tú?\r\nadiós")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "¡Hola, mundo!\n" * 3, "")
    assert said(gateway, 0) == [("s", "Be brief"), ("u", "Hola")]
    answer = ("a", "¡Hola, mundo!")
    assert said(gateway) == [("s", "Be brief"), ("u", "Hola"), answer, ("u", "¿y tú?"), answer, ("u", "adiós")]


def test_options_reach_the_gateway(place: Any, gateway: Any) -> None:
    """By OpenAI's names; what is not given is left to the gateway."""
    place.run("chat", "--model", "other", "--max-tokens", "7", "--temperature", "0", input="a\n")
    place.run("chat", "--url", gateway.url, input="a\n")
    assert gateway.asked[0][1] == {
        "model": "other", "max_tokens": 7, "temperature": 0.0, "messages": [{"role": "user", "content": "a"}],
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert gateway.asked[1][1]["model"] == "demo" and "temperature" not in gateway.asked[1][1]


def test_json_is_a_line_a_turn(place: Any, gateway: Any) -> None:
    """The keys of `generate --json` and the turns that were left out."""
    result = place.run("chat", "--json", input="uno\ndos\n")
    documents = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(documents) == 2 and documents[0]["text"] == "¡Hola, mundo!"
    assert set(documents[0]) == {"text", "finish_reason", "usage", "model", "ttft_s", "latency_s", "left_out_turns"}


def test_the_first_failure_ends_a_pipe(place: Any, gateway: Any) -> None:
    """What follows would be said to a conversation that is not what its writer thinks."""
    gateway.events = [chunk("half"), b'data: {"error": {"message": "the model died"}}\n\n']
    result = place.run("chat", input="a\nb\n")
    assert (result.exit_code, result.stdout) == (1, "half") and "error: the model died" in result.stderr
    assert len(gateway.asked) == 1


def test_an_answer_that_was_cut_is_told(place: Any, gateway: Any) -> None:
    """A finish reason of length is a note, on standard error."""
    gateway.events = [chunk("a"), chunk("", "length"), USAGE, DONE]
    assert "note: the answer was cut" in place.run("chat", input="a\n").stderr


def test_a_conversation_that_outgrew_the_context_loses_its_oldest_turns(place: Any, gateway: Any) -> None:
    """Refused for its length, it is sent again without the older half; one message that is too long is an error."""
    message = "the prompt has 99 tokens; the model's context of 64 tokens leaves no room to answer"
    full = json.dumps({"error": {"message": message}}).encode()
    asked = gateway.asked

    class Counting(list[tuple[str, dict[str, Any]]]):
        """Refuses what has more than three messages, as a model with a small context does."""

        def append(self, item: tuple[str, dict[str, Any]]) -> None:
            super().append(item)
            gateway.status, gateway.body = (400, full) if len(item[1]["messages"]) > most else (200, b"")

    most = 3
    gateway.asked = asked = Counting()
    result = place.run("chat", "--json", input="a\nb\nc\nd\n")
    assert [json.loads(line)["left_out_turns"] for line in result.stdout.splitlines()] == [0, 0, 1, 1]
    assert [text for role, text in said(gateway) if role == "u"] == ["c", "d"]
    result = place.run("chat", input="a\nb\nc\n")
    assert result.stderr.count("the oldest turn is left out") == 1
    most = 0
    del asked[:]
    assert "leaves no room" in place.refused("chat", input="a\n") and len(asked) == 1


def test_more_text_than_the_gateway_takes_is_never_sent(place: Any, gateway: Any) -> None:
    """It would cut the end, what was just said: the oldest turns go first here too."""
    place.set(MAX_INPUT_CHARS=40)
    place.run("chat", input="one\ntwo\nthree\n" + "x" * 20 + "\n")
    assert [len(body["messages"]) for _, body in gateway.asked] == [1, 3, 5, 3]


def test_without_a_chat_template_the_next_step_is_named(place: Any, gateway: Any) -> None:
    """No half chat is begun with a model that has none, nor with one that does not generate."""
    gateway.row["chat"] = False
    told = place.refused("chat", input="a\n")
    assert "demo has no chat template" in told and "truthgpt generate" in told and "--chat-template" in told
    gateway.row["operation"] = "embed"
    assert "makes embeddings" in place.refused("chat", input="a\n")
    assert gateway.asked == []


def test_without_a_stack_the_next_step_is_named(place: Any) -> None:
    """`up` is what is missing, or whoever listens at the URL."""
    assert "truthgpt up" in place.refused("chat", input="a\n")
    told = place.refused("chat", "--url", f"http://127.0.0.1:{place.ports['HTTP']}", "--model", "demo", input="a\n")
    assert "truthgpt status" in told


@pytest.mark.parametrize(
    ("given", "told"), [(b"hola\n\xff\n", "line 2 is not UTF-8 (byte 0)"), (b"x" * (1 << 21), "line 1 is longer than")]
)
def test_what_is_no_line_of_text_is_refused(place: Any, gateway: Any, given: bytes, told: str) -> None:
    """By its number, and only when it is reached."""
    result = place.run("chat", input=given)
    assert result.exit_code == 1 and told in result.stderr and "hint: " in result.stderr


def test_the_history_is_whole_and_its_owner_s_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is kept from one chat to the next, for nobody else to read, and one that cannot be written is a warning."""
    if lineedit.readline is None:
        pytest.skip("this Python has no readline")
    path = tmp_path / "home" / "chat_history"
    lines = lineedit.Lines(path)
    lineedit.readline.add_history("¿Qué tal?")
    lines.keep()
    assert "¿Qué tal?" in path.read_text(encoding="utf-8") and path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["chat_history"]
    lineedit.Lines(None)
    assert lineedit.readline.get_current_history_length() == 0
    lines = lineedit.Lines(path)
    assert lineedit.readline.get_history_item(1) == "¿Qué tal?"
    blocked = lineedit.Lines(tmp_path / "home" / "chat_history" / "below")
    blocked.keep()
    blocked.keep()
    assert capsys.readouterr().err.count("warning: ") == 1
