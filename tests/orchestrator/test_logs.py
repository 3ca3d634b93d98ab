"""Log lines: one JSON object each that names its request, without secrets and without the text of prompts."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import keys, logs
from orchestrator.context import handling
from orchestrator.domain import Trace
from orchestrator.logs import JsonLines, Readable, RequestLine
from orchestrator.settings import PROFILES
from tests.redis import RealRedis

from .conftest import Stack, serving, until
from .fake_triton import FakeTriton, answer, event, failure
from .recording import record

KEY = keys.credential("abcdefghijkl", "S" * 43)
CLIENT = f"00-{'a' * 32}-{'b' * 16}-01"
PROMPT = "the prompt"
TEXT = st.text(max_size=30)
DURATION = st.floats(0, 1e6)
TEXTS = ("id", *logs.COMMON, "input_hash")
COUNTS = ("prompt_tokens", "completion_tokens", "output_chars")
SECONDS = dict.fromkeys(("ttft_s", "queue_s", "upstream_s"), st.none() | DURATION) | {"duration_s": DURATION}


class Lines(logging.Handler):
    """Every line as it is made where it is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonLines(debug=True, worker=7))
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        assert len(text.splitlines()) == 1
        self.lines.append(json.loads(text))

    def of(self, logger: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["logger"] == f"orchestrator.{logger}"]


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, root = Lines(), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield handler
    root.removeHandler(handler)
    root.setLevel(level)


def failed(formatter: JsonLines, message: str = "failed %s") -> dict[str, Any]:
    """The line of an exception that was caused by another one."""
    try:
        try:
            raise KeyError(PROMPT)
        except KeyError as error:
            raise ValueError(PROMPT + KEY) from error
    except ValueError:
        made = logging.LogRecord("a.b", logging.ERROR, "", 1, message, ("x\ny",), sys.exc_info())
    text = formatter.format(made)
    assert "\n" not in text and "S" * 43 not in text and PROMPT not in text
    return dict(json.loads(text))


def test_a_line_is_one_object() -> None:
    """Time, level, logger and message are there, and an exception's name but neither its text nor its stack."""
    found = failed(JsonLines(debug=False))
    assert (found["level"], found["logger"], found["message"]) == ("error", "a.b", "failed x\ny")
    assert (found["exception"], "traceback" in found) == ("ValueError", False)
    assert found["time"].endswith("Z") and "worker" not in found


def test_debug_shows_the_stack() -> None:
    """With debug on the line has the stacks of the exception and of its cause, still without their messages."""
    found = failed(JsonLines(debug=True), f"{KEY} failed %s")
    first, second = found["traceback"].split("\n\n")
    assert first.startswith("Traceback (most recent call last):\n") and first.endswith("\nKeyError")
    assert "in failed" in second and second.endswith("\nValueError")
    assert found["message"] == "tg_abcdefghijkl_*** failed x\ny"


def test_what_asyncio_says_of_a_task_has_no_text() -> None:
    """A task that nobody waited for is told of without the repr that the library adds, which quotes its exception."""
    message = "Task exception was never retrieved\nfuture: <Task exception=ValueError('the prompt')>"
    made = logging.LogRecord("asyncio", logging.ERROR, "", 1, message, (), None)
    assert json.loads(JsonLines(debug=True).format(made))["message"] == "Task exception was never retrieved"


@settings(max_examples=40)
@given(
    texts=st.fixed_dictionaries({name: TEXT for name in TEXTS}),
    numbers=st.fixed_dictionaries({name: st.integers(0, 10**9) for name in COUNTS}),
    seconds=st.fixed_dictionaries(
        {name: DURATION if name == "duration_s" else st.none() | DURATION for name in SECONDS}
    ),
    flags=st.fixed_dictionaries({"stream": st.booleans(), "degraded": st.booleans()}),
    sanitized=st.lists(TEXT).map(tuple),
    worker=st.none() | st.integers(1, 128),
)
def test_a_requests_line_is_json_of_its_record(
    texts: dict[str, str], numbers: dict[str, int], seconds: dict[str, float | None], flags: dict[str, bool],
    sanitized: tuple[str, ...], worker: int | None,
) -> None:  # fmt: skip
    """Whatever is in a Record, its line is one line and one JSON object of the fields that are not empty."""
    one = record(**texts, **numbers, **seconds, **flags, sanitized=sanitized, traceparent=CLIENT)
    text = JsonLines(False, worker).format(RequestLine(one))
    assert len(text.splitlines()) == 1
    found = json.loads(text)
    id = texts.pop("id")
    assert {name: found.get(name, "") for name in texts} == {n: logs.masked(value) for n, value in texts.items()}
    assert {name: found[name] for name in numbers} == numbers
    for name, value in seconds.items():
        assert found.get(name) == (None if value is None else pytest.approx(value, abs=1e-6))
    assert (found["request_id"], found["traceparent"], found.get("worker")) == (logs.masked(id), CLIENT, worker)
    assert (found["stream"], found.get("degraded", False)) == (flags["stream"], flags["degraded"])
    assert tuple(found.get("sanitized", ())) == sanitized


def test_a_key_in_a_request_id_or_a_models_name_is_masked() -> None:
    """A client that puts its key into the wrong field does not find it in the log, be it cut off or whole."""
    found = json.loads(JsonLines(False).format(RequestLine(record(id=KEY, model=KEY[:50]))))
    assert (found["request_id"], found["model"]) == ("tg_abcdefghijkl_***", "tg_abcdefghijkl_***")
    handling.set((KEY, None))
    made = logging.LogRecord("a", logging.INFO, "", 1, "x", (), None)
    assert json.loads(JsonLines(False).format(made))["request_id"] == "tg_abcdefghijkl_***"
    handling.set(None)


async def test_a_request_is_one_line_without_text(stack: Stack, lines: Lines) -> None:
    """The log sink writes id, model, route, outcome, tokens and durations, never prompt or answer."""
    body = {"model": "m", "messages": [{"role": "user", "content": "zanahoria"}], "stop": "berenjena"}
    await stack.post("/v1/chat/completions", body, **{"x-request-id": "log-1"})
    assert len(stack.records) == 1
    (found,) = lines.of("requests")
    assert {
        "request_id": "log-1", "message": "request", "model": "m", "route": "POST /v1/chat/completions",
        "outcome": "ok", "completion_tokens": 3, "cache": "bypass",
    }.items() <= found.items()  # fmt: skip
    assert found["duration_s"] >= found["ttft_s"] > 0
    for word in ("zanahoria", "berenjena", "¿qué tal?"):
        assert word not in json.dumps(lines.lines, ensure_ascii=False)


async def test_every_line_of_a_request_names_it(
    fake: FakeTriton, lines: Lines, server: RealRedis, client: redis.Redis
) -> None:
    """Lines from inside a flight, of retries, the breaker and an edge's refusal have the id and traceparent of the
    request that was handled; the heartbeats that it was the first to cause have none.
    """
    fake.script = [failure("[unavailable] gone"), "end"]
    other = f"00-{'c' * 32}-{'d' * 16}-00"
    async with serving(fake, redis_url=server.url, breaker_failures=2, retries=1) as stack:
        body = {"model": "m", "prompt": "Hola"}
        for id, parent in (("one", CLIENT), ("two", other)):
            assert (await stack.post("/v1/completions", body, traceparent=parent, **{"x-request-id": id}))[0] == 503
        fake.models["late"] = "READY"
        (server,) = stack.gateway.fleet.members
        server.health._read_at = -60.0  # within a second the list of models is not asked for again
        missing = {"model": "late", "prompt": "Hola"}
        await stack.post("/v1/completions", missing, **{"x-request-id": "three"})
        fake.beat_error = "gone"
        await until(lambda: any(line["message"].startswith("late is not ready") for line in lines.lines))
    tried, opened = lines.of("upstream"), lines.of("breaker")
    assert [(line["request_id"], line.get("traceparent")) for line in tried] == [
        ("one", CLIENT), ("two", other), ("three", None),
    ]  # fmt: skip
    assert (opened[0]["request_id"], opened[0]["traceparent"]) == ("two", other)
    assert [line["request_id"] for line in lines.of("requests")] == ["one", "two", "three"]
    assert not any("request_id" in line for line in lines.of("health") if "not ready" in line["message"])


async def test_each_of_many_requests_at_once_has_its_own_lines(fake: FakeTriton, lines: Lines) -> None:
    """Requests that are handled side by side never get each other's id."""
    fake.by_text = {f"text {n}": [event("a"), 0.02, *answer("b")] for n in range(20)}
    fake.refusals = [b'{"error": "[unavailable] not yet"}'] * 10
    async with serving(fake, retries=1, breaker_failures=100) as stack:
        calls = [
            stack.post("/v1/completions", {"model": "m", "prompt": f"text {n}"}, **{"x-request-id": f"id-{n}"})
            for n in range(20)
        ]
        await asyncio.gather(*calls)
    assert sorted(line["request_id"] for line in lines.of("requests")) == sorted(f"id-{n}" for n in range(20))
    tried = lines.of("upstream")
    assert len(tried) == 10
    assert all(line["message"].startswith(f"request {line['request_id']} is tried again") for line in tried)


def test_a_traced_request_is_found_by_its_own_span() -> None:
    """Where a request has a place of its own in a trace, its line names that, and not the client's."""
    trace = Trace("a" * 32, "b" * 16, "c" * 16, "d" * 16, sampled=True)
    found = json.loads(JsonLines(False).format(RequestLine(record(trace=trace, traceparent=CLIENT))))
    assert found["traceparent"] == f"00-{'a' * 32}-{'c' * 16}-01"


def test_each_profile_has_its_level() -> None:
    """Development tells everything, staging and production each request and what is wrong."""
    assert {name: profile["log_level"] for name, profile in PROFILES.items()} == {
        "development": "debug", "staging": "info", "production": "info",
    }  # fmt: skip


CONFIGURED = (
    "import logging, sys, warnings\n"
    "from dataclasses import replace\n"
    "from orchestrator import logs\n"
    "from orchestrator.settings import Settings\n"
    "from tests.orchestrator.recording import record\n"
    "logs.configure(replace(Settings(), log_level=sys.argv[1]), 3)\n"
    "logs.log_request(record(id='one\\x1b[31m', model='ñ'))\n"
    "logging.getLogger('orchestrator.x').warning('two')\n"
    "logging.getLogger('urllib3').debug('three')\n"
    "warnings.warn('four')\n"
)


@pytest.mark.parametrize("level, seen", [("info", ["request", "two", "four"]), ("warning", ["two", "four"])])
def test_a_level_leaves_out_what_is_less_severe(level: str, seen: list[str]) -> None:
    """At info each request has its line, at warning none; Python's warnings are there, other libraries' chatter not."""
    done = subprocess.run([sys.executable, "-c", CONFIGURED, level], capture_output=True, text=True, timeout=30)
    found = [json.loads(line) for line in done.stderr.splitlines()]
    assert [next(word for word in (*seen, "?") if word in line["message"] or word == "?") for line in found] == seen
    assert {line["worker"] for line in found} == {3}


def test_a_terminal_shows_lines_for_people() -> None:
    """On a terminal a line is text, with what a client sent in a form that the terminal does not obey."""
    main, terminal = pty.openpty()
    subprocess.run([sys.executable, "-c", CONFIGURED, "info"], stderr=terminal, check=True, timeout=30)
    os.close(terminal)
    shown = os.read(main, 1 << 16).decode()
    os.close(main)
    first, second, *_ = shown.splitlines()
    assert "info     orchestrator.requests: request  worker=3  request_id=one\\x1b[31m" in first
    assert second[12:].startswith(" warning  orchestrator.x: two")
    assert "\x1b" not in shown


def test_a_stack_is_readable_on_a_terminal() -> None:
    """A traceback keeps its lines there."""
    made = logging.LogRecord("a", logging.ERROR, "", 1, "no", (), None)
    try:
        raise ValueError
    except ValueError as error:
        made.exc_info = (type(error), error, error.__traceback__)
    assert len(Readable(debug=True).format(made).splitlines()) > 3
