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
    requests=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 6), st.integers(0, 5), st.integers(-2, 2), st.booleans()),
        min_size=1,
        max_size=25,
    ),
    slots=st.integers(1, 5),
    chunk=st.integers(1, 16),
    limit=st.one_of(st.none(), st.integers(1, 20)),
)
def test_every_sequence_ends_slots_stay_dense_and_order_is_kept(requests, slots, chunk, limit):
    """Whatever arrives and leaves when: no slot leaks, is shared or starves, and whoever starts was the first of those
    who waited, by priority and then by arrival.
    """
    scheduler = Scheduler(slots, 1000, chunk)
    arrivals = [(at, cancel, sequence([1] * n, new, priority=urgent)) for n, new, at, urgent, cancel in requests]
    waiting, ended = [], 0
    for step in range(3000):
        for at, _, s in arrivals:
            if at == step:
                scheduler.submit(s)
                waiting.append(s)
        if step == 7:
            for _, cancel, s in arrivals:
                s.cancelled = cancel and s.generated < s.budget
            for s in [s for s in scheduler.active if s.cancelled]:
                scheduler.remove(s, lambda *_: None)
        scheduler.drop_gone(float(step))
        plan = scheduler.plan(limit)
        if not plan and step > 7:
            break
        for started in [c.sequence for c in plan.prefill if c.start == 0]:
            waiting = [s for s in waiting if not s.cancelled]
            assert started is min(waiting, key=lambda s: (s.params.priority, s.number))
            waiting.remove(started)
        assert [s.slot for s in scheduler.active] == list(range(len(scheduler.active)))
        assert len(scheduler.active) <= slots
        assert not {c.sequence for c in plan.prefill} & set(plan.decode)
        most = min(chunk, limit) if limit and plan.decode else chunk
        assert sum(c.stop - c.start for c in plan.prefill) <= most or len(plan.prefill) == 1
        advance(plan)
        for s in [s for s in scheduler.active if finished(s)]:
            scheduler.remove(s, lambda *_: None)
            ended += 1
    assert ended == sum(not s.cancelled for *_, s in arrivals)
    assert not scheduler.active and scheduler.waiting == 0 and all(s.cancelled for s in waiting)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_whole_prompts_of_similar_length_go_together_and_waste_little(lengths):
    """Every chunk is in one group; a group of several has whole prompts in consecutive slots, and at most a quarter of
    its tokens (or eight) is padding.
    """
    scheduler = Scheduler(len(lengths), 100, 100)
    scheduler.submit(*(sequence([1] * length) for length in lengths))
    plan = scheduler.plan()
    assert [c for group in plan.groups for c in group] == list(plan.prefill)
    for group in plan.groups:
        if len(group) > 1:
            assert all(c.whole for c in group)
            assert [c.sequence.slot for c in group] == list(range(group[0].sequence.slot, group[-1].sequence.slot + 1))
            tokens = sum(c.stop for c in group)
            assert len(group) * max(c.stop for c in group) - tokens <= max(8, tokens / 4)


def test_what_is_reused_is_not_prefilled():
    """A new sequence's first chunk begins behind what need not be computed, and costs only what is left."""
    scheduler = Scheduler(3, 10, 16)
    scheduler.submit(*(sequence([1] * 40) for _ in range(3)))
    plan = scheduler.plan(reuse=lambda s: 32)
    assert [(c.start, c.stop, c.reused, c.whole) for c in plan.prefill] == [(32, 40, True, False)] * 2
    assert plan.groups == [(c,) for c in plan.prefill]


def test_a_limit_counts_only_while_others_are_decoding():
    """Beside a running stream chunks are as small as was asked for; alone a prompt goes by whole chunks."""
    scheduler = Scheduler(2, 10, 64)
    long = sequence([1] * 200)
    scheduler.submit(long)
    plan = scheduler.plan(limit=16)
    assert [(c.start, c.stop) for c in plan.prefill] == [(0, 64)]
    stream = sequence([1])
    scheduler.submit(stream)
    stream.slot, stream.done, stream.generated = 1, 1, 1  # as if it had been admitted
    scheduler._active.append(stream)
    scheduler._waiting.remove(stream)
    advance(plan)
    assert [(c.start, c.stop) for c in scheduler.plan(limit=16).prefill] == [(64, 80)]


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
