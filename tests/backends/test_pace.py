"""How much a step may prefill."""

from __future__ import annotations

from backends.inflight.costs import Costs
from backends.inflight.pace import LEAST, PATIENCE_S, Pace
from backends.inflight.scheduler import Scheduler
from backends.inflight.sequence import Sequence

from .fakes import sequence


def measured() -> Costs:
    """10 ms a decode step, 1 ms a further token."""
    costs = Costs()
    costs.decoded(1, 0.010)
    costs.prefilled(101, 0.110)
    return costs


def running_and(scheduler: Scheduler, *prompts: int) -> list[Sequence]:
    """A stream that decodes, and prompts of so many tokens that wait; all came at time 0."""
    first, *others = (sequence([1] * length) for length in (1, *prompts))
    scheduler.submit(first)
    scheduler.plan()
    first.done, first.generated = 1, 1
    scheduler.submit(*others)
    return others


def test_steps_keep_to_the_target_until_a_prompt_has_waited_too_long() -> None:
    """A target of 51 ms leaves 30 tokens beside one stream; once a prompt could have been done for so long, it goes by
    whole chunks.
    """
    scheduler, pace = Scheduler(2, 10, 64), Pace(0.0515)
    running_and(scheduler, 200)
    assert pace.limit(scheduler, measured(), 0.1) == 30
    assert pace.limit(scheduler, measured(), PATIENCE_S + 0.1) is None
    (chunk,) = scheduler.plan(30).prefill
    chunk.sequence.started_at = 5.0
    assert pace.limit(scheduler, measured(), 5.1) == 30
    assert pace.limit(scheduler, measured(), 5.1 + PATIENCE_S) is None


def test_waiting_for_a_slot_is_not_waiting_for_the_target() -> None:
    """With all slots taken the queue's age says nothing of chunks: patience begins when a slot becomes free."""
    scheduler, pace = Scheduler(1, 10, 64), Pace(0.0515)
    running_and(scheduler, 200)
    assert pace.limit(scheduler, measured(), 60.0) == 30
    scheduler.remove(scheduler.active[0], lambda *_: None)
    assert pace.limit(scheduler, measured(), 60.0 + PATIENCE_S / 2) == 30
    assert pace.limit(scheduler, measured(), 60.1 + PATIENCE_S) is None


def test_no_target_no_limit_and_a_hopeless_one_leaves_the_least() -> None:
    """0 switches it off; a target below a decode step's own time still lets prompts advance."""
    scheduler = Scheduler(2, 10, 64)
    running_and(scheduler, 200)
    assert Pace(0.0).limit(scheduler, measured(), 0.1) is None
    assert Pace(0.001).limit(scheduler, measured(), 0.1) == LEAST
