"""A model and a sink made by hand, so that the engine's policy can be tested without tensors that mean anything."""

from __future__ import annotations

import threading
from collections.abc import Sequence as Ids

import numpy as np
from numpy.typing import NDArray

from backends.inflight.errors import DeviceLost, EngineError, OutOfMemory
from backends.inflight.request import SamplingParams
from backends.inflight.sequence import Delta, Sequence

VOCAB = 50


def next_token(history: Ids[int]) -> int:
    """The fake model's greedy choice: a function of everything the sequence has seen so far."""
    return (sum((i + 1) * t for i, t in enumerate(history)) + len(history)) % VOCAB


def expected(prompt: Ids[int], count: int) -> list[int]:
    """What the fake model answers to a prompt when it runs alone."""
    history = list(prompt)
    for _ in range(count):
        history.append(next_token(history))
    return history[len(prompt) :]


class FakeRunner:
    """Keeps token ids where a real runner keeps keys and values, with the same slots, moves and garbage rows."""

    device = "cpu"
    can_verify = True

    def __init__(self, slots: int, max_len: int) -> None:
        self.joint: list[int] = []  # how many prompts each prefill of several had
        self.verified: list[int] = []  # how many tokens each verification had
        self.cache = np.full((slots, max_len), -1, np.int64)
        self.steps: list[int] = []
        self.fail_on: set[int] = set()  # tokens that make a step raise
        self.nan_on: set[int] = set()  # tokens whose row comes out as NaN

    def decode(self, tokens: Ids[int], positions: Ids[int]) -> NDArray[np.float32]:
        self.steps.append(len(tokens))
        for slot, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            self.cache[slot, position] = token
        return np.stack([self._logits(s, p + 1, [t]) for s, (t, p) in enumerate(zip(tokens, positions, strict=True))])

    def prefill(self, slot: int, tokens: Ids[int], start: int) -> NDArray[np.float32]:
        self.cache[slot, start : start + len(tokens)] = tokens
        return self._logits(slot, start + len(tokens), tokens)[None]

    def prefill_fresh(self, first_slot: int, prompts: Ids[Ids[int]]) -> NDArray[np.float32]:
        self.joint.append(len(prompts))
        return np.concatenate([FakeRunner.prefill(self, first_slot + i, p, 0) for i, p in enumerate(prompts)])

    def verify(self, slot: int, tokens: Ids[int], start: int) -> NDArray[np.float32]:
        self.verified.append(len(tokens))
        self.cache[slot, start : start + len(tokens)] = tokens
        return np.stack([self._logits(slot, start + i + 1, [token]) for i, token in enumerate(tokens)])

    def save(self, slot: int, start: int, stop: int) -> NDArray[np.int64]:
        return self.cache[slot, start:stop].copy()

    def load(self, slot: int, start: int, block: NDArray[np.int64]) -> None:
        self.cache[slot, start : start + len(block)] = block

    def move(self, source: int, target: int, length: int) -> None:
        self.cache[target, :length] = self.cache[source, :length]
        self.cache[source] = -1

    def _logits(self, slot: int, length: int, fed: Ids[int]) -> NDArray[np.float32]:
        if self.fail_on & set(fed):
            raise RuntimeError("the session failed")
        if self.nan_on & set(fed):
            return np.full(VOCAB, np.nan, np.float32)
        logits = np.zeros(VOCAB, np.float32)
        logits[next_token([int(t) for t in self.cache[slot, :length]])] = 1.0
        return logits


class FaultyRunner(FakeRunner):
    """One on a device with little memory that may fail for good. All calls are counted."""

    device = "cuda"

    def __init__(self, slots: int, max_len: int) -> None:
        super().__init__(slots, max_len)
        self.calls = 0
        self.short_on: set[int] = set()  # calls for which there is no memory
        self.capacity = slots  # rows that a decode step has memory for
        self.lost_on: float = float("inf")  # the call from which on the device is lost

    def decode(self, tokens: Ids[int], positions: Ids[int]) -> NDArray[np.float32]:
        self._call()
        if len(tokens) > self.capacity:
            raise OutOfMemory(f"no memory for {len(tokens)} rows")
        return super().decode(tokens, positions)

    def prefill(self, slot: int, tokens: Ids[int], start: int) -> NDArray[np.float32]:
        self._call()
        return super().prefill(slot, tokens, start)

    def prefill_fresh(self, first_slot: int, prompts: Ids[Ids[int]]) -> NDArray[np.float32]:
        self._call()
        return super().prefill_fresh(first_slot, prompts)

    def verify(self, slot: int, tokens: Ids[int], start: int) -> NDArray[np.float32]:
        self._call()
        return super().verify(slot, tokens, start)

    def save(self, slot: int, start: int, stop: int) -> NDArray[np.int64]:
        self._call()
        return super().save(slot, start, stop)

    def load(self, slot: int, start: int, block: NDArray[np.int64]) -> None:
        self._call()
        super().load(slot, start, block)

    def move(self, source: int, target: int, length: int) -> None:
        self._call()
        super().move(source, target, length)

    def _call(self) -> None:
        self.calls += 1
        if self.calls >= self.lost_on:
            self.cache[:] = -1
            raise DeviceLost("CUDA failure 700: an illegal memory access was encountered")
        if self.calls in self.short_on:
            raise OutOfMemory("no memory now")


class Collector:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.admissions: list[int] = []  # each with the number of deltas that had come before
        self.failure: EngineError | None = None
        self.ended = threading.Event()

    def admitted(self) -> None:
        self.admissions.append(len(self.deltas))

    def delta(self, delta: Delta) -> None:
        self.deltas.append(delta)
        if delta.finish is not None:
            self.ended.set()

    def error(self, error: EngineError) -> None:
        self.failure = error
        self.ended.set()

    @property
    def tokens(self) -> list[int]:
        """The ids of the answer, an end token not among them."""
        return [d.pick.token for d in self.deltas if d.finish != "stop" or d.text is not None]


def letters(ids: Ids[int]) -> str:
    """A decoder that gives each token one character."""
    return "".join(chr(0x4E00 + i) for i in ids)


def sequence(
    prompt: Ids[int],
    max_tokens: int = 5,
    sink: Collector | None = None,
    deadline: float = float("inf"),
    **params: object,
) -> Sequence:
    """A greedy sequence unless `params` says otherwise."""
    how = SamplingParams(**{"temperature": 0.0, **params})  # type: ignore[arg-type]
    return Sequence(prompt, how, max_tokens, frozenset(), letters, sink or Collector(), deadline, VOCAB)
