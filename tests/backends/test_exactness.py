"""Answers are the same to the last token alone and in any company, however the engine saves time."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.inflight.devices import ON_CPU
from backends.inflight.engine import Engine
from backends.inflight.prefix import OVERHEAD
from backends.inflight.runner import Runner
from backends.inflight.scheduler import Scheduler
from backends.inflight.sequence import Delta, Sequence
from backends.inflight.steps import Tuning

from .arithmetic import MAX_LEN, VOCAB, Cheap, TwoArithmetics, alone
from .decoder import VOCAB as DECODER_VOCAB
from .decoder import write_decoder
from .fakes import Collector, sequence

ALL = Tuning(prefix_cache_bytes=40 * (256 + OVERHEAD), token_target_s=1.0, speculation=True)
SHARED = [[i * 7 % VOCAB for i in range(start, start + 70)] for start in (0, 3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of two layers with heads of 8 and 16: its blocks of queries are of 16 and 32."""
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    return write_decoder(path, max_len=MAX_LEN, spread=0.6)


@dataclass(frozen=True)
class Request:
    """One request of a schedule: it arrives after so many tokens of all, and may be given up after some of its own."""

    prompt: list[int]
    tokens: int
    at: int
    params: dict[str, object] = field(default_factory=dict)
    leaves_after: int | None = None

    def sequence(self, sink: Collector | None = None) -> Sequence:
        return sequence(self.prompt, self.tokens, sink, **self.params)


prompts = st.one_of(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40),
    st.tuples(
        st.sampled_from(SHARED), st.integers(1, 70), st.lists(st.integers(0, VOCAB - 1), max_size=5)
    ).map(lambda parts: [*parts[0][: parts[1]], *parts[2]]),
)  # fmt: skip
params = st.one_of(
    st.fixed_dictionaries({"priority": st.integers(-1, 1)}),
    st.fixed_dictionaries(
        {"temperature": st.sampled_from([0.5, 1.0]), "seed": st.integers(0, 5), "top_p": st.sampled_from([0.8, 1.0])}
    ),
    st.fixed_dictionaries({"repetition_penalty": st.just(1.3), "min_tokens": st.integers(0, 5)}),
)
requests = st.builds(
    Request,
    prompt=prompts,
    tokens=st.integers(1, 40),
    at=st.integers(0, 120),
    params=params,
    leaves_after=st.one_of(st.none(), st.none(), st.integers(0, 20)),
)


class Schedule:
    """Submits requests and gives them up when so many tokens have been made: the same in every run."""

    def __init__(self, engine: Engine, given: list[Request]) -> None:
        self._engine, self._made, self._lock = engine, 0, threading.Lock()
        self._waiting = sorted(given, key=lambda request: request.at)
        self.sinks = {id(request): Sink(self, request) for request in given}

    def run(self) -> None:
        while self._waiting:  # where all have ended before the next is due, it comes at once
            self._submit(None)
            self._wait()
        self._wait()  # for one that came when another's last token was made

    def _wait(self) -> None:
        for sink in list(self.sinks.values()):
            if sink.started:
                assert sink.ended.wait(20)

    def token(self) -> None:
        self._made += 1
        self._submit(self._made)

    def _submit(self, at: int | None) -> None:
        """Submit whoever is due; without a time, the next one and those who are due with it."""
        while True:
            with self._lock:
                if at is None and self._waiting:
                    at = self._waiting[0].at
                if at is None or not self._waiting or self._waiting[0].at > at:
                    return
                request = self._waiting.pop(0)
                sink = self.sinks[id(request)]
                sink.started = True
            sink.sequence = request.sequence(sink)
            self._engine.submit(sink.sequence)


class Sink(Collector):
    def __init__(self, schedule: Schedule, request: Request) -> None:
        super().__init__()
        self._schedule, self._request = schedule, request
        self.started = False
        self.sequence: Sequence | None = None

    def delta(self, delta: Delta) -> None:
        super().delta(delta)
        if self.sequence is not None and len(self.deltas) == self._request.leaves_after:
            self.sequence.cancelled = True
            self.ended.set()
        self._schedule.token()


def play(given: list[Request], runner: object, slots: int, chunk: int, tuning: Tuning) -> Schedule:
    engine = Engine(runner, Scheduler(slots, 100, chunk), tuning=tuning, costs=Cheap)  # type: ignore[arg-type]
    engine.start()
    schedule = Schedule(engine, given)
    try:
        schedule.run()
    finally:
        engine.close(5)
    return schedule


@settings(max_examples=20)
@given(given_=st.lists(requests, min_size=1, max_size=10), slots=st.integers(1, 4), chunk=st.integers(1, 40))
def test_answers_are_the_same_alone_and_in_any_company(given_, slots, chunk):
    """Random arrivals, lengths, priorities, parameters and cancels, with chunks, joint prefill, reused prefixes and
    drafts: each answer is token by token the one that its request has by itself, or the beginning of it where it was
    given up.
    """
    check_made_by_hand(given_, slots, chunk)


def check_made_by_hand(given_: list[Request], slots: int, chunk: int) -> None:
    schedule = play(given_, TwoArithmetics(slots), slots, chunk, ALL)
    for request in given_:
        sink, whole = schedule.sinks[id(request)], alone(request.sequence())
        assert sink.failure is None
        picks = [delta.pick.token for delta in sink.deltas]
        assert picks == whole[: len(picks)]
        if request.leaves_after is None:
            assert len(picks) == len(whole)


def test_every_way_to_save_time_was_taken() -> None:
    """The property above is about something: a schedule of its kind loads prefixes, joins prompts and accepts drafts,
    and some of what was drafted is decoded again because two logits were too close.
    """
    given_ = [Request(SHARED[0][:60], 40, 0), *(Request([*SHARED[0][:50], i], 40, 30 * i) for i in range(1, 6))]
    given_ += [Request([1, 2, 3 + i], 3, 0) for i in range(3)]
    runner = TwoArithmetics(4)
    engine = Engine(runner, Scheduler(4, 100, 40), tuning=ALL, costs=Cheap)
    engine.start()
    schedule = Schedule(engine, given_)
    schedule.run()
    engine.close(5)
    assert all(runner.used.values()), runner.used
    assert engine.counters.accepted > 10 and engine.counters.cached_tokens >= 5 * 48
    assert any(sink.sequence is not None and sink.sequence.settled for sink in schedule.sinks.values())
    assert any(sink.sequence is not None and sink.sequence.cached == 48 for sink in schedule.sinks.values())


@pytest.mark.parametrize("what", ["answers", "margin", "odd"])
def test_each_rule_of_exactness_is_needed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any one of the rules (answers are not kept, close picks are decoded again, chunks are even) answers
    differ: the comparison can fail.
    """
    given_ = [Request([*SHARED[i % 2][: 20 + i], 5], 40, 25 * i) for i in range(12)]
    tuning = ALL
    if what == "margin":
        monkeypatch.setattr("backends.inflight.speculation.MARGIN", 0.0)
    elif what == "odd":
        tuning = Tuning(prefix_cache_bytes=ALL.prefix_cache_bytes, exact=False)
    else:
        given_ = []
        prompt = SHARED[0][:20]
        for i in range(6):
            given_.append(Request(prompt, 40, 100 * i))
            prompt = [*prompt, *alone(given_[-1].sequence()), 5][-100:] if i == 0 else [*prompt, 6]
        tuning = Tuning(prefix_cache_bytes=100 * (256 + OVERHEAD), exact=False)
    schedule = play(given_, TwoArithmetics(3), 3, 7 if what == "odd" else 40, tuning)
    assert any(
        [delta.pick.token for delta in schedule.sinks[id(request)].deltas] != alone(request.sequence())
        for request in given_
    )


def by_itself(request: Request, runner: Runner) -> list[int]:
    """The answer that a real model gives a request in an engine of its own where nothing is saved."""
    (sink,) = play([request], runner, 1, 1000, Tuning()).sinks.values()
    return [delta.pick.token for delta in sink.deltas]


def compare(path: Path, given_: list[Request], slots: int, chunk: int) -> Schedule:
    given_ = [replace(request, prompt=[token % DECODER_VOCAB for token in request.prompt]) for request in given_]
    schedule = play(given_, Runner(path, slots, 1, ON_CPU), slots, chunk, replace(ALL, prefix_cache_bytes=1 << 16))
    one = Runner(path, 1, 1, ON_CPU)
    for request in given_:
        sink = schedule.sinks[id(request)]
        picks = [delta.pick.token for delta in sink.deltas]
        whole = by_itself(replace(request, leaves_after=None), one)
        assert sink.failure is None and picks == whole[: len(picks)]
        assert len(picks) == len(whole) or request.leaves_after is not None
    return schedule


@settings(max_examples=6)
@given(given_=st.lists(requests, min_size=3, max_size=6), slots=st.integers(1, 4), chunk=st.integers(2, 40))
def test_a_real_model_answers_the_same_alone_and_in_any_company(model, given_, slots, chunk):
    """So it is with ONNX Runtime's own arithmetic, in float32."""
    compare(model, given_, slots, chunk)


@pytest.mark.slow
@settings(max_examples=150)
@given(given_=st.lists(requests, min_size=3, max_size=10), slots=st.integers(1, 6), chunk=st.integers(1, 60))
def test_a_real_model_answers_the_same_alone_and_in_any_company_at_length(model, given_, slots, chunk):
    """The same over many more schedules."""
    compare(model, given_, slots, chunk)


@pytest.mark.slow
@settings(max_examples=400)
@given(given_=st.lists(requests, min_size=1, max_size=14), slots=st.integers(1, 6), chunk=st.integers(1, 60))
def test_answers_are_the_same_alone_and_in_any_company_at_length(given_, slots, chunk):
    """The property above over many more schedules."""
    check_made_by_hand(given_, slots, chunk)


def test_the_bits_of_a_position_do_not_depend_on_how_the_prompt_was_cut(model: Path) -> None:
    """Chunks of even length in any cut, a joint prefill and a load write the very bits of one chunk of the whole; an
    odd chunk's last query by itself does not, and decode steps do not, in any number of rows.
    """
    runner = Runner(model, 4, 1, ON_CPU)
    tokens = [i * 5 % DECODER_VOCAB for i in range(40)]

    def cache(slot: int, length: int = 40) -> bytes:
        return b"".join(c.array[slot, :, :length].tobytes() for c in runner._cache.values())

    whole = runner.prefill(0, tokens, 0).tobytes()
    for cut in (2, 6, 16, 38):
        for start in range(0, 40, cut):
            logits = runner.prefill(1, tokens[start : start + cut], start).tobytes()
        assert (logits, cache(1)) == (whole, cache(0))
    logits = runner.prefill_fresh(2, [tokens, tokens[:33]])
    assert logits[0].tobytes() == whole and cache(2) == cache(0) and cache(3, 33) == cache(0, 33)
    runner.load(3, 0, runner.save(0, 0, 40))
    assert cache(3) == cache(0)
    runner.prefill(1, tokens[:33], 0)  # padded by the runner
    assert cache(1, 33) == cache(0, 33)
    runner.prefill(1, tokens[6:39], 6)
    assert cache(1, 38) == cache(0, 38) and cache(1, 39) != cache(0, 39)
    runner.decode([tokens[38], tokens[38]], [38, 38])
    assert cache(0, 39) == cache(1, 39) != cache(2, 39)
