"""A tuning from what is set now to a verdict: measured first, searched, and measured again in turns with the best."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

from orchestrator.ops.tune import choosing, knobs
from orchestrator.ops.tune.choosing import Measured, Verdict
from orchestrator.ops.tune.errors import CandidateError, TuneError
from orchestrator.ops.tune.figures import Bounds, Figures, Workload
from orchestrator.ops.tune.history import History, Row
from orchestrator.ops.tune.knobs import Knob, Point, key
from orchestrator.ops.tune.search import Search

RELATIVE = 1.1  # the bounds where none are given: so many times what is set
LIMIT = 6.0  # a candidate may take so many times as long as what is set
LIMIT_S = 60.0  # and at least so long, loading and first questions included
MOST_REQUESTS = 5000
UNQUIET = 1.25  # between the least and the greatest throughput of what is set: other work is in the way
KNOWN = 2  # points of the history that are measured first


class Rig(Protocol):
    """See rig.Rig."""

    async def figures(self, point: Point, requests: int, limit_s: float) -> Figures: ...


@dataclass(frozen=True)
class Plan:
    """What is asked for. `bounds` None: no worse than RELATIVE times what is set. `trials` are candidates, each
    measured for about `trial_s` seconds; the whole ends after about `budget_s`. `margin` 0.05 means better by 5 %.
    """

    workload: Workload
    bounds: Bounds | None = None
    trials: int = 24
    budget_s: float = 600.0
    trial_s: float = 8.0
    rounds: int = 5
    margin: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Trial:
    """One measurement. `stage` is current, search or final; `figures` None where it failed, and `error` says why."""

    stage: str
    point: Point
    figures: Figures | None
    error: str = ""
    busy: int = 0  # requests of the running stack before or after it

    def to_json(self) -> dict[str, Any]:
        figures = None if self.figures is None else self.figures.to_json()
        return {
            "stage": self.stage, "settings": dict(self.point), "figures": figures, "error": self.error or None,
            "busy": self.busy,
        }  # fmt: skip


@dataclass
class Result:
    """What came of it. `winner` None: nothing is better than what is set by the margin, or there was no time to say."""

    knobs: tuple[Knob, ...]
    plan: Plan
    bounds: Bounds
    current: Figures
    trials: list[Trial] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    winner: Verdict | None = None
    rounds: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def point(self) -> Point:
        """What is set now."""
        return knobs.point_of(self.knobs)

    def measured(self) -> list[Measured]:
        """The figures of each point, medians of what was measured of it."""
        found: dict[tuple[tuple[str, str], ...], list[Trial]] = {}
        for trial in self.trials:
            if trial.figures is not None:
                found.setdefault(key(trial.point), []).append(trial)
        return [
            (trials[0].point, choosing.medians([trial.figures for trial in trials if trial.figures is not None]))
            for trials in found.values()
        ]

    def frontier(self) -> list[Measured]:
        return choosing.frontier(self.measured())

    def to_json(self) -> dict[str, Any]:
        def row(point: Point, figures: Figures) -> dict[str, Any]:
            return {"settings": dict(point), "figures": figures.to_json()}

        def told(verdict: Verdict) -> dict[str, Any]:
            facts = {"ratio": verdict.ratio, "within_bounds": verdict.kept, "better": verdict.better}
            return row(verdict.point, verdict.figures) | facts

        return {
            "concurrency": self.plan.workload.concurrency, "prompt_tokens": self.plan.workload.prompt_tokens,
            "output_tokens": self.plan.workload.output_tokens or None, "bounds": self.bounds.to_json(),
            "bounds_relative": None if self.plan.bounds is not None else RELATIVE, "margin": self.plan.margin,
            "knobs": {knob.name: list(knob.values) for knob in self.knobs},
            "current": row(self.point, self.current), "trials": [trial.to_json() for trial in self.trials],
            "frontier": [row(*one) for one in self.frontier()], "rounds": self.rounds,
            "finalists": [told(one) for one in self.verdicts],
            "winner": None if self.winner is None else told(self.winner), "notes": self.notes,
        }  # fmt: skip


class Tuning:
    """`measured` is told of each trial, with how many there are and at most will be; `busy` how many requests disturb.

    Raises TuneError when what is set cannot be measured.
    """

    def __init__(
        self, rig: Rig, given: Sequence[Knob], plan: Plan, history: History,
        measured: Callable[[Trial, int, int], None] = lambda trial, done, total: None,
        busy: Callable[[], int] = lambda: 0, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._rig, self._knobs, self._plan, self._history = rig, tuple(given), plan, history
        self._measured, self._busy, self._clock = measured, busy, clock
        self._current = knobs.point_of(self._knobs)
        self._run, self._began = secrets.token_hex(4), clock()
        self._limit_s, self._requests = 10 * LIMIT_S, 2 * plan.workload.concurrency
        self._trials: list[Trial] = []
        self._total = 1 + plan.trials
        self._each_s = 0.0

    async def run(self) -> Result:
        known = self._history.load()
        await self._set_length()
        current = await self._baseline()
        bounds = self._plan.bounds or Bounds.around(current, RELATIVE)
        result = Result(self._knobs, self._plan, bounds, current, self._trials)
        search = self._search(known, current, bounds)
        while self._searches() and (point := search.next()) is not None:
            search.tell(point, await self._trial("search", point))
        await self._simplify(search, result)
        await self._finals(result)
        result.notes += self._disturbances()
        return result

    def _disturbances(self) -> list[str]:
        """What makes the figures less certain than they look."""
        found = []
        busy = sum(bool(trial.busy) for trial in self._trials)
        if busy:
            of = f"{busy} of {len(self._trials)} measurements"
            found.append(f"the running stack was busy during {of}: its requests disturb the figures")
        current = key(self._current)
        own = [one.figures.throughput for one in self._trials if one.figures is not None and key(one.point) == current]
        if max(own) > UNQUIET * min(own):
            found.append(
                f"what is set answered between {min(own):.4g} and {max(own):.4g} a second: the machine is not quiet, "
                "and small differences cannot be told"
            )
        return found

    async def _set_length(self) -> None:
        """How many requests a trial has. The first ones of all also warm the machine up, and are not kept."""
        began = self._clock()
        try:
            figures = await self._rig.figures(self._current, self._requests, self._limit_s)
        except CandidateError as error:
            raise _cannot_measure(error) from error
        took_s = self._clock() - began
        workload, plan = self._plan.workload, self._plan
        self._requests = max(3 * workload.concurrency, min(MOST_REQUESTS, int(figures.rate * plan.trial_s)))
        self._limit_s = max(LIMIT_S, LIMIT * (took_s + self._requests / figures.rate))

    async def _baseline(self) -> Figures:
        figures = await self._trial("current", self._current)
        if figures is None:
            raise _cannot_measure(self._trials[-1].error)
        return figures

    def _search(self, known: Sequence[Row], current: Figures, bounds: Bounds) -> Search:
        """A search that knows what was measured before. Machines differ from day to day: what is set is the measure."""
        factors = {
            run: current.throughput / median(there) for run in {row.run for row in known}
            if (there := [
                row.figures.throughput for row in known
                if row.run == run and row.figures is not None and key(row.point) == key(self._current)
            ])
        }  # fmt: skip
        rows = [
            (row.point, None if row.figures is None else row.figures.scaled(factors.get(row.run, 1.0))) for row in known
        ]
        good = [(point, figures) for point, figures in rows if figures is not None]
        loose = bounds.scaled(choosing.SLACK)
        best = sorted((one for one in good if loose.kept(one[1])), key=lambda one: -one[1].throughput)
        points = {key(point): point for point, _ in best if key(point) != key(self._current)}
        search = Search(self._knobs, bounds, self._plan.seed, current.latency_s)
        search.begin_with(points.values(), KNOWN)
        widest = {**self._current, self._knobs[0].name: self._knobs[0].values[-1]}  # slots, or instances: a good guess
        search.begin_with([widest], 1)
        for point, figures in rows:
            search.learn(point, figures)
        search.learn(self._current, current)
        search.skip(self._current)
        return search

    def _searches(self) -> bool:
        """Whether there is time for one more candidate and the final rounds."""
        tried = sum(trial.stage == "search" for trial in self._trials)
        finals_s = self._each_s * self._plan.rounds * (1 + choosing.FINALISTS)
        return tried < self._plan.trials and self._left_s() > finals_s + self._each_s

    async def _simplify(self, search: Search, result: Result) -> None:
        """Try the best without each of its changes."""
        best = self._finalists(result)
        for point in choosing.reversions(best[0], self._current) if best else ():
            if self._left_s() > self._each_s * (1 + self._plan.rounds * 2) and search.unseen(point):
                search.skip(point)
                await self._trial("search", point)

    def _finalists(self, result: Result) -> list[Point]:
        current = (self._current, result.current)
        return choosing.finalists(result.measured(), current, result.bounds, self._plan.margin)

    async def _finals(self, result: Result) -> None:
        points = self._finalists(result)
        if not points:
            return
        self._total = len(self._trials) + self._plan.rounds * (1 + len(points))
        rounds: list[dict[tuple[tuple[str, str], ...], Figures]] = []
        wanted = [self._current, *points]
        while len(rounds) < self._plan.rounds:
            if rounds and self._left_s() < self._each_s * len(wanted):
                break
            at = len(rounds) % len(wanted)  # each is the first in turn
            found = {}
            for point in [*wanted[at:], *wanted[:at]]:
                figures = await self._trial("final", point)
                if figures is not None:
                    found[key(point)] = figures
            if key(self._current) not in found:
                result.notes.append("what is set could not be measured again: nothing is decided")
                return
            rounds.append(found)
        relative = None if self._plan.bounds is not None else RELATIVE
        result.rounds = len(rounds)
        result.verdicts = choosing.verdicts(rounds, self._current, relative, result.bounds, self._plan.margin)
        if len(rounds) * 2 <= self._plan.rounds:
            note = f"there was time for {len(rounds)} of {self._plan.rounds} final rounds: nothing is decided"
            result.notes.append(f"{note}; give more --minutes")
            return
        result.winner = choosing.winner(result.verdicts, self._current, self._plan.margin)

    async def _trial(self, stage: str, point: Point) -> Figures | None:
        began, busy = self._clock(), await asyncio.to_thread(self._busy)
        figures, error = None, ""
        try:
            figures = await self._rig.figures(point, self._requests, self._limit_s)
        except CandidateError as failed:
            error = str(failed)
        busy = max(busy, await asyncio.to_thread(self._busy))
        trial = Trial(stage, dict(point), figures, error, busy)
        self._trials.append(trial)
        self._history.add(Row(dict(point), figures, self._run, time.time(), error))
        took_s = self._clock() - began
        self._each_s = took_s if stage == "current" else 0.7 * self._each_s + 0.3 * took_s
        self._total = max(self._total, len(self._trials))
        self._measured(trial, len(self._trials), self._total)
        return figures

    def _left_s(self) -> float:
        return self._plan.budget_s - (self._clock() - self._began)


def _cannot_measure(why: object) -> TuneError:
    return TuneError(f"the model as it is set now cannot be measured: {why}", "`truthgpt models verify` checks it")
