"""Our own engine without Triton: an exported entry in this process, asked by function calls.

`loop` engine is the backend's loop with its scheduler, sampling and detokenising, on its own thread; `loop` runner is
the bare graph: prompts are prefilled one after the other, then all decode together. What Triton, HTTP, streaming
clients and the gateway cost is the difference to the first, what scheduling costs that between the two.
"""

from __future__ import annotations

import queue
import time
from pathlib import Path
from typing import Any

import numpy as np

from backends.inflight.entry import Entry
from backends.inflight.errors import EngineError
from backends.inflight.opening import open_model
from backends.inflight.prompt import PromptCodec
from backends.inflight.sequence import Delta, Sequence
from benchmarks import inprocess
from benchmarks.peers import serving

STALLED_S = 120.0


class Sink:
    """Hands each token on, with its moment."""

    def __init__(self, conversation: int, seen: queue.SimpleQueue[Any]) -> None:
        self._conversation, self._seen = conversation, seen
        self.sequence: Sequence | None = None

    def admitted(self) -> None:
        pass

    def delta(self, delta: Delta) -> None:
        assert self.sequence is not None
        if delta.tokens:
            self._seen.put((self._conversation, self.sequence.tokens[-delta.tokens :], time.perf_counter()))

    def error(self, error: EngineError) -> None:
        self._seen.put(error)


class EngineLoop:
    def __init__(self, entry: Entry) -> None:
        opened = open_model(entry, 0)
        self._engine = inprocess.engine(opened.runner, entry.slots, entry.max_queue, entry.prefill_chunk)
        self._codec = PromptCodec(entry)
        self._seen: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._engine.start()

    def about(self) -> dict[str, Any]:
        return {}

    def add(self, conversation: int, prompt: list[int], new: int, last: bool) -> None:
        sink = Sink(conversation, self._seen)
        sink.sequence = inprocess.sequence(prompt, new, self._codec.decode, sink)
        self._engine.submit(sink.sequence)

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
        rows: list[list[int]] = []
        for slot, prompt in enumerate(prompts):
            for start in range(0, len(prompt), entry.prefill_chunk):
                logits = runner.prefill(slot, prompt[start : start + entry.prefill_chunk], start)
            rows.append([int(logits.argmax())])
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


def load(asked: dict[str, Any]) -> serving.Engine:
    entry = inprocess.read_entry(Path(asked["entry"]), asked["threads"])
    return EngineLoop(entry) if asked["loop"] == "engine" else runner_loop(entry)


if __name__ == "__main__":
    serving.serve(load)
