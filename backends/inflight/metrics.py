"""The engine's figures on Triton's own metrics endpoint, as custom metrics of its Python backend.

A thread of its own sends what has changed, PERIOD_S apart: each value is a message to Triton's process, 10 µs in which
no other thread of this one runs, so none is sent from the decode thread and none while nothing happens.

Sources: https://github.com/triton-inference-server/python_backend#custom-metrics; names follow
https://prometheus.io/docs/practices/naming/, the labels those of Triton's own series and vLLM's `engine`.
"""

from __future__ import annotations

import faulthandler
import hashlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from .counters import Counters
from .errors import EngineError

PERIOD_S = 0.5
HUNG_S = 60.0  # a message that Triton has not taken by then means that there is no Triton any more
ENGINES = 64  # engines of one model version in one server; another one goes without metrics
PREFIX = "truthgpt_backend_"


@dataclass(frozen=True)
class Series:
    """One family; `name` without PREFIX. `kind` is gauge or counter, whose values never fall."""

    name: str
    kind: str
    help: str


SERIES = (
    Series("requests_running", "gauge", "Requests in slots."),
    Series("requests_waiting", "gauge", "Requests in the model's queue."),
    Series("slots", "gauge", "Requests that may run at once now; 0 once the engine has failed for good."),
    Series("kv_positions_used", "gauge", "Positions of the slots that hold keys and values of running requests."),
    Series("kv_positions", "gauge", "Positions that all slots have together."),
    Series("prefix_cache_bytes", "gauge", "Memory that remembered beginnings of prompts take beside the slots."),
    Series("prefill_tokens_total", "counter", "Prompt tokens that the model has read."),
    Series("decode_tokens_total", "counter", "Tokens that were generated."),
    Series("cached_tokens_total", "counter", "Prompt tokens that were taken from the prefix cache instead of read."),
    Series("draft_tokens_total", "counter", "Tokens that speculation has guessed."),
    Series("accepted_tokens_total", "counter", "Guessed tokens that the model agreed with."),
    Series("steps_total", "counter", "Steps of the engine."),
    Series("step_seconds_total", "counter", "Seconds that those steps took; by steps_total, the mean step."),
)
LABELS = ("model", "version", "engine")


class Watched(Protocol):
    """What is read of an engine; see engine.Engine. `load` raises EngineError once it can run nothing any more."""

    @property
    def counters(self) -> Counters: ...

    def load(self) -> Any: ...


def figures(engine: Watched, positions: int) -> dict[str, float]:
    """Each series' value now; `positions` is what all slots have."""
    counted = engine.counters
    try:
        load = engine.load()
        # Whoever was cancelled has left without a step, which counts positions.
        gauges = (load.running, load.waiting, load.slots, counted.kv_positions if load.running else 0)
    except EngineError:  # it runs nothing; what it has counted stays
        gauges = (0, 0, 0, 0)
    sums = (counted.prefill_tokens, counted.decode_tokens, counted.cached_tokens, counted.drafted, counted.accepted)
    values = (*gauges, positions, counted.prefix_bytes, *sums, counted.steps, counted.step_s)
    return {series.name: float(value) for series, value in zip(SERIES, values, strict=True)}


def _tell(line: str) -> None:
    print(f"inflight: {line}", file=sys.stderr, flush=True)


@contextmanager
def _answered() -> Iterator[None]:
    """Messages to Triton are answered meanwhile, or this process ends.

    One waits for its answer for ever, and holds the interpreter's lock: if Triton is killed that very moment, only a
    thread outside of Python can do anything any more. faulthandler has one, which says where the process was.
    """
    faulthandler.dump_traceback_later(HUNG_S, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class Metrics:
    """Keeps one engine's series in Triton, from `start` until `stop` removes them.

    `family` is pb_utils.MetricFamily. A Triton without metrics has none, and serves without them: that is a line in
    the log, given to `tell`.
    """

    def __init__(
        self,
        family: Any,
        model: str,
        version: str,
        read: Callable[[], Mapping[str, float]],
        period_s: float = PERIOD_S,
        tell: Callable[[str], None] = _tell,
    ) -> None:
        self._family, self._model, self._version = family, model, version
        self._read, self._tell, self._period_s = read, tell, period_s
        self._number: _Number | None = None
        self._families: list[Any] = []
        self._metrics: dict[str, Any] = {}
        self._sent: dict[str, float] = {}
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="inflight-metrics", daemon=True)

    def start(self) -> None:
        try:
            self._number = _Number(f"{os.getppid()}/{self._model}/{self._version}")
            labels = dict(zip(LABELS, (self._model, self._version, str(self._number.value)), strict=True))
            with _answered():
                for series in SERIES:
                    kind = self._family.GAUGE if series.kind == "gauge" else self._family.COUNTER
                    family = self._family(name=PREFIX + series.name, description=series.help, kind=kind)
                    self._families.append(family)
                    self._metrics[series.name] = family.Metric(labels=labels)
        except Exception as error:  # Triton's own exception: it was started or built without metrics
            self._tell(f"{self._model} has no metrics of its own: {error}")
            self._remove()
            return
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Send the last values, then take the series away."""
        self._ending.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return  # it waits for a Triton that does not take its message, nor would it take these
        self._remove()

    def _loop(self) -> None:
        ending = False
        while not ending:
            ending = self._ending.wait(self._period_s)
            try:
                self._send()
            except Exception as error:
                self._tell(f"{self._model} has no metrics of its own any more: {error}")
                return

    def _send(self) -> None:
        values = self._read()
        changed = {name: value for name, value in values.items() if value != self._sent.get(name, 0.0)}
        if not changed:
            return
        with _answered():
            for name, value in changed.items():
                if name.endswith("_total"):
                    self._metrics[name].increment(value - self._sent.get(name, 0.0))
                else:
                    self._metrics[name].set(value)
                self._sent[name] = value

    def _remove(self) -> None:
        with _answered():
            self._metrics.clear()  # before their families, as Triton asks
            self._families.clear()
        if self._number is not None:
            self._number.close()


class _Number:
    """The lowest number from 0 that no other process has of `key`, until `close` or this process's end.

    Of the series with the same labels Triton removes the one that all have, whoever asks, and a reload starts a
    version's new process before it ends the old one: so labels differ. They are few, and the next process goes on
    counting where one that was killed has left its series. Holding a number is being bound to a name of Linux's
    abstract sockets, which leaves nothing behind (unix(7)). Raises OSError when all ENGINES numbers are taken.
    """

    def __init__(self, key: str) -> None:
        digest = hashlib.sha256(key.encode()).hexdigest()[:32]
        for self.value in range(ENGINES):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                self._socket.bind(f"\0truthgpt-backend/{digest}/{self.value}")
                return
            except OSError:
                self._socket.close()
        raise OSError(f"{ENGINES} engines of this version have metrics already")

    def close(self) -> None:
        self._socket.close()
