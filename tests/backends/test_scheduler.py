import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.inflight.errors import ResourceExhausted
from backends.inflight.scheduler import Plan, Scheduler

from .fakes import sequence


def advance(plan: Plan) -> None:
    """Do what an engine does to the sequences of a plan, without a model."""
    for s in plan.decode:
        s.done += 1
        s.generated += 1
    for chunk in plan.prefill:
        assert chunk.start == chunk.sequence.done
        chunk.sequence.done = chunk.stop
        if not chunk.sequence.prefilling:
            chunk.sequence.generated += 1


def finished(s) -> bool:
    return s.generated >= s.budget


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=25),
    slots=st.integers(1, 5),
    chunk=st.integers(1, 16),
    cancels=st.sets(st.integers(0, 24)),
)
def test_every_sequence_ends_slots_stay_dense_and_order_is_kept(lengths, slots, chunk, cancels):
    """Whatever arrives and leaves when: no slot leaks, is shared or starves, prompts start in order of arrival."""
    scheduler = Scheduler(slots, 1000, chunk)
    arrivals = [(at, sequence([1] * n, max_tokens=new)) for n, new, at in lengths]
    order, started, ended = [], [], 0
    cancelled = {id(s) for i, (_, s) in enumerate(arrivals) if i in cancels}
    for step in range(3000):
        for at, s in arrivals:
            if at == step:
                scheduler.submit(s)
                order.append(s)
        if step == 7:
            gone = scheduler.drop_waiting(lambda s: id(s) in cancelled)
            for s in [s for s in scheduler.active if id(s) in cancelled]:
                scheduler.remove(s, lambda *_: None)
                ended += 1
            ended += len(gone)
            order = [s for s in order if s not in gone]
        plan = scheduler.plan()
        if not plan and step > 7:
            break
        started += [c.sequence for c in plan.prefill if c.start == 0]
        assert [s.slot for s in scheduler.active] == list(range(len(scheduler.active)))
        assert len(scheduler.active) <= slots
        assert not {c.sequence for c in plan.prefill} & set(plan.decode)
        assert sum(c.stop - c.start for c in plan.prefill) <= chunk or len(plan.prefill) == 1
        advance(plan)
        for s in [s for s in scheduler.active if finished(s)]:
            scheduler.remove(s, lambda *_: None)
            ended += 1
    assert ended == len(arrivals) and not scheduler.active and scheduler.waiting == 0
    assert started == order


def test_running_streams_decode_in_every_step_of_a_long_prefill():
    """A prompt of many chunks does not stall a stream that is running: both advance in each step."""
    scheduler = Scheduler(2, 10, 8)
    stream, long = sequence([1], max_tokens=100), sequence([1] * 80, max_tokens=1)
    scheduler.submit(stream)
    advance(scheduler.plan())
    scheduler.submit(long)
    for step in range(10):
        plan = scheduler.plan()
        assert plan.decode == (stream,)
        assert [(c.start, c.stop) for c in plan.prefill] == [(8 * step, 8 * step + 8)]
        advance(plan)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 16))
def test_chunks_are_cut_at_the_same_places_whatever_the_company(lengths, chunk):
    """A prompt's chunks start at multiples of the chunk size: its arithmetic never depends on its neighbours."""
    scheduler = Scheduler(len(lengths), 100, chunk)
    for length in lengths:
        scheduler.submit(sequence([1] * length, max_tokens=1000))
    while any(s.prefilling for s in scheduler.active) or scheduler.waiting:
        plan = scheduler.plan()
        for c in plan.prefill:
            assert c.start % chunk == 0 and c.stop == min(c.start + chunk, len(c.sequence.tokens))
        advance(plan)


def test_a_hole_is_filled_by_the_last_slot_and_its_cache_moves_along():
    """When slot 0 of three ends, slot 2's sequence moves there with as many positions as it has."""
    scheduler = Scheduler(3, 10, 100)
    first, second, third = (sequence([1] * n) for n in (3, 4, 5))
    for s in (first, second, third):
        scheduler.submit(s)
    advance(scheduler.plan())
    moves = []
    scheduler.remove(first, lambda *move: moves.append(move))
    assert moves == [(2, 0, 5)]
    assert scheduler.active == (third, second) and (third.slot, second.slot, first.slot) == (0, 1, -1)


def test_a_full_queue_refuses_and_names_its_limit():
    """The waiting queue is bounded: one more than max_queue is refused, and nothing is lost."""
    scheduler = Scheduler(1, 2, 8)
    scheduler.submit(sequence([1]))
    scheduler.submit(sequence([1]))
    with pytest.raises(ResourceExhausted, match="max_queue.* 2"):
        scheduler.submit(sequence([1]))
    assert scheduler.waiting == 2
