"""A model made by hand whose next token depends on all that its slot holds, down to which arithmetic made it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence as Ids

import numpy as np
from numpy.typing import NDArray

from backends.inflight import sampling
from backends.inflight.costs import Costs
from backends.inflight.sequence import Sequence

VOCAB = 50
MAX_LEN = 160
QUERIES = 4  # of a block; a real one has twice the size of a head
CHUNK, SINGLE = 0, 1


class TwoArithmetics:
    """Keeps tokens and, for each position, which kernel made it, as ONNX Runtime has them on the CPU: another one for
    a block of queries with a single query in it (the first position is the same by either).

    A row's logits are a hash of all its tokens; which kernels made them changes the last bits, and so the place of
    logits that are equal but for those, of which there are many. Texts copy themselves now and then.
    """

    device = "cpu"
    can_verify = True

    def __init__(self, slots: int) -> None:
        self.cache = np.full((slots, MAX_LEN), -1, np.int64)
        self.kinds = np.full((slots, MAX_LEN), -1, np.int64)
        self.used = {"joint": 0, "verified": 0, "loaded": 0}

    def decode(self, tokens: Ids[int], positions: Ids[int]) -> NDArray[np.float32]:
        return np.concatenate([self._feed(s, [t], p) for s, (t, p) in enumerate(zip(tokens, positions, strict=True))])

    def prefill(self, slot: int, tokens: Ids[int], start: int) -> NDArray[np.float32]:
        if start == 0:
            return self._fresh(slot, tokens)
        return self._feed(slot, tokens, start)[-1:]

    def prefill_fresh(self, first_slot: int, prompts: Ids[Ids[int]]) -> NDArray[np.float32]:
        self.used["joint"] += 1
        return np.concatenate([self._fresh(first_slot + i, prompt) for i, prompt in enumerate(prompts)])

    def verify(self, slot: int, tokens: Ids[int], start: int) -> NDArray[np.float32]:
        self.used["verified"] += 1
        return self._feed(slot, tokens, start)

    def save(self, slot: int, start: int, stop: int) -> NDArray[np.int64]:
        return np.stack([self.cache[slot, start:stop], self.kinds[slot, start:stop]])

    def load(self, slot: int, start: int, block: NDArray[np.int64]) -> None:
        self.used["loaded"] += 1
        self.cache[slot, start : start + block.shape[1]], self.kinds[slot, start : start + block.shape[1]] = block

    def move(self, source: int, target: int, length: int) -> None:
        for array in (self.cache, self.kinds):
            array[target, :length] = array[source, :length]
            array[target, length:] = array[source] = -1

    def _fresh(self, slot: int, tokens: Ids[int]) -> NDArray[np.float32]:
        """A whole prompt or the beginning of one, padded to an even length as the runner does it."""
        padded = [*tokens, *([0] * (len(tokens) > 1 and len(tokens) % 2))]
        return self._feed(slot, padded, 0)[len(tokens) - 1 : len(tokens)]

    def _feed(self, slot: int, tokens: Ids[int], start: int) -> NDArray[np.float32]:
        stop = start + len(tokens)
        self.cache[slot, start:stop], self.kinds[slot, start:stop] = tokens, CHUNK
        if len(tokens) % QUERIES == 1 and stop > 1:
            self.kinds[slot, stop - 1] = SINGLE
        return np.stack([self._logits(slot, end) for end in range(start + 1, stop + 1)])

    def _logits(self, slot: int, length: int) -> NDArray[np.float32]:
        tokens, kinds = self.cache[slot, :length], self.kinds[slot, :length]
        assert (tokens >= 0).all()
        seed = zlib.crc32(tokens.tobytes())
        logits = np.random.Generator(np.random.PCG64(seed)).integers(0, 200, VOCAB) / 50
        if seed % 4 and length > 5:
            logits[tokens[-5]] += 4
        last_bits = np.random.Generator(np.random.PCG64(zlib.crc32(kinds.tobytes(), seed))).random(VOCAB)
        return (logits + 1e-5 * last_bits).astype(np.float32)


def alone(sequence: Sequence) -> list[int]:
    """The tokens of a sequence that runs by itself, without an engine: its prompt in one go, then token by token."""
    runner, made = TwoArithmetics(1), []
    logits = runner.prefill(0, sequence.tokens, 0)
    while True:
        (pick,) = sampling.pick(logits, [sequence.sampling])
        assert pick is not None
        made.append(pick.token)
        if sequence.accept(pick).finish is not None:
            return made
        logits = runner.decode([pick.token], [len(sequence.tokens) - 1])


class Cheap(Costs):
    """Costs of a machine on which feeding more tokens costs hardly more: drafts are always worth their while."""

    def decode(self, rows: int) -> float:
        return 1.0

    def verify(self, tokens: int) -> float:
        return 0.01 + 0.001 * tokens

    def chunk(self, rows: int, target_s: float, least: int, most: int) -> int:
        return 6
