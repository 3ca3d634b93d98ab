"""What the worker of every engine does alike: JSON lines in and out, and conversations that are held with the engine.

A worker is run by the interpreter of its engine's own environment, so this module needs the standard library only.

    -> {"op": "load", ...}                          <- {"ok": true, "about": {...}}
    -> {"op": "run", "conversations": [...]}        <- {"ok": true, "answers": [...]}
                                                    <- {"ok": false, "error": "..."}

A conversation is `{"at_s": when its first turn is due, "turns": [{"tokens": [...], "new": how many are generated}]}`.
The prompt of a turn is all that was said before, answers included, and its tokens; it is due when the last one has
ended. An answer is `{"conversation", "turn", "due_s", "sent_s", "first_s", "last_s", "ids"}`, seconds since the start.
"""

from __future__ import annotations

import heapq
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Protocol

Event = tuple[int, list[int], float]  # conversation, new tokens, when (of `time.perf_counter`)


class Engine(Protocol):
    """Something that answers several conversations at once."""

    def about(self) -> dict[str, Any]:
        """Versions and settings, for the result."""
        ...

    def add(self, conversation: int, prompt: list[int], new: int, last: bool) -> None:
        """Begin to generate exactly `new` tokens, greedily. `last`: the conversation's last turn."""
        ...

    def step(self) -> Iterable[Event]:
        """Go on with what was added until something new is generated."""
        ...


def converse(
    engine: Engine,
    conversations: list[dict[str, Any]],
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> list[dict[str, Any]]:
    """Hold these conversations. Raises RuntimeError when an answer has more tokens than it was to have."""
    began = clock()
    due = [(float(one["at_s"]), number, 0) for number, one in enumerate(conversations)]
    heapq.heapify(due)
    said: list[list[int]] = [[] for _ in conversations]
    running: dict[int, dict[str, Any]] = {}
    answers: list[dict[str, Any]] = []
    while due or running:
        now = clock() - began
        while due and due[0][0] <= now:
            at, number, turn = heapq.heappop(due)
            turns = conversations[number]["turns"]
            said[number] += turns[turn]["tokens"]
            running[number] = {"conversation": number, "turn": turn, "due_s": at, "sent_s": now, "ids": []}
            engine.add(number, [*said[number]], turns[turn]["new"], turn + 1 == len(turns))
        if not running:
            sleep(due[0][0] - now)
            continue
        for number, ids, at in engine.step():
            answer, turns = running[number], conversations[number]["turns"]
            if not ids:
                continue
            answer.setdefault("first_s", at - began)
            answer["ids"] += ids
            answer["last_s"] = at - began
            missing = turns[answer["turn"]]["new"] - len(answer["ids"])
            if missing < 0:
                raise RuntimeError(f"{-missing} tokens more than were asked for")
            if missing == 0:
                said[number] += answer["ids"]
                answers.append(running.pop(number))
                if answer["turn"] + 1 < len(turns):
                    heapq.heappush(due, (answer["last_s"], number, answer["turn"] + 1))
    return answers


class Batches:
    """An engine that takes requests together, all for equally many tokens, and whoever comes meanwhile waits.

    `generate(prompts, new)` gives the tokens of each and the moments of all steps; one moment is that of the end.
    """

    def __init__(
        self, generate: Callable[[list[list[int]], int], tuple[list[list[int]], list[float]]], about: dict[str, Any]
    ) -> None:
        self._generate, self._about = generate, about
        self._waiting: list[tuple[int, list[int], int]] = []

    def about(self) -> dict[str, Any]:
        return self._about

    def add(self, conversation: int, prompt: list[int], new: int, last: bool) -> None:
        self._waiting.append((conversation, prompt, new))

    def step(self) -> list[Event]:
        new = self._waiting[0][2]
        batch = [one for one in self._waiting if one[2] == new and len(one[1]) == len(self._waiting[0][1])]
        self._waiting = [one for one in self._waiting if one not in batch]
        rows, moments = self._generate([prompt for _, prompt, _ in batch], new)
        if any(len(row) != new for row in rows):
            raise RuntimeError(f"{[len(row) for row in rows]} tokens, not {new} each")
        numbers = [number for number, _, _ in batch]
        if len(moments) != new:
            return [(number, row, moments[-1]) for number, row in zip(numbers, rows, strict=True)]
        return [
            (number, [row[step]], at)
            for step, at in enumerate(moments)
            for number, row in zip(numbers, rows, strict=True)
        ]


def serve(load: Callable[[dict[str, Any]], Engine]) -> None:
    """Answer what standard input asks until it ends. What libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine: Engine | None = None
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            if asked["op"] == "load":
                engine = load(asked)
                reply: dict[str, Any] = {"ok": True, "about": engine.about()}
            elif engine is None:
                raise RuntimeError("nothing is loaded")
            else:
                reply = {"ok": True, "answers": converse(engine, asked["conversations"])}
        except Exception as error:
            traceback.print_exc()
            reply = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
