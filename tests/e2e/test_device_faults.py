"""A model whose device runs out of memory or fails, in the real Triton behind the real gateway, with real clients."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.clock import awake
from tests.counting import WORDS

from .conftest import running
from .stack import Stack, Stream, wait_until
from .test_backend import raw_stream

KEPT_ALIVE_S = 0.5  # 0.25 is promised; a busy machine has as much again


def install(stack: Stack) -> Path:
    """Put the faulty model in front of the stack's backend and load it; the path of the file that says the fault."""
    backend = stack.home / "triton" / "backends" / "inflight"
    (backend / "model.py").rename(backend / "real_model.py")
    shutil.copy(Path(__file__).with_name("faulty_model.py"), backend / "model.py")
    reload(stack)
    return backend / "fault"


def reload(stack: Stack) -> None:
    for what in ("unload", "load"):
        path = f"/v2/repository/models/{stack.model}/{what}"
        status, _, answer = stack.request("POST", path, {}, "TRITON_HTTP", timeout=30)
        assert status == 200, answer
    wait_until(stack.ready, 20, "the gateway sees the model again")


@pytest.fixture(scope="module")
def faulty() -> Iterator[tuple[Stack, Path]]:
    """A stack whose model fails as the file says; 4 slots, 20 ms a step."""
    with running(step_delay_ms=20) as stack:
        yield stack, install(stack)


@pytest.fixture(autouse=True)
def mended(faulty: tuple[Stack, Path]) -> Iterator[None]:
    """Each test begins with a device that works, and all slots."""
    stack, fault = faulty
    yield
    fault.unlink(missing_ok=True)
    reload(stack)


def say(fault: Path, what: str) -> None:
    """Written under another name: the model reads the file with every call."""
    fresh = fault.with_suffix(".new")
    fresh.write_text(what)
    fresh.rename(fault)


def counted(first: int, count: int) -> str:
    return " ".join(WORDS[(first + i) % 3] for i in range(count))


def read(stream: Stream) -> list[Any]:
    with closing(stream):
        return [*stream.events()]


def text_of(events: list[Any]) -> str:
    return "".join(e["choices"][0]["text"] for e in events if isinstance(e, dict) and "choices" in e)


def gauge(stack: Stack) -> float:
    page = stack.request("GET", "/metrics", port="OPS")[2].decode()
    samples = [s for family in text_string_to_metric_families(page) for s in family.samples]
    return next(s.value for s in samples if s.name == "truthgpt_model_fallback" and s.labels["model"] == stack.model)


def test_a_shortage_of_memory_costs_the_newest_stream_and_no_other(faulty: tuple[Stack, Path]) -> None:
    """Of four streams the last ends with an error event and no [DONE], three have their whole text, and a new request
    is answered when there is room again.
    """
    stack, fault = faulty
    with ThreadPoolExecutor(4) as pool:
        answers = []
        for i in range(4):
            stream = stack.stream(WORDS[i % 3], max_tokens=150, seed=i)
            answers.append(pool.submit(read, stream))
            wait_until(lambda: stack.load()["running"] == len(answers), 5, "it has a slot")
        say(fault, "rows 3")
        wait_until(lambda: stack.load()["slots"] == 2, 5, "the slots are halved")  # for 64 steps, 1.3 s
        *kept, shed = [answer.result(30) for answer in answers]
    assert [text_of(events) for events in kept] == [counted(i + 1, 150) for i in range(3)]
    assert all(events[-1] == "[DONE]" for events in kept)
    assert shed[-1]["error"]["code"] == "out_of_memory" and counted(1, 150).startswith(text_of(shed))
    assert stack.load()["device"] == "cuda"
    status, _, body = stack.request("POST", "/v1/completions", {"model": stack.model, "prompt": "two", "max_tokens": 3})
    assert status == 200 and json.loads(body)["choices"][0]["text"] == counted(2, 3)


def test_a_request_that_does_not_fit_alone_is_told_to_come_back(faulty: tuple[Stack, Path]) -> None:
    """With no memory for a single row the answer is 503 with Retry-After; the breaker stays closed and the next request
    is served.
    """
    stack, fault = faulty
    body = {"model": stack.model, "prompt": "one", "max_tokens": 3}
    say(fault, "rows 0")
    for seed in range(6):  # more than would open a breaker
        status, headers, answer = stack.request("POST", "/v1/completions", {**body, "seed": seed})
        assert (status, json.loads(answer)["error"]["code"]) == (503, "out_of_memory")
        assert int(headers["retry-after"]) >= 1
    fault.unlink()
    assert stack.request("POST", "/v1/completions", body)[0] == 200


def test_a_lost_device_moves_the_model_to_the_cpu_under_running_streams(faulty: tuple[Stack, Path]) -> None:
    """Every stream goes on to its whole text and is written to meanwhile, readiness stays and says so, and the gauge is
    1 until the model is loaded again.
    """
    stack, fault = faulty
    assert gauge(stack) == 0 and stack.load()["device"] == "cuda"
    with ThreadPoolExecutor(4) as pool, ExitStack() as closings:
        answers = [pool.submit(read, stack.stream(WORDS[i], max_tokens=120, seed=100 + i)) for i in range(3)]
        raw = closings.enter_context(raw_stream(stack, max_tokens=1500))
        wait_until(lambda: stack.load()["running"] == 4, 5, "all run")
        say(fault, "lost")
        longest = longest_silence(raw, 2.0)
        assert [text_of(answer.result(30)) for answer in answers] == [counted(i + 1, 120) for i in range(3)]
        assert all(answer.result()[-1] == "[DONE]" for answer in answers)
    assert longest < KEPT_ALIVE_S
    load = stack.load()
    assert (load["device"], load["fallback"], load["slots"]) == ("cpu", True, 4)
    status, _, body = stack.request("GET", "/health/ready")
    assert status == 200 and "CPU" in json.loads(body)["models"][stack.model]
    wait_until(lambda: gauge(stack) == 1, 5, "the gauge says so")
    assert (stack.home / "logs" / "triton.log").read_text().count("the model is opened again on the CPU") == 1
    fault.unlink()
    reload(stack)
    assert stack.load()["device"] == "cuda"
    wait_until(lambda: gauge(stack) == 0, 5, "the gauge is back")


def longest_silence(sock: socket.socket, for_s: float) -> float:
    """The longest time between two reads of a stream, over some seconds."""
    longest, began = 0.0, awake()
    last = began
    while last - began < for_s:
        assert sock.recv(65536)
        now = awake()
        longest, last = max(longest, now - last), now
    return longest
