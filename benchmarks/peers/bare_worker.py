"""Our own engine without Triton: an exported entry in this process, asked by function calls.

`loop` engine is the backend's loop with its scheduler, sampling and detokenising, on its own thread; `loop` runner is
the bare graph: prompts are prefilled (together where they are no longer than a chunk), then all decode together. What
Triton, HTTP, streaming clients and the gateway cost is the difference to the first, what scheduling costs that between
the two.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backends.inflight.entry import Entry
from backends.inflight.errors import EngineError
from backends.inflight.opening import open_model, tuning
from backends.inflight.prompt import PromptCodec
from backends.inflight.runner import Runner
from backends.inflight.sequence import Delta
from backends.inflight.text import Detokenizer
from benchmarks import inprocess
from benchmarks.peers import serving

STALLED_S = 120.0


class Sink:
    """Makes each token's text, as the thread that sends it does, and hands it on with its moment."""

    def __init__(self, conversation: int, seen: queue.SimpleQueue[Any], decode: Callable[[Sequence[int]], str]) -> None:
        self._conversation, self._seen, self._text = conversation, seen, Detokenizer(decode)

    def admitted(self) -> None:
        pass

    def delta(self, delta: Delta) -> None:
        token = delta.pick.token
        self._text.push(token)
        self._seen.put((self._conversation, [token], time.perf_counter()))

    def error(self, error: EngineError) -> None:
        self._seen.put(error)


class EngineLoop:
    def __init__(self, entry: Entry) -> None:
        runner = open_model(entry, 0).runner
        self._entry, self._codec = entry, PromptCodec(entry)
        how = tuning(entry, runner)
        self._engine = inprocess.engine(runner, entry.slots, entry.max_queue, entry.prefill_chunk, how)
        self._seen: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._engine.start()

    def about(self) -> dict[str, Any]:
        return {}

    def add(self, conversation: int, prompt: list[int], new: int, last: bool) -> None:
        decode = self._codec.decode
        sink = Sink(conversation, self._seen, decode)
        self._engine.submit(inprocess.sequence(prompt, new, decode, sink, self._entry.graph.vocab_size))

    def step(self) -> list[serving.Event]:
        found = [self._seen.get(timeout=STALLED_S)]
        while not self._seen.empty():
            found.append(self._seen.get())
        for one in found:
            if isinstance(one, EngineError):
                raise one
        return found


def runner_loop(entry: Entry) -> serving.Batches:
    runner = open_model(entry, 0).runner

    def generate(prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[float]]:
        if max(len(prompt) for prompt in prompts) <= entry.prefill_chunk:
            rows = [[token] for token in runner.prefill_fresh(0, prompts).argmax(axis=1).tolist()]
        else:
            rows = [[_prefilled(runner, slot, prompt, entry.prefill_chunk)] for slot, prompt in enumerate(prompts)]
        moments = [time.perf_counter()]
        positions = np.array([len(prompt) for prompt in prompts])
        for _ in range(new - 1):
            tokens = runner.decode([row[-1] for row in rows], positions.tolist()).argmax(axis=1)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                row.append(token)
            positions += 1
            moments.append(time.perf_counter())
        return rows, moments

    return serving.Batches(generate, {})


def _prefilled(runner: Runner, slot: int, prompt: list[int], chunk: int) -> int:
    """The first token of an answer, its prompt fed by chunks."""
    for start in range(0, len(prompt), chunk):
        logits = runner.prefill(slot, prompt[start : start + chunk], start)
    return int(logits.argmax())


def load(asked: dict[str, Any]) -> serving.Engine:
    entry = inprocess.read_entry(Path(asked["entry"]), asked["threads"])
    return EngineLoop(entry) if asked["loop"] == "engine" else runner_loop(entry)


if __name__ == "__main__":
    serving.serve(load)
