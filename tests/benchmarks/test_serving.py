"""How conversations are held with an engine: what it is asked, when, and what counts as an answer."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import contest
from benchmarks.contenders import Failed
from benchmarks.peers import serving

ROOT = Path(serving.__file__).parents[2]


class Clock:
    """Time that passes only when somebody sleeps or an engine works."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


class Counting:
    """Answers a prompt with its length, its length + 1, …; a step takes a second, and each that runs gets a token."""

    def __init__(self, clock: Clock, most: int = 1) -> None:
        self._clock, self._most = clock, most
        self.asked: list[tuple[int, list[int], float, bool]] = []
        self._running: dict[int, Iterator[int]] = {}
        self._missing: dict[int, int] = {}

    def about(self) -> dict[str, Any]:
        return {}

    def add(self, conversation: int, prompt: list[int], new: int, last: bool) -> None:
        self.asked.append((conversation, prompt, self._clock.now - 100.0, last))
        self._running[conversation] = iter(range(len(prompt), 10**6))
        self._missing[conversation] = new

    def step(self) -> list[serving.Event]:
        self._clock.now += 1.0
        found = []
        for number, tokens in [*self._running.items()]:
            count = min(self._most, self._missing[number]) if self._most > 0 else self._missing[number] + 1
            found.append((number, [next(tokens) for _ in range(count)], self._clock.now))
            self._missing[number] -= count
            if self._missing[number] <= 0:
                del self._running[number]
        return found


def talk(*turns: tuple[list[int], int], at_s: float = 0.0) -> dict[str, Any]:
    return {"at_s": at_s, "turns": [{"tokens": tokens, "new": new} for tokens, new in turns]}


def test_a_turn_begins_with_all_that_was_said() -> None:
    """The second prompt is the first, its answer and the new tokens; it is due when the first answer has ended."""
    clock = Clock()
    engine = Counting(clock)
    answers = serving.converse(engine, [talk(([7, 8], 3), ([9], 1))], clock, clock.sleep)
    assert engine.asked == [(0, [7, 8], 0.0, False), (0, [7, 8, 2, 3, 4, 9], 3.0, True)]
    assert answers == [
        {"conversation": 0, "turn": 0, "due_s": 0.0, "sent_s": 0.0, "first_s": 1.0, "last_s": 3.0, "ids": [2, 3, 4]},
        {"conversation": 0, "turn": 1, "due_s": 3.0, "sent_s": 3.0, "first_s": 4.0, "last_s": 4.0, "ids": [6]},
    ]


def test_arrivals_wait_for_nobody_and_count_from_when_they_were_due() -> None:
    """A request that is due in the middle of a step is asked after it, its time counted from when it was due; an idle
    engine is not asked before.
    """
    clock = Clock()
    engine = Counting(clock)
    answers = serving.converse(engine, [talk(([1], 2), at_s=5.0), talk(([2], 1), at_s=5.5)], clock, clock.sleep)
    assert [(number, at) for number, _, at, _ in engine.asked] == [(0, 5.0), (1, 6.0)]
    assert [(a["conversation"], a["due_s"], a["first_s"]) for a in answers] == [(0, 5.0, 6.0), (1, 5.5, 7.0)]


def test_too_many_tokens_are_no_result() -> None:
    """An engine that goes past what was asked for has not ignored its end, or lies: the run fails."""
    clock = Clock()
    with pytest.raises(RuntimeError, match="1 tokens more"):
        serving.converse(Counting(clock, most=-1), [talk(([1], 2))], clock, clock.sleep)


def test_batches_are_of_equal_lengths() -> None:
    """An engine of whole batches gets those together that are alike, gives each its tokens with the steps' moments, and
    fails when a row is short.
    """
    asked: list[tuple[list[list[int]], int]] = []

    def generate(prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[float]]:
        asked.append((prompts, new))
        return [[prompt[0]] * new for prompt in prompts], [float(step) for step in range(new)]

    batches = serving.Batches(generate, {})
    for number, (prompt, new) in enumerate([([5, 1], 2), ([6], 2), ([7, 1], 2), ([8, 1], 3)]):
        batches.add(number, prompt, new, True)
    assert batches.step() == [(0, [5], 0.0), (2, [7], 0.0), (0, [5], 1.0), (2, [7], 1.0)]
    batches.step()
    batches.step()
    assert [([prompt[0] for prompt in prompts], new) for prompts, new in asked] == [([5, 7], 2), ([6], 2), ([8], 3)]
    short = serving.Batches(lambda prompts, new: ([[1]], [0.0]), {})
    short.add(0, [1], 2, True)
    with pytest.raises(RuntimeError, match=r"\[1\] tokens, not 2 each"):
        short.step()


WORKER = """
import sys
from benchmarks.peers import serving

class Echo:
    def about(self): return {"version": "1"}
    def add(self, conversation, prompt, new, last): self.asked = conversation, prompt[:new]
    def step(self): print("noise of a library"); return [(*self.asked, 0.0)]

def load(asked):
    print("more noise")
    if asked["model"] == "missing": raise FileNotFoundError("no such model")
    return Echo()

serving.serve(load)
"""


def test_a_worker_speaks_json_lines_whatever_its_libraries_print() -> None:
    """A failure is a reply, the worker lives on, and only replies come out of standard output."""
    lines = [
        {"op": "run", "conversations": []}, {"op": "load", "model": "missing"}, {"op": "load", "model": "good"},
        {"op": "run", "conversations": [talk(([4, 5, 6], 2))]},
    ]  # fmt: skip
    asked = "".join(json.dumps(line) + "\n" for line in lines)
    done = subprocess.run(
        [sys.executable, "-c", WORKER], input=asked, capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    replies = [json.loads(line) for line in io.StringIO(done.stdout)]
    assert [reply.get("error") for reply in replies[:2]] == [
        "RuntimeError: nothing is loaded", "FileNotFoundError: no such model",
    ]  # fmt: skip
    assert replies[2] == {"ok": True, "about": {"version": "1"}}
    assert replies[3]["answers"][0]["ids"] == [4, 5]


def test_an_answer_that_is_missing_or_short_is_no_result() -> None:
    """Each turn needs one answer of exactly as many tokens as were asked for."""
    asked = [talk(([1], 2), ([1], 1))]
    good = [{"conversation": 0, "turn": 0, "ids": [1, 2]}, {"conversation": 0, "turn": 1, "ids": [3]}]
    assert contest.checked(asked, good) == good
    for bad in (good[:1], [*good, good[0]], [good[0], {**good[1], "ids": []}]):
        with pytest.raises(Failed, match="asked for"):
            contest.checked(asked, bad)
