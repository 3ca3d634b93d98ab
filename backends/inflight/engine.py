"""The loop: plan -> run -> sample, one iteration a step, on a thread of its own.

A step that fails for want of memory is made again without the sequence that came last. When the device itself fails,
the model is opened again on the CPU, and whoever was running goes on there from its tokens.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from .costs import Costs
from .counters import Counters
from .errors import DeadlineExceeded, DeviceLost, EngineError, Internal, OutOfMemory, Unavailable
from .pace import Pace
from .scheduler import Plan, Scheduler
from .sequence import Sequence
from .steps import ModelRunner, Steps, Tuning

WAITED_S = 0.02  # who was queued for longer is told when it gets a slot
REOPEN_S = 60.0  # opening the model again is no stalled step until it takes longer than this


@dataclass(frozen=True)
class Load:
    """What the engine is doing now. `step_age_s` is the age of the step in progress, 0 when idle; `slots` how many
    may run at once now; `fallback`: it runs on the CPU because its device failed.
    """

    running: int
    waiting: int
    busy: bool
    step_age_s: float
    slots: int
    device: str
    fallback: bool


def _tell(line: str) -> None:
    print(f"inflight: {line}", file=sys.stderr, flush=True)


class Engine:
    """Runs sequences to their end. `submit` may be called from any thread; sinks are called on the engine's.

    `reopen` opens the model on the CPU once its device has failed; without it such a failure ends the step's requests
    as any other does. `fallback`: that has happened already. `tell` gets a line for the log; `costs` makes what learns
    the costs of steps.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        clock: Callable[[], float] = time.monotonic,
        step_delay_s: float = 0.0,
        reopen: Callable[[], ModelRunner] | None = None,
        fallback: bool = False,
        tell: Callable[[str], None] = _tell,
        tuning: Tuning = Tuning(),  # noqa: B008 (it cannot be changed)
        costs: Callable[[], Costs] = Costs,
    ) -> None:
        self._reopen, self._fallback, self._tell = reopen, fallback, tell
        self._lost: DeviceLost | None = None  # nothing more is run on the device from here on
        self._abandoned: ModelRunner | None = None
        self._dead: Internal | None = None
        self._scheduler, self._clock = scheduler, clock
        self._steps = Steps(runner, tuning, lambda: scheduler.active, self._end, tell, costs)
        self._pace = Pace(tuning.token_target_s)
        self._step_delay_s = step_delay_s  # makes a small model as slow as a large one, for tests of load and balance
        self._changed = threading.Condition()
        self._closing = False
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._loop, name="inflight-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, *sequences: Sequence) -> None:
        """Queue the sequences of one request, all or none. Raises ResourceExhausted when the queue has no room for
        them, Unavailable once the engine is closing, Internal when it can run nowhere any more.
        """
        with self._changed:
            if self._dead is not None:
                raise self._dead
            if self._closing:
                raise Unavailable("the model is being unloaded")
            now = self._clock()
            for sequence in sequences:
                sequence.queued_at = now
            self._scheduler.submit(*sequences)
            self._changed.notify()

    @property
    def closing(self) -> bool:
        return self._closing

    def load(self) -> Load:
        """What it is doing. Raises Internal when its thread has ended."""
        if self._dead is not None:
            raise self._dead
        if not self._thread.is_alive():
            raise Internal("the engine's thread has ended")
        began = self._step_began
        age = 0.0 if began is None else max(0.0, self._clock() - began)
        scheduler = self._scheduler
        running, waiting, slots = len(scheduler.active), scheduler.waiting, scheduler.bound
        return Load(running, waiting, began is not None, age, slots, self._steps.runner.device, self._fallback)

    @property
    def counters(self) -> Counters:
        """What it has done so far. May be read from any thread."""
        return self._steps.counters

    def close(self, drain_s: float) -> None:
        """Let what was submitted end for up to `drain_s` seconds, then fail the rest and stop the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(drain_s)
        with self._changed:
            for sequence in (*self._scheduler.active, *self._scheduler.drain()):
                sequence.cancelled = True
                sequence.sink.error(Unavailable("the model is being unloaded"))
            self._changed.notify()
        self._thread.join(drain_s)

    def _loop(self) -> None:
        while True:
            if self._lost is not None and self._reopen is not None:
                self._go_on_elsewhere(self._lost, self._reopen)
                if self._dead is not None:
                    return
            with self._changed:
                now = self._clock()
                self._drop_the_gone(now)
                limit = self._pace.limit(self._scheduler, self._steps.costs, now)
                plan = self._scheduler.plan(limit, self._steps.reusable)
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
            if self._run(plan):
                self._scheduler.grow()
            self._count(self._clock() - self._step_began)

    def _run(self, plan: Plan) -> bool:
        """Take a step; whether all of it was good at once."""
        good = True
        for chunk in plan.prefill:
            if chunk.reused:  # before this step keeps anything, for which something may have to go
                good = self._guard((chunk.sequence,), partial(self._steps.load, chunk)) and good
        if plan.decode:
            good = self._guard(plan.decode, partial(self._steps.decode, plan.decode)) and good
        for group in plan.groups:
            sequences = tuple(chunk.sequence for chunk in group)
            good = self._guard(sequences, partial(self._steps.prefill, group)) and good
        return good

    def _count(self, seconds: float) -> None:
        counters = self._steps.counters
        counters.steps += 1
        counters.step_s += seconds
        counters.last_step_s = seconds
        counters.kv_positions = sum(s.done for s in self._scheduler.active)

    @staticmethod
    def _tell_admitted(plan: Plan, now: float) -> None:
        for chunk in plan.prefill:
            sequence = chunk.sequence
            if not sequence.admitted and now - sequence.queued_at >= WAITED_S:
                sequence.sink.admitted()
            if not sequence.admitted:
                sequence.admitted, sequence.started_at = True, now

    def _drop_the_gone(self, now: float) -> None:
        def gone(sequence: Sequence) -> bool:
            return sequence.cancelled or now >= sequence.deadline

        for sequence in self._scheduler.drop_gone(now):
            self._report_late(sequence)
        for sequence in [s for s in self._scheduler.active if gone(s)]:
            self._remove(sequence)
            self._report_late(sequence)

    @staticmethod
    def _report_late(sequence: Sequence) -> None:
        if not sequence.cancelled:
            sequence.sink.error(DeadlineExceeded(f"the deadline passed after {sequence.generated} tokens"))

    def _guard(self, sequences: tuple[Sequence, ...], run: Callable[[], None]) -> bool:
        """Run a part of a step, again after each sequence that was shed; whether it was good at once."""
        good = True
        while self._lost is None:
            try:
                run()
                return good
            except OutOfMemory as error:
                good = False
                self._shed(error)
            except Exception as error:  # one bad step ends its own requests, not the server
                good = False
                if isinstance(error, DeviceLost) and self._reopen is not None:
                    self._lost = error
                else:
                    self._end(sequences, Internal(f"the step failed: {type(error).__name__}: {error}"))
                    return False
        return False

    def _shed(self, error: OutOfMemory) -> None:
        with self._changed:
            newest = self._scheduler.shrink()
        left = len(self._scheduler.active) - 1
        self._tell(f"{error}; 1 request was given up, {left} go on, up to {self._scheduler.bound} may run at once")
        self._end((newest,), error)

    def _go_on_elsewhere(self, error: DeviceLost, reopen: Callable[[], ModelRunner]) -> None:
        """Open the model on the CPU. Whoever has a slot is prefilled there from its tokens, and goes on behind them."""
        self._step_began = self._clock() + REOPEN_S
        running = len(self._scheduler.active)
        self._tell(f"{error}; the model is opened again on the CPU, where {running} running requests go on")
        try:
            runner = reopen()
        except Exception as again:
            self._die(Internal(f"{error}; nor can the model run on the CPU: {again}"))
            return
        # It is kept: what a session on a failed device does when it is freed may end the process.
        self._abandoned = self._steps.runner
        self._steps.change(runner)
        self._lost = self._reopen = None
        self._fallback = True
        with self._changed:
            self._scheduler.restore()
            self._scheduler.refill(self._scheduler.active)

    def _die(self, error: Internal) -> None:
        self._tell(str(error))
        with self._changed:
            self._dead = error
            for sequence in (*self._scheduler.active, *self._scheduler.drain()):
                sequence.sink.error(error)

    def _end(self, sequences: Iterable[Sequence], error: EngineError | None) -> None:
        with self._changed:
            for sequence in sequences:
                if sequence.slot >= 0:
                    self._remove(sequence)
                    if error is not None:
                        sequence.sink.error(error)

    def _remove(self, sequence: Sequence) -> None:
        """Free a slot. The sequence that is moved into it is prefilled again if its cache cannot be."""
        last = self._scheduler.active[-1]
        try:
            self._scheduler.remove(sequence, self._steps.runner.move)
        except Exception as error:
            if isinstance(error, DeviceLost) and self._reopen is not None:
                self._lost = self._lost or error
            self._tell(f"a slot could not be moved: {error}")
            self._scheduler.refill((last,))
