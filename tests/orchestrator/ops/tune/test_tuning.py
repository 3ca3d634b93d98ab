"""A tuning from its first measurement to its verdict, on a rig whose figures are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.ops.tune.errors import CandidateError, TuneError
from orchestrator.ops.tune.figures import Bounds, Figures, Workload
from orchestrator.ops.tune.history import History, Subject
from orchestrator.ops.tune.knobs import Knob, Point
from orchestrator.ops.tune.tuning import Plan, Result, Tuning

KNOBS = (Knob("slots", ("parameters", "slots"), ("2", "4", "8", "16"), "4"),
         Knob("threads", ("parameters", "threads"), ("0", "1", "2"), "0"))  # fmt: skip
SUBJECT = Subject("demo", "entry", "a machine", 8, 128, 64)
PLAN = Plan(Workload(8, 128, 64), trials=11, rounds=3, budget_s=10_000)


class Rig:
    """Answers with `rule`'s figures, each measurement taking `took_s` of the clock; a machine of changing speed."""

    def __init__(self, rule: Callable[[Point], Figures], took_s: float = 10.0) -> None:
        self.asked: list[tuple[Point, int]] = []
        self.now = 0.0
        self._rule, self._took_s = rule, took_s

    async def figures(self, point: Point, requests: int, limit_s: float) -> Figures:
        assert limit_s > self._took_s
        self.asked.append((dict(point), requests))
        self.now += self._took_s
        figures = self._rule(point).scaled(1.2 if len(self.asked) % 2 else 0.9)
        return replace(figures, rate=figures.throughput / 64)

    def clock(self) -> float:
        return self.now


def speed(point: Point) -> Figures:
    """Twice the slots answer twice as much, later; a second thread fails, and one thread changes nothing."""
    if point["threads"] == "2":
        raise CandidateError("it does not load: no memory")
    slots = int(point["slots"])
    return Figures(64 * slots, {2: 1.0, 4: 1.0, 8: 1.05, 16: 3.0}[slots], 0.1, 0.01)


async def tuned(tmp_path: Path, rig: Rig, plan: Plan = PLAN, busy: Callable[[], int] = lambda: 0) -> Result:
    seen: list[int] = []
    history = History(tmp_path, SUBJECT)
    result = await Tuning(rig, KNOBS, plan, history, lambda t, done, total: seen.append(done), busy, rig.clock).run()
    assert seen == [*range(1, len(result.trials) + 1)]
    return result


async def test_the_best_under_the_bounds_wins(tmp_path: Path) -> None:
    """What is set comes first; a candidate that fails costs itself; the winner has the change that gains, no other."""
    rig = Rig(speed)
    result = await tuned(tmp_path, rig, replace(PLAN, bounds=Bounds(latency_s=2.0)))
    assert rig.asked[0][0] == rig.asked[1][0] == result.point == {"slots": "4", "threads": "0"}
    assert rig.asked[0][1] == 16 and rig.asked[2][1] > 24, "the first ones say how many make a trial"
    assert result.winner is not None and result.winner.point == {"slots": "8", "threads": "0"}
    assert 1.4 < result.winner.ratio < 2.8 and result.rounds == 3
    failed = [trial for trial in result.trials if trial.figures is None]
    assert {trial.point["threads"] for trial in failed} == {"2"} and "no memory" in failed[0].error
    document = result.to_json()
    assert document["winner"]["settings"] == {"slots": "8", "threads": "0"} and document["bounds"] == {"latency_s": 2.0}
    assert {row["settings"]["slots"] for row in document["frontier"]} <= {"2", "4", "8", "16"}


async def test_what_is_not_better_by_the_margin_does_not_win(tmp_path: Path) -> None:
    """Nothing is written for nothing, however lucky a single measurement was."""
    result = await tuned(tmp_path, Rig(lambda point: Figures(100 + int(point["slots"]) / 10, 1.0, 0.1, 0.01)))
    assert result.winner is None and all(not verdict.better for verdict in result.verdicts)


async def test_by_default_nothing_may_become_later(tmp_path: Path) -> None:
    """The bounds are 1.1 times what is set: eight slots keep them, sixteen do not."""

    def rule(point: Point) -> Figures:
        return replace(speed({**point, "threads": "0"}), latency_s={2: 1, 4: 1, 8: 1.05, 16: 1.5}[int(point["slots"])])

    class Steady(Rig):
        async def figures(self, point: Point, requests: int, limit_s: float) -> Figures:
            rate = (await super().figures(point, requests, limit_s)).rate
            return replace(rule(point), rate=rate)

    result = await tuned(tmp_path, Steady(rule))
    assert result.bounds.latency_s == pytest.approx(1.1)
    assert result.winner is not None and result.winner.point["slots"] == "8"


async def test_a_later_tuning_begins_with_what_is_known(tmp_path: Path) -> None:
    """The best of the history is measured first, whatever the machine's speed was, and both runs are in it."""
    plan = replace(PLAN, bounds=Bounds(latency_s=2.0))
    await tuned(tmp_path, Rig(speed), plan)
    count = len(History(tmp_path, SUBJECT).load())
    rig = Rig(lambda point: speed(point).scaled(0.5))
    result = await tuned(tmp_path, rig, replace(plan, trials=1))
    assert rig.asked[2][0]["slots"] == "8"
    assert result.winner is not None and result.winner.point == {"slots": "8", "threads": "0"}
    assert len(History(tmp_path, SUBJECT).load()) == count + len(result.trials)


async def test_the_time_that_is_given_is_kept(tmp_path: Path) -> None:
    """Trials end when the final rounds would have no time left; without time for those, nothing is decided."""
    rig = Rig(speed)
    result = await tuned(tmp_path, rig, replace(PLAN, bounds=Bounds(latency_s=2.0), budget_s=160))
    assert rig.now <= 160 and result.rounds == 3 and len(rig.asked) <= 16
    rig = Rig(speed)
    result = await tuned(tmp_path / "b", rig, replace(PLAN, budget_s=60))
    assert rig.now < 60 and result.winner is None and not result.verdicts


async def test_a_machine_that_is_suddenly_slow_leaves_it_undecided(tmp_path: Path) -> None:
    """Fewer rounds than half of those that were wanted say nothing, and that is said."""

    class Slower(Rig):
        async def figures(self, point: Point, requests: int, limit_s: float) -> Figures:
            if len(self.asked) == 7:
                self.now += 10_000
            return await super().figures(point, requests, limit_s)

    result = await tuned(tmp_path, Slower(speed), replace(PLAN, trials=4, bounds=Bounds(latency_s=2.0)))
    assert result.rounds == 1 and result.winner is None and "1 of 3 final rounds" in result.notes[0]


async def test_what_is_set_has_to_be_measurable(tmp_path: Path) -> None:
    """Otherwise there is nothing to compare with: the reason is told, and nothing is written down as a result."""

    def broken(point: Point) -> Figures:
        raise CandidateError("it does not load: damaged")

    with pytest.raises(TuneError, match="as it is set now cannot be measured: it does not load: damaged"):
        await tuned(tmp_path, Rig(broken))


async def test_a_busy_stack_is_told_of(tmp_path: Path) -> None:
    """Its requests disturb the figures: each trial says so, and so does the result."""
    result = await tuned(tmp_path, Rig(speed), replace(PLAN, trials=1), busy=lambda: 3)
    assert all(trial.busy == 3 for trial in result.trials) and any("was busy during" in one for one in result.notes)


async def test_a_machine_that_is_not_quiet_is_told_of(tmp_path: Path) -> None:
    """Where what is set is measured as other things each time, that is said with its least and greatest."""
    result = await tuned(tmp_path, Rig(speed), replace(PLAN, bounds=Bounds(latency_s=2.0)))
    assert any("between 230.4 and 307.2 a second: the machine is not quiet" in note for note in result.notes)
