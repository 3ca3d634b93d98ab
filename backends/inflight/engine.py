"""The loop: plan -> run -> sample, one iteration a step, on a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from . import sampling
from .errors import DeadlineExceeded, EngineError, Internal, Unavailable
from .scheduler import Plan, Scheduler
from .sequence import Sequence

WAITED_S = 0.02  # who was queued for longer is told when it gets a slot
NONFINITE = "the model produced logits that are not finite (NaN or infinity); the answer stops here"


class ModelRunner(Protocol):
    """What the loop needs of a model; see runner.Runner."""

    def decode(self, tokens: Ids[int], positions: Ids[int]) -> NDArray[np.float32]: ...

    def prefill(self, slot: int, tokens: Ids[int], start: int) -> NDArray[np.float32]: ...

    def move(self, source: int, target: int, length: int) -> None: ...


@dataclass(frozen=True)
class Load:
    """What the engine is doing now. `step_age_s` is the age of the step in progress, 0 when idle."""

    running: int
    waiting: int
    busy: bool
    step_age_s: float


class Engine:
    """Runs sequences to their end. `submit` may be called from any thread; sinks are called on the engine's."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        clock: Callable[[], float] = time.monotonic,
        step_delay_s: float = 0.0,
    ) -> None:
        self._runner, self._scheduler, self._clock = runner, scheduler, clock
        self._step_delay_s = step_delay_s  # makes a small model as slow as a large one, for tests of load and balance
        self._changed = threading.Condition()
        self._closing = False
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._loop, name="inflight-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises ResourceExhausted when the queue is full, Unavailable once the engine is closing."""
        with self._changed:
            if self._closing:
                raise Unavailable("the model is being unloaded")
            sequence.queued_at = self._clock()
            self._scheduler.submit(sequence)
            self._changed.notify()

    @property
    def closing(self) -> bool:
        return self._closing

    def load(self) -> Load:
        """What it is doing. Raises Internal when its thread has ended."""
        if not self._thread.is_alive():
            raise Internal("the engine's thread has ended")
        began = self._step_began
        age = 0.0 if began is None else self._clock() - began
        return Load(len(self._scheduler.active), self._scheduler.waiting, began is not None, age)

    def close(self, drain_s: float) -> None:
        """Let what was submitted end for up to `drain_s` seconds, then fail the rest and stop the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(drain_s)
        with self._changed:
            for sequence in (*self._scheduler.active, *self._scheduler.drop_waiting(lambda _: True)):
                sequence.cancelled = True
                sequence.sink.error(Unavailable("the model is being unloaded"))
            self._changed.notify()
        self._thread.join(drain_s)

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._drop_the_gone()
                plan = self._scheduler.plan()
                if not plan:
                    self._step_began = None
                    if self._closing:
                        return
                    # The queue is empty here, so only a submission can change anything.
                    self._changed.wait(1.0)
                    continue
                self._step_began = self._clock()
            self._tell_admitted(plan, self._step_began)
            if self._step_delay_s:
                time.sleep(self._step_delay_s)
            if plan.decode:
                self._decode(plan.decode)
            for chunk in plan.prefill:
                self._guard((chunk.sequence,), partial(self._prefill, chunk.sequence, chunk.start, chunk.stop))

    @staticmethod
    def _tell_admitted(plan: Plan, now: float) -> None:
        for chunk in plan.prefill:
            if chunk.start == 0 and now - chunk.sequence.queued_at >= WAITED_S:
                chunk.sequence.sink.admitted()

    def _drop_the_gone(self) -> None:
        now = self._clock()

        def gone(sequence: Sequence) -> bool:
            return sequence.cancelled or now >= sequence.deadline

        for sequence in self._scheduler.drop_waiting(gone):
            self._report_late(sequence)
        for sequence in [s for s in self._scheduler.active if gone(s)]:
            self._scheduler.remove(sequence, self._runner.move)
            self._report_late(sequence)

    @staticmethod
    def _report_late(sequence: Sequence) -> None:
        if not sequence.cancelled:
            sequence.sink.error(DeadlineExceeded(f"the deadline passed after {sequence.generated} tokens"))

    def _decode(self, decode: tuple[Sequence, ...]) -> None:
        def run() -> None:
            # Rows are slots. A slot in the range that is still prefilling gets a row too: what it writes at position
            # `done` is overwritten by that sequence's next chunk.
            rows = 1 + max(s.slot for s in decode)
            tokens, positions = [0] * rows, [0] * rows
            for sequence in self._scheduler.active[:rows]:
                tokens[sequence.slot] = max(0, sequence.next_token)
                positions[sequence.slot] = sequence.done
            logits = self._runner.decode(tokens, positions)
            for sequence in decode:
                sequence.done += 1
            if len(decode) < rows:
                logits = logits[[s.slot for s in decode]]
            self._take(decode, logits)

        self._guard(decode, run)

    def _prefill(self, sequence: Sequence, start: int, stop: int) -> None:
        if sequence.slot < 0:  # failed earlier in this step
            return
        logits = self._runner.prefill(sequence.slot, sequence.prompt[start:stop], start)
        sequence.done = stop
        if not sequence.prefilling:
            self._take((sequence,), logits)

    def _take(self, sequences: tuple[Sequence, ...], logits: NDArray[np.float32]) -> None:
        good = sampling.finite_rows(logits)
        tokens = sampling.sample(np.where(good[:, None], logits, np.float32(0)) if not good.all() else logits,
                                 [s.params for s in sequences], [s.random for s in sequences])  # fmt: skip
        for row, sequence in enumerate(sequences):
            if not good[row]:
                self._end((sequence,), Internal(NONFINITE))
                continue
            delta = sequence.accept(int(tokens[row]))
            if delta.finish is not None:
                self._end((sequence,), None)
            sequence.sink.delta(delta)

    def _guard(self, sequences: tuple[Sequence, ...], run: Callable[[], None]) -> None:
        try:
            run()
        except Exception as error:  # one bad step ends its own requests, not the server
            self._end(sequences, Internal(f"the step failed: {type(error).__name__}: {error}"))

    def _end(self, sequences: Iterable[Sequence], error: EngineError | None) -> None:
        with self._changed:
            for sequence in sequences:
                if sequence.slot >= 0:
                    self._scheduler.remove(sequence, self._runner.move)
                    if error is not None:
                        sequence.sink.error(error)
