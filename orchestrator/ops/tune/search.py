"""Which candidate is measured next: a tree-structured Parzen estimator for throughput against latency under bounds.

Optuna's TPE (Bergstra et al. 2011; several objectives: Ozaki et al. 2020), asked for one point after the other. The
study is in memory: what lasts is in the history, where only what was measured to its end is written.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from math import prod

import optuna
from optuna.distributions import IntDistribution
from optuna.samplers import TPESampler
from optuna.trial import TrialState

from orchestrator.ops.tune.figures import Bounds, Figures
from orchestrator.ops.tune.knobs import Knob, Point, key

STARTUP = 8  # points at random before the estimator has something to go by
DRAWS = 8  # of points that were measured before, until another one is chosen at random
LISTED = 20_000
FAILED = 1e3  # the violation of a candidate that could not be measured

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Search:
    """The points of some knobs, each once; `seed` makes their order repeatable.

    A latency below `enough_s`, that of what is set now, is as good as that: the search is for throughput, and would
    spend half its points on answers that are quicker and fewer.
    """

    def __init__(self, knobs: Sequence[Knob], bounds: Bounds, seed: int, enough_s: float = 0.0) -> None:
        self._knobs, self._bounds, self._enough_s = tuple(knobs), bounds, enough_s
        self._random = random.Random(seed)  # noqa: S311 (chooses what to measure, no secret)
        self._distributions = {knob.name: IntDistribution(0, len(knob.values) - 1) for knob in knobs}
        sampler = TPESampler(seed=seed, n_startup_trials=STARTUP)
        self._study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        self._seen: set[tuple[tuple[str, str], ...]] = set()
        self._asked: dict[tuple[tuple[str, str], ...], optuna.Trial] = {}
        self._first: list[dict[str, str]] = []

    @property
    def size(self) -> int:
        """How many points there are."""
        return prod(len(knob.values) for knob in self._knobs)

    def holds(self, point: Point) -> bool:
        """Whether it is one of the points."""
        values = {knob.name: knob.values for knob in self._knobs}
        return set(point) == set(values) and all(point[name] in values[name] for name in values)

    def begin_with(self, points: Iterable[Point], at_most: int) -> None:
        """Ask for these, as far as they are points, before any other."""
        self._first += [dict(point) for point in points if self.holds(point)][:at_most]

    def learn(self, point: Point, figures: Figures | None) -> None:
        """What is known of a point without its being asked for; it may still be. None: it could not be measured."""
        if self.holds(point):
            values, constraints = self._told(figures)
            self._study.add_trial(
                optuna.trial.create_trial(
                    values=values, params=self._params(point), distributions=dict(self._distributions),
                    constraints=constraints,
                )
            )  # fmt: skip

    def next(self) -> dict[str, str] | None:
        """A point that was not asked for before; None when all were."""
        while self._first:
            point = self._first.pop(0)
            if self.unseen(point):
                return self._ask_for(point)
        if len(self._seen) >= self.size:
            return None
        for _ in range(DRAWS):
            trial = self._study.ask(dict(self._distributions))
            point = self._point(trial)
            if key(point) not in self._seen:
                return self._give(point, trial)
            self._study.tell(trial, state=TrialState.FAIL)
        return self._ask_for(self._unseen())

    def tell(self, point: Point, figures: Figures | None) -> None:
        """What was measured at a point that `next` has given; None: it could not be."""
        trial = self._asked.pop(key(point))
        values, constraints = self._told(figures)
        for name, violation in constraints.items():
            trial.set_constraint(name, violation)
        self._study.tell(trial, values)

    def skip(self, point: Point) -> None:
        """A point that is measured otherwise, and not asked for."""
        self._seen.add(key(point))

    def unseen(self, point: Point) -> bool:
        """Whether it was neither asked for nor skipped."""
        return key(point) not in self._seen

    def _told(self, figures: Figures | None) -> tuple[list[float], dict[str, float]]:
        if figures is None:
            return [0.0, FAILED], {"failed": FAILED}
        return [figures.throughput, max(figures.latency_s, self._enough_s)], self._bounds.violations(figures)

    def _ask_for(self, point: Point) -> dict[str, str]:
        self._study.enqueue_trial(self._params(point))
        return self._give(point, self._study.ask(dict(self._distributions)))

    def _give(self, point: Point, trial: optuna.Trial) -> dict[str, str]:
        self._seen.add(key(point))
        self._asked[key(point)] = trial
        return dict(point)

    def _unseen(self) -> dict[str, str]:
        names = [knob.name for knob in self._knobs]
        if self.size <= LISTED:
            left = [
                point for values in itertools.product(*(knob.values for knob in self._knobs))
                if key(point := dict(zip(names, values, strict=True))) not in self._seen
            ]  # fmt: skip
            return self._random.choice(left)
        while True:  # of so many, hardly any has been seen
            point = {knob.name: self._random.choice(knob.values) for knob in self._knobs}
            if key(point) not in self._seen:
                return point

    def _params(self, point: Point) -> dict[str, int]:
        return {knob.name: knob.values.index(point[knob.name]) for knob in self._knobs}

    def _point(self, trial: optuna.Trial) -> dict[str, str]:
        return {knob.name: knob.values[trial.params[knob.name]] for knob in self._knobs}
