"""The fault matrix: what is killed or stopped, idle and mid-stream, and what clients and operators then see."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from tests.clock import awake

from .stack import Stack, kill, wait_until

ERROR_S = 2.0  # clients get an error within
UNREADY_S = 2.0  # readiness is false within
BACK_S = 15.0  # the model is back within


class Watcher(threading.Thread):
    """Reads one stream to its end and notes when and how it ended."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(daemon=True)
        self.stream = stack.stream(max_tokens=1500)
        self.events: list[object] = []
        self.ended_at = 0.0
        self.start()

    def run(self) -> None:
        try:
            for event in self.stream.events():
                self.events.append(event)
        except OSError as error:
            self.events.append(error)
        self.ended_at = awake()
        self.stream.close()


def assert_answers(stack: Stack) -> None:
    """The stack gives a whole, correct answer."""
    status, _, body = stack.request("POST", "/v1/completions", {"model": stack.model, "prompt": "one", "max_tokens": 3})
    assert status == 200 and b"two three one" in body, body


@pytest.mark.parametrize(
    ("victim", "sig", "when"),
    [
        ("stub", signal.SIGKILL, "streaming"),
        ("triton", signal.SIGSTOP, "streaming"),
        ("stub", signal.SIGSTOP, "idle"),
        ("triton", signal.SIGKILL, "idle"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("stub", signal.SIGKILL, "idle"),
                ("triton", signal.SIGSTOP, "idle"),
                ("stub", signal.SIGSTOP, "streaming"),
                ("triton", signal.SIGKILL, "streaming"),
            )
        ),
    ],
)
def test_a_dead_or_stopped_process_is_an_error_then_unready_then_back(stack: Stack, victim, sig, when):
    """Clients get an error within 2 s, never a clean end; readiness is false within 2 s; the model is back in 15 s."""
    wait_until(stack.ready, BACK_S, "ready before the fault")
    watchers = [Watcher(stack) for _ in range(2)] if when == "streaming" else []
    for watcher in watchers:
        wait_until(lambda w=watcher: len(w.events) > 3, 5, "the stream runs")

    kill(stack.pid(victim), sig)
    began = awake()
    wait_until(lambda: not stack.ready(), UNREADY_S, "readiness is false")
    for watcher in watchers:
        watcher.join(ERROR_S + 1)
        assert watcher.ended_at and watcher.ended_at - began < ERROR_S, stack.logs()
        assert watcher.events[-1] != "[DONE]"
        assert "error" in watcher.events[-1], watcher.events[-1]
    if when == "idle":
        asked = {"model": stack.model, "prompt": "one", "seed": time.time_ns() % 2**31}  # no answer to it is cached
        status, headers, body = stack.request("POST", "/v1/completions", asked)
        assert status == 503 and b"error" in body and int(headers["retry-after"]) >= 1

    wait_until(stack.ready, BACK_S - (awake() - began), "ready again")
    assert_answers(stack)
    assert len(stack.leftovers()) == len(set(stack.leftovers()))
    regions = [name for name in stack.leftovers() if name.startswith("truthgpt_") and " " not in name]
    assert len(regions) == 1, "a dead stub's shared memory stays behind"


@pytest.mark.parametrize("victim", ["gateway", "redis"])
def test_a_killed_gateway_or_redis_comes_back(stack: Stack, victim):
    """The supervisor starts a killed child again and requests are answered."""
    wait_until(stack.ready, BACK_S, "ready before the fault")
    before = stack.pid(victim)
    kill(before, signal.SIGKILL)
    wait_until(lambda: stack.pid(victim) != before and stack.ready(), BACK_S, f"{victim} is back")
    assert_answers(stack)


def test_a_redis_that_is_away_fails_no_request(stack: Stack):
    """A stopped (not dead) Redis is reported, and requests are answered as fast as ever."""
    wait_until(stack.ready, BACK_S, "ready before the fault")
    kill(stack.pid("redis"), signal.SIGSTOP)
    try:
        wait_until(lambda: b'"up":false' in stack.request("GET", "/health")[2], 5, "Redis is reported away")
        assert stack.ready()
        assert_answers(stack)
    finally:
        kill(stack.pid("redis"), signal.SIGCONT)
