"""Runs the parts of a step on the model: decoding, verifying drafts, prefilling, and the reuse of prefixes.

Exactness. On the CPU in float32 a position's bits depend on one thing beside its tokens: whether its run took one
token of the row or several (ONNX Runtime's attention has another kernel for one query, which it also uses for the last
query of a chunk that is by one longer than a multiple of its block of queries). So a prompt is fed by even numbers of
tokens, its answer token by token, and what is kept of an `exact` model's caches is of prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import sampling
from .costs import Costs
from .counters import Counters
from .errors import DeviceLost, EngineError, Internal
from .prefix import BLOCK, Prefixes
from .sampling import Pick
from .scheduler import Chunk
from .sequence import Sequence
from .speculation import Speculation, too_close

NONFINITE = "the model produced logits that are not finite (NaN or infinity); the answer stops here"


class ModelRunner(Protocol):
    """What the loop needs of a model; see runner.Runner. `device` is where it runs, as the heartbeat says it;
    `can_verify`: its graph gives logits for several positions.
    """

    device: str
    can_verify: bool

    def decode(self, tokens: Ids[int], positions: Ids[int]) -> NDArray[np.float32]: ...

    def prefill(self, slot: int, tokens: Ids[int], start: int) -> NDArray[np.float32]: ...

    def prefill_fresh(self, first_slot: int, prompts: Ids[Ids[int]]) -> NDArray[np.float32]: ...

    def verify(self, slot: int, tokens: Ids[int], start: int) -> NDArray[np.float32]: ...

    def save(self, slot: int, start: int, stop: int) -> Any: ...  # a prefix.Block

    def load(self, slot: int, start: int, block: Any) -> None: ...  # one that it saved

    def move(self, source: int, target: int, length: int) -> None: ...


@dataclass(frozen=True)
class Tuning:
    """How the engine saves time. `prefix_cache_bytes` 0: no reuse of prefixes; `token_target_s` 0: chunks are as large
    as the scheduler's; `exact`: answers are the same to the last token alone and in company (float32 on the CPU), so
    nothing may change a bit.
    """

    prefix_cache_bytes: int = 0
    token_target_s: float = 0.0
    speculation: bool = False
    exact: bool = True


class Steps:
    """The parts of steps. `active` gives the running sequences, index = slot; `end` ends one, with an error or without.

    What the runner raises goes on to the caller; each part may then be run again.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tuning: Tuning,
        active: Callable[[], tuple[Sequence, ...]],
        end: Callable[[Iterable[Sequence], EngineError | None], None],
        tell: Callable[[str], None],
        costs: Callable[[], Costs],
    ) -> None:
        self.runner, self._tuning, self._active, self._end, self._tell = runner, tuning, active, end, tell
        self._new_costs = costs
        self.counters, self.costs = Counters(), costs()
        self._speculation = Speculation(self.costs, tuning.exact)
        self._prefixes = Prefixes(tuning.prefix_cache_bytes)
        self._keeps = tuning.prefix_cache_bytes > 0
        self._keeps_answers = self._keeps and not tuning.exact

    def change(self, runner: ModelRunner) -> None:
        """Run on another device from here on: what was measured and kept is of the one before."""
        self.runner, self.costs = runner, self._new_costs()
        self._speculation = Speculation(self.costs, self._tuning.exact)
        self._prefixes.clear()

    def reusable(self, sequence: Sequence) -> int:
        """How many positions of a new sequence can be loaded: all but one of its prompt at most, which logits need."""
        return self._prefixes.length(sequence.tokens, len(sequence.tokens) - 1)

    def load(self, chunk: Chunk) -> None:
        """Bring the positions in front of a new sequence's first chunk into its slot."""
        sequence = chunk.sequence
        if sequence.slot < 0 or sequence.done:
            return
        try:
            for number, block in enumerate(self._prefixes.find(sequence.tokens, chunk.start)):
                self.runner.load(sequence.slot, number * BLOCK, block)
        except DeviceLost:
            raise
        except Exception as error:
            self._forget(error)
            return
        sequence.done = sequence.cached = chunk.start
        self.counters.cached_tokens += chunk.start

    def decode(self, planned: Ids[Sequence]) -> None:
        """Feed one token of each, or a draft of several where that is faster."""
        running = [s for s in planned if s.slot >= 0 and not s.prefilling]  # some were shed, or lost their cache
        drafts = {}
        if self._tuning.speculation and self.runner.can_verify:
            drafts = self._speculation.drafts(running)
        for sequence, draft in drafts.items():
            self._verify(sequence, draft)
        # A draft may have ended its sequence, and so moved another one to its slot.
        self._decode([s for s in running if s not in drafts and s.slot >= 0 and not s.prefilling])

    def prefill(self, chunks: Ids[Chunk]) -> None:
        """Feed chunks of prompts: several, which are whole, in one go."""
        # Others failed earlier in this step, lost their cache, or were done before an error that others had.
        chunks = [c for c in chunks if c.sequence.slot >= 0 and c.sequence.done == c.start]
        if not chunks:
            return
        first, began = chunks[0].sequence.slot, time.perf_counter()
        if len(chunks) > 1 and [c.sequence.slot for c in chunks] == [first + i for i in range(len(chunks))]:
            logits = self.runner.prefill_fresh(first, [c.sequence.tokens[: c.stop] for c in chunks])
            self.costs.prefilled(len(chunks) * max(c.stop for c in chunks), time.perf_counter() - began)
            self._prefilled(chunks, logits)
            return
        for chunk in chunks:
            # One position more than is new where that makes their number even; it gets the bits that it has.
            odd = self._tuning.exact and chunk.start > 0 and (chunk.stop - chunk.start) % 2
            start = chunk.start - (1 if odd else 0)
            sequence, began = chunk.sequence, time.perf_counter()
            logits = self.runner.prefill(sequence.slot, sequence.tokens[start : chunk.stop], start)
            self.costs.prefilled(chunk.stop - start, time.perf_counter() - began)
            self._prefilled([chunk], logits)

    def _decode(self, decode: Ids[Sequence]) -> None:
        if not decode:
            return
        # Rows are slots. A slot in the range that does not decode gets a row too: what it writes at position `done` is
        # overwritten by its sequence's next run.
        rows = 1 + max(s.slot for s in decode)
        tokens, positions = [0] * rows, [0] * rows
        for sequence in self._active()[:rows]:
            positions[sequence.slot] = sequence.done
            tokens[sequence.slot] = 0 if sequence.prefilling else sequence.tokens[sequence.done]
        began = time.perf_counter()
        logits = self.runner.decode(tokens, positions)
        self.costs.decoded(rows, time.perf_counter() - began)
        picking = [s for s in decode if s.fed()]
        for sequence in picking:
            if self._keeps_answers and sequence.done % BLOCK == 0:
                self._keep(sequence)
        slots = [s.slot for s in picking]
        picks = sampling.pick(logits, [s.sampling for s in picking], slots)
        for sequence, slot, pick in zip(picking, slots, picks, strict=True):
            self._accept(sequence, logits[slot], pick)

    def _verify(self, sequence: Sequence, draft: list[int]) -> None:
        began, began_at = time.perf_counter(), sequence.done
        fed = [sequence.tokens[sequence.done], *draft]
        logits = self.runner.verify(sequence.slot, fed, sequence.done)
        self.costs.verified(len(fed), time.perf_counter() - began)
        if self._tuning.exact and sequence.exact is None:
            sequence.exact = sequence.done
        right = 0
        for row, drafted in enumerate([*draft, -1]):
            sequence.done += 1
            (pick,) = sampling.pick(logits[row : row + 1], [sequence.sampling])
            goes_on = self._accept(sequence, logits[row], pick)
            if pick is None or pick.token != drafted:
                break
            right += 1
            if not goes_on:
                break
        if self._keeps_answers and sequence.slot >= 0 and (sequence.done - began_at) >= sequence.done % BLOCK + 1:
            self._keep(sequence)
        self._speculation.learn(len(draft), right)
        self.counters.drafted += len(draft)
        self.counters.accepted += right

    def _keep(self, sequence: Sequence) -> None:
        """Keep what is new of a sequence's positions, so that others need not compute it."""
        try:
            self._prefixes.keep(
                sequence.tokens, sequence.done, lambda start, stop: self.runner.save(sequence.slot, start, stop)
            )
        except DeviceLost:
            raise
        except Exception as error:
            self._forget(error)
        self.counters.prefix_bytes = self._prefixes.bytes

    def _forget(self, error: Exception) -> None:
        """Go on without what was kept: nobody needs it."""
        self._prefixes.clear()
        self._tell(f"prefixes are kept anew, for one could not be copied: {type(error).__name__}: {error}")

    def _prefilled(self, chunks: Ids[Chunk], logits: NDArray[np.float32]) -> None:
        for chunk in chunks:
            chunk.sequence.done = chunk.stop
            self.counters.prefill_tokens += chunk.stop - chunk.start
            if self._keeps and not chunk.sequence.generated:
                self._keep(chunk.sequence)
        new = [(row, s) for row, s in enumerate(c.sequence for c in chunks) if not (s.generated or s.prefilling)]
        rows = [row for row, _ in new]
        picks = sampling.pick(logits, [s.sampling for _, s in new], rows) if new else []
        for (row, sequence), pick in zip(new, picks, strict=True):
            self._accept(sequence, logits[row], pick)

    def _accept(self, sequence: Sequence, logits: NDArray[np.float32], pick: Pick | None) -> bool:
        """Take a pick; whether the answer goes on with it."""
        if pick is None:
            self._end((sequence,), Internal(NONFINITE))
            return False
        if sequence.exact is not None and too_close(logits):
            sequence.go_back(sequence.exact)
            return False
        delta = sequence.accept(pick)
        self.counters.decode_tokens += 1
        if delta.finish is not None:
            self._end((sequence,), None)
        sequence.sink.delta(delta)
        return delta.finish is None
