"""The engine when its device runs out of memory or fails: who is given up, and that nobody else notices."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.inflight.engine import Engine
from backends.inflight.errors import DeviceLost, Internal, OutOfMemory
from backends.inflight.prefix import OVERHEAD
from backends.inflight.scheduler import GROW_STEPS, Scheduler
from backends.inflight.steps import Tuning

from .arithmetic import Cheap
from .fakes import Collector, FakeRunner, FaultyRunner, expected, sequence

MAX_LEN = 400
SHARED = [i % 5 for i in range(60)]  # of many prompts; a text that drafts are right about
EVERYTHING = Tuning(prefix_cache_bytes=6 * (128 + OVERHEAD), token_target_s=1.0, speculation=True, exact=False)
Make = Callable[..., tuple[Engine, FaultyRunner, list[str]]]


@pytest.fixture
def make_engine() -> Iterator[Make]:
    """Engines over a faulty runner, not started; each with its log."""
    engines: list[Engine] = []

    def make(
        slots: int = 4,
        step_delay_s: float = 0.0,
        reopen: Callable[[], FakeRunner] | None = None,
        tuning: Tuning = Tuning(),  # noqa: B008 (it cannot be changed)
    ) -> tuple[Engine, FaultyRunner, list[str]]:
        runner, log = FaultyRunner(slots, MAX_LEN), []
        scheduler = Scheduler(slots, 100, 4)
        engine = Engine(runner, scheduler, step_delay_s=step_delay_s, reopen=reopen, tell=log.append, tuning=tuning)
        engines.append(engine)
        return engine, runner, log

    yield make
    for engine in engines:
        if engine._thread.ident:
            engine.close(0.2)


def submit(engine: Engine, *requests: tuple[list[int], int]) -> list[Collector]:
    sinks = [Collector() for _ in requests]
    for (prompt, count), sink in zip(requests, sinks, strict=True):
        engine.submit(sequence(prompt, count, sink))
    return sinks


@settings(max_examples=60)
@given(
    requests=st.lists(
        st.tuples(
            st.one_of(
                st.lists(st.integers(0, 49), min_size=1, max_size=20),
                st.integers(1, 50).map(lambda length: SHARED[:length]),
            ),
            st.integers(1, 12),
        ),
        min_size=1,
        max_size=10,
    ),
    slots=st.integers(1, 4),
    chunk=st.integers(1, 7),
    short_on=st.sets(st.integers(1, 60), max_size=5),
    lost_on=st.one_of(st.just(float("inf")), st.integers(1, 60)),
    tuning=st.sampled_from([Tuning(), EVERYTHING]),
)
def test_whoever_is_not_given_up_has_the_answer_of_an_engine_without_faults(
    requests, slots, chunk, short_on, lost_on, tuning
):
    """Shortages and the loss of the device at any call, copies of prefixes among them: no token is lost or doubled,
    and each shortage costs one request at most.
    """
    runner = FaultyRunner(slots, 64)
    runner.short_on, runner.lost_on = short_on, lost_on
    engine = Engine(
        runner,
        Scheduler(slots, 100, chunk),
        reopen=lambda: FakeRunner(slots, 64),
        tell=lambda line: None,
        tuning=tuning,
        costs=Cheap,
    )
    sinks = submit(engine, *requests)
    engine.start()
    given_up = 0
    for (prompt, count), sink in zip(requests, sinks, strict=True):
        assert sink.ended.wait(5)
        whole = expected(prompt, count)
        if sink.failure is None:
            assert sink.tokens == whole and sink.deltas[-1].finish == "length"
        else:
            assert isinstance(sink.failure, OutOfMemory) and sink.tokens == whole[: len(sink.tokens)]
            given_up += 1
        assert len(sink.deltas) == len(sink.tokens)
    assert given_up <= len(short_on)
    load = engine.load()
    assert (load.device, load.fallback) == (("cpu", True) if runner.calls >= lost_on else ("cuda", False))
    engine.close(1)


def test_only_those_who_came_last_are_given_up_and_the_bound_is_halved(make_engine: Make) -> None:
    """With memory for two of four rows the two newest get a retryable error, the others their answers; a line is told
    for each.
    """
    engine, runner, log = make_engine()
    runner.capacity = 2
    sinks = submit(engine, ([1], 30), ([2], 30), ([3], 30), ([4], 30))
    engine.start()
    assert all(sink.ended.wait(5) for sink in sinks)
    assert [type(sink.failure) for sink in sinks] == [type(None), type(None), OutOfMemory, OutOfMemory]
    assert [sink.tokens for sink in sinks[:2]] == [expected([1], 30), expected([2], 30)]
    assert sinks[3].failure is not None and sinks[3].failure.wire().startswith("out_of_memory: ")
    assert engine.load().slots == 1  # 4 were active, then 3
    assert len(log) == 2 and "3 go on, up to 2 may run at once" in log[0]


def test_the_bound_grows_back_slot_by_slot(make_engine: Make) -> None:
    """After enough good steps each, all slots are used again, and who waits meanwhile is answered."""
    engine, runner, _ = make_engine(slots=3)
    runner.short_on = {1}
    sinks = submit(engine, *(([i], 2 * GROW_STEPS) for i in range(8)))
    engine.start()
    assert all(sink.ended.wait(10) for sink in sinks)
    # Three had slots when their first prefill failed: the third was given up, two went on, and the bound was one.
    assert [i for i, sink in enumerate(sinks) if sink.failure is not None] == [2]
    assert engine.load().slots == 3
    assert next(i for i, rows in enumerate(runner.steps) if rows == 3) >= 2 * GROW_STEPS - 3  # its prefills are steps


def test_one_that_does_not_fit_alone_fails_and_the_engine_lives_on(make_engine: Make) -> None:
    """A single sequence for which there is no memory ends with an error; the next one is served."""
    engine, runner, _ = make_engine(slots=1)
    runner.capacity = 0
    engine.start()
    (bad,) = submit(engine, ([1], 5))
    assert bad.ended.wait(5) and isinstance(bad.failure, OutOfMemory)
    runner.capacity = 1
    (good,) = submit(engine, ([2], 5))
    assert good.ended.wait(5) and good.tokens == expected([2], 5)


def test_streams_go_on_on_the_cpu_when_the_device_is_lost(make_engine: Make) -> None:
    """Running, prefilling and waiting requests all end with their whole answers, no admission is told twice, and the
    loss is told once, in the log and in the load.
    """
    engine, runner, log = make_engine(slots=3, step_delay_s=0.001, reopen=lambda: FakeRunner(3, MAX_LEN))
    runner.lost_on = 40
    requests = [([1, 2, 3], 60), ([4], 50), ([5] * 100, 4), ([6], 7), ([7], 7)]
    sinks = submit(engine, *requests)
    time.sleep(0.03)  # so that the admissions are told of
    engine.start()
    assert all(sink.ended.wait(10) for sink in sinks)
    assert [sink.tokens for sink in sinks] == [expected(*request) for request in requests]
    assert [len(sink.admissions) for sink in sinks] == [1] * 5
    load = engine.load()
    assert (load.device, load.fallback, load.slots) == ("cpu", True, 3)
    assert len(log) == 1 and "CUDA failure 700" in log[0] and "CPU" in log[0]


def test_the_engine_looks_alive_while_it_opens_the_model_again(make_engine: Make) -> None:
    """Opening takes its time: the load answers, and the step's age does not grow as a stalled one's would."""
    opening, go_on = threading.Event(), threading.Event()

    def reopen() -> FakeRunner:
        opening.set()
        assert go_on.wait(10)
        return FakeRunner(4, MAX_LEN)

    engine, runner, _ = make_engine(reopen=reopen)
    runner.lost_on = 3
    engine.start()
    (sink,) = submit(engine, ([1], 5))
    assert opening.wait(5)
    time.sleep(0.1)
    load = engine.load()
    assert (load.busy, load.step_age_s, load.running) == (True, 0.0, 1)
    (late,) = submit(engine, ([2], 5))
    go_on.set()
    assert sink.ended.wait(5) and sink.tokens == expected([1], 5)
    assert late.ended.wait(5) and late.tokens == expected([2], 5)


def test_a_model_that_the_cpu_cannot_run_fails_everything_with_the_reason(make_engine: Make) -> None:
    """Where the CPU is no way out, running, waiting and later requests and the load say why."""

    def reopen() -> FakeRunner:
        raise RuntimeError("no kernel for bfloat16")

    engine, runner, _ = make_engine(slots=1, reopen=reopen)
    runner.lost_on = 3
    sinks = submit(engine, ([1], 50), ([2], 5))
    engine.start()
    for sink in sinks:
        assert sink.ended.wait(5) and isinstance(sink.failure, Internal)
        assert "CUDA failure 700" in str(sink.failure) and "no kernel for bfloat16" in str(sink.failure)
    with pytest.raises(Internal, match="no kernel for bfloat16"):
        submit(engine, ([3], 5))
    with pytest.raises(Internal, match="no kernel for bfloat16"):
        engine.load()


def test_a_device_that_is_lost_with_nowhere_to_go_is_an_error_of_its_step(make_engine: Make) -> None:
    """Without a way to the CPU the step's requests fail as by any other error of the session."""
    engine, runner, _ = make_engine()
    runner.lost_on = 3
    engine.start()
    (sink,) = submit(engine, ([1], 5))
    assert sink.ended.wait(5) and isinstance(sink.failure, Internal) and not isinstance(sink.failure, DeviceLost)
    assert engine.load().device == "cuda"


def test_prefixes_of_a_lost_device_are_not_reused(make_engine: Make) -> None:
    """What was kept went with the device: on the CPU a known prompt is computed, and then kept anew."""
    other = FakeRunner(1, MAX_LEN)
    engine, runner, _ = make_engine(slots=1, reopen=lambda: other, tuning=EVERYTHING)
    engine.start()
    (first,) = submit(engine, (SHARED, 3))
    assert first.ended.wait(5)
    runner.lost_on = runner.calls + 2
    for _ in range(3):
        (sink,) = submit(engine, (SHARED, 3))
        assert sink.ended.wait(5) and sink.tokens == expected(SHARED, 3)
    # The second one's 48 positions came from the store before its device was lost, so did the third's, from another.
    assert engine.counters.cached_tokens == 2 * 48 and engine.load().fallback
    assert (other.cache[0, : len(SHARED)] == SHARED).all()


@pytest.mark.parametrize("what", ["save", "load"])
def test_a_prefix_that_cannot_be_copied_costs_nobody_an_answer(make_engine: Make, what: str) -> None:
    """An error of a copy is told, what was kept is forgotten, and the prompt is computed."""
    engine, runner, log = make_engine(slots=1, tuning=EVERYTHING)

    def fail(*_: object) -> None:
        raise MemoryError("no memory for a copy")

    setattr(runner, what, fail)
    engine.start()
    for _ in range(3):
        (sink,) = submit(engine, (SHARED, 3))
        assert sink.ended.wait(5) and sink.tokens == expected(SHARED, 3)
    assert engine.counters.cached_tokens == 0 and "no memory for a copy" in log[0]
