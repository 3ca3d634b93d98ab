import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.inflight.engine import Engine
from backends.inflight.errors import DeadlineExceeded, Internal, ResourceExhausted, Unavailable
from backends.inflight.request import SamplingParams
from backends.inflight.sampling import Pick
from backends.inflight.scheduler import Scheduler
from backends.inflight.sequence import Sequence
from backends.inflight.steps import Tuning

from .arithmetic import Cheap
from .fakes import VOCAB, Collector, FakeRunner, expected, letters, sequence


@pytest.fixture
def make_engine():
    engines = []

    def make(slots=3, max_queue=100, chunk=4, max_len=200, step_delay_s=0.0, **options):
        runner = FakeRunner(slots, max_len)
        engine = Engine(runner, Scheduler(slots, max_queue, chunk), step_delay_s=step_delay_s, **options)
        engines.append(engine)
        return engine, runner

    yield make
    for engine in engines:
        if engine._thread.ident:
            engine.close(0.2)


@settings(max_examples=40)
@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(0, 49), min_size=1, max_size=20), st.integers(1, 12), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    slots=st.integers(1, 4),
    chunk=st.integers(1, 7),
)
def test_answers_do_not_depend_on_who_else_is_in_the_batch(requests, slots, chunk):
    """Over random arrivals, lengths, slots and chunks each answer is what the model gives that prompt alone."""
    engine = Engine(FakeRunner(slots, 64), Scheduler(slots, 100, chunk))
    engine.start()
    running = []
    for prompt, count, pause in requests:
        sink = Collector()
        engine.submit(sequence(prompt, count, sink))
        running.append((prompt, count, sink))
        if pause:
            time.sleep(0.001)
    for prompt, count, sink in running:
        assert sink.ended.wait(5)
        assert sink.failure is None
        assert sink.tokens == expected(prompt, count)
        assert sink.deltas[-1].finish == "length" and len(sink.deltas) == count
    engine.close(1)


def test_sixty_four_requests_on_four_slots_all_end(make_engine):
    """More requests than slots wait their turn and every one is answered in full."""
    engine, runner = make_engine(slots=4)
    engine.start()
    sinks = [Collector() for _ in range(64)]
    for i, sink in enumerate(sinks):
        engine.submit(sequence([i % 50, 3], 7, sink))
    assert all(sink.ended.wait(10) for sink in sinks)
    assert [s.tokens for s in sinks] == [expected([i % 50, 3], 7) for i in range(64)]
    assert max(runner.steps) == 4


def test_only_who_waited_is_told_of_the_admission(make_engine):
    """A request that was queued behind another's steps is told once, before its first token; others are not told."""
    engine, _ = make_engine(slots=1, chunk=1, step_delay_s=0.01)
    engine.start()
    first, second, third = Collector(), Collector(), Collector()
    engine.submit(sequence([1], 5, first))
    engine.submit(sequence([2, 3, 4], 2, second))
    assert first.ended.wait(5) and second.ended.wait(5)
    time.sleep(0.05)
    engine.submit(sequence([5], 1, third))
    assert third.ended.wait(5)
    assert (first.admissions, second.admissions, third.admissions) == ([], [0], [])


def test_a_cancelled_sequence_frees_its_slot_within_one_step(make_engine):
    """After cancelling, the one slot goes to the next request and the cancelled one gets nothing more."""
    engine, _ = make_engine(slots=1, step_delay_s=0.01)
    engine.start()
    first, second = Collector(), Collector()
    long = sequence([1], 150, first)
    engine.submit(long)
    engine.submit(sequence([2], 2, second))
    time.sleep(0.05)
    long.cancelled = True
    assert second.ended.wait(5)
    count = len(first.deltas)
    time.sleep(0.05)
    assert len(first.deltas) == count and not first.ended.is_set()


def test_cancelling_while_queued_and_while_prefilling_leaves_no_trace(make_engine):
    """A request that is given up in the queue or in the middle of its prompt never produces a token."""
    engine, _ = make_engine(slots=1, chunk=1, step_delay_s=0.01)
    engine.start()
    prefilling, queued, last = Collector(), Collector(), Collector()
    a, b = sequence([1] * 150, 5, prefilling), sequence([2], 5, queued)
    for s in (a, b, sequence([3], 1, last)):
        engine.submit(s)
    time.sleep(0.05)
    a.cancelled = b.cancelled = True
    assert last.ended.wait(5)
    assert not prefilling.deltas and not queued.deltas
    assert engine.load().waiting == 0


def test_a_deadline_ends_running_and_waiting_requests_with_an_error(make_engine):
    """A passed deadline is an error of its own kind, in a slot and in the queue."""
    engine, _ = make_engine(slots=1, step_delay_s=0.01)
    engine.start()
    running, waiting = Collector(), Collector()
    engine.submit(sequence([1], 150, running, deadline=time.monotonic() + 0.1))
    engine.submit(sequence([2], 5, waiting, deadline=time.monotonic() + 0.05))
    assert waiting.ended.wait(5) and isinstance(waiting.failure, DeadlineExceeded)
    assert running.ended.wait(5) and isinstance(running.failure, DeadlineExceeded)
    assert running.deltas


@pytest.mark.parametrize("speculation", [False, True])
def test_nan_ends_one_request_and_not_its_neighbours(make_engine, speculation):
    """Non-finite logits are an error for their own row, also among those of a draft; the other rows and later requests
    go on.
    """
    engine, runner = make_engine(slots=2, step_delay_s=0.002, tuning=Tuning(speculation=speculation), costs=Cheap)
    fed_to_the_good_one = {4, *expected([4], 20)}
    runner.nan_on = {next(t for t in expected([9, 9], 19) if t not in fed_to_the_good_one)}
    engine.start()
    bad, good, later = Collector(), Collector(), Collector()
    engine.submit(sequence([9, 9], 20, bad))
    engine.submit(sequence([4], 20, good))
    assert bad.ended.wait(5) and isinstance(bad.failure, Internal) and "not finite" in str(bad.failure)
    assert good.ended.wait(5) and good.tokens == expected([4], 20)
    engine.submit(sequence([4], 3, later))
    assert later.ended.wait(5) and later.tokens == expected([4], 3)


def test_a_failing_step_ends_its_requests_and_not_the_engine(make_engine):
    """An exception of the session is reported to the requests of that step; the engine serves the next one."""
    engine, runner = make_engine(slots=2)
    runner.fail_on = {7}
    engine.start()
    bad, good = Collector(), Collector()
    engine.submit(sequence([7], 3, bad))
    assert bad.ended.wait(5) and isinstance(bad.failure, Internal) and "session failed" in str(bad.failure)
    engine.submit(sequence([4], 3, good))
    assert good.ended.wait(5) and good.tokens == expected([4], 3)
    assert engine.load().running == 0


def test_closing_drains_what_was_submitted_and_refuses_what_is_new(make_engine):
    """Closing lets running requests end, fails what does not end in time, and refuses new ones."""
    engine, _ = make_engine(slots=1, step_delay_s=0.01)
    engine.start()
    short, long = Collector(), Collector()
    engine.submit(sequence([1], 3, short))
    engine.submit(sequence([1], 190, long))
    engine.close(0.3)
    assert short.tokens == expected([1], 3)
    assert isinstance(long.failure, Unavailable)
    with pytest.raises(Unavailable):
        engine.submit(sequence([1]))
    assert not engine._thread.is_alive()


def test_the_queue_is_bounded(make_engine):
    """What does not fit into the waiting queue is refused at once."""
    engine, _ = make_engine(slots=1, max_queue=2)  # not started: nothing is taken out of the queue
    engine.submit(sequence([1]))
    engine.submit(sequence([1]))
    with pytest.raises(ResourceExhausted):
        engine.submit(sequence([1]))


def test_the_sequences_of_one_request_are_queued_whole_or_not_at_all(make_engine):
    """Of answers that do not all fit none is left in the queue, and a request that fits still does."""
    engine, _ = make_engine(slots=1, max_queue=3)
    engine.submit(sequence([1]))
    with pytest.raises(ResourceExhausted):
        engine.submit(*(sequence([1]) for _ in range(3)))
    engine.submit(sequence([1]), sequence([1]))
    with pytest.raises(ResourceExhausted):
        engine.submit(sequence([1]))


def test_end_tokens_end_an_answer_unless_they_are_ignored():
    """With ignore_eos an answer has as many tokens as were asked for, whatever the model says."""

    def ends(ignore):
        how = SamplingParams(temperature=0.0, ignore_eos=ignore)
        one = Sequence([1], how, 3, frozenset({7}), letters, Collector(), float("inf"), VOCAB)
        return [one.accept(Pick(token)).finish for token in ([5, 7, 7] if ignore else [5, 7])]

    assert ends(False) == [None, "stop"] and ends(True) == [None, None, "length"]
