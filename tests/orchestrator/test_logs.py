"""Log lines: one JSON object each, no text of prompts, tracebacks in debug only."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from orchestrator.logs import JsonLines

from .conftest import Stack


def line(debug: bool) -> dict[str, object]:
    try:
        raise ValueError("the prompt's text")
    except ValueError:
        record = logging.LogRecord("a.b", logging.ERROR, "", 1, "failed %s", ("x\ny",), sys.exc_info())
    text = JsonLines(debug).format(record)
    assert "\n" not in text
    return dict(json.loads(text))


def test_a_line_is_one_object() -> None:
    """Time, level, logger and message are there, and the exception's name but neither text nor traceback."""
    found = line(debug=False)
    assert (found["level"], found["logger"], found["message"]) == ("error", "a.b", "failed x\ny")
    assert found["exception"] == "ValueError"
    assert "the prompt's text" not in json.dumps(found)


def test_debug_shows_the_traceback() -> None:
    """With debug on the traceback is in the line."""
    assert "Traceback" in str(line(debug=True)["traceback"])


async def test_a_request_is_one_line_without_text(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    """The log sink writes id, model, outcome, tokens and durations, never prompt or answer."""
    caplog.set_level(logging.DEBUG)
    body = {"model": "m", "messages": [{"role": "user", "content": "zanahoria"}], "stop": "berenjena"}
    await stack.post("/v1/chat/completions", body, **{"x-request-id": "log-1"})
    lines = [JsonLines(True).format(record) for record in caplog.records]
    (found,) = [json.loads(text) for text in lines if '"request_id":"log-1"' in text]
    assert {"message": "request", "model": "m", "outcome": "ok", "completion_tokens": 3}.items() <= found.items()
    assert found["duration_s"] >= found["ttft_s"] > 0
    for word in ("zanahoria", "berenjena", "¿qué tal?"):
        assert not any(word in text for text in lines), word
