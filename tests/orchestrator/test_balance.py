"""Who is asked next, and for how long a server that failed is left alone: rules that hold for all inputs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.balance import (
    BOUND,
    FORGIVEN_S,
    LONGEST_REST_S,
    PREFIX_CHARS,
    Ejection,
    affine,
    least,
    newest,
    prefix_of,
)
from orchestrator.domain import GenerateRequest, Message


@dataclass(frozen=True)
class Server:
    url: str
    outstanding: int = 0


def servers(*outstanding: int) -> list[Server]:
    return [Server(f"http://10.0.0.{number}:8000", count) for number, count in enumerate(outstanding, 1)]


LOADS = st.lists(st.integers(0, 50), min_size=1, max_size=12)


@given(LOADS)
def test_nobody_has_less_than_who_is_asked(loads: list[int]) -> None:
    """The server that is chosen has the fewest outstanding requests."""
    assert least(servers(*loads)).outstanding == min(loads)


def test_ties_are_broken_at_random() -> None:
    """Of equals each is chosen about as often: two workers that know nothing of each other spread over them."""
    seen = Counter(least(servers(3, 1, 1, 1)).url[-6] for _ in range(3000))
    assert set(seen) == {"2", "3", "4"} and min(seen.values()) > 800


@given(LOADS, st.binary(max_size=40))
def test_an_affine_server_is_never_overloaded(loads: list[int], key: bytes) -> None:
    """Whoever is chosen for a key has at most a quarter more than the mean and one; the choice is always the same."""
    given_ = servers(*loads)
    chosen = affine(key, given_)
    assert chosen.outstanding <= BOUND * sum(loads) / len(loads) + 1
    assert affine(key, list(reversed(given_))) == chosen


@given(st.integers(2, 10), st.lists(st.binary(min_size=1, max_size=16), unique=True, min_size=1, max_size=50))
def test_a_server_that_goes_moves_only_its_own_keys(count: int, keys: list[bytes]) -> None:
    """Without load, a key changes its server only if that server is the one that has gone."""
    before = servers(*[0] * count)
    gone, *rest = before
    for key in keys:
        old = affine(key, before)
        assert affine(key, rest) == old if old != gone else affine(key, rest) != gone


def test_keys_are_spread() -> None:
    """Each of four servers is the own one of about a quarter of the keys."""
    seen = Counter(affine(b"%d" % number, servers(0, 0, 0, 0)).url for number in range(2000))
    assert len(seen) == 4 and min(seen.values()) > 400


def test_the_next_one_by_weight_takes_over() -> None:
    """A key whose server has too much to do goes to one and the same other, and comes back afterwards."""
    idle = servers(0, 0, 0)
    own = affine(b"key", idle)
    busy = [Server(one.url, 9 if one == own else 0) for one in idle]
    second = affine(b"key", [one for one in idle if one != own])
    assert affine(b"key", busy).url == second.url
    assert affine(b"key", idle) == own


def request(**changes: Any) -> GenerateRequest:
    return GenerateRequest(**{"id": "r", "model": "m", "accepted_at": 0.0, **changes})


@given(st.text(min_size=PREFIX_CHARS, max_size=PREFIX_CHARS + 10), st.text(max_size=20), st.text(max_size=20))
def test_prompts_that_begin_alike_have_one_key(start: str, one: str, other: str) -> None:
    """What comes after the first characters does not count, in a text and in messages."""
    assert prefix_of(request(text=start + one)) == prefix_of(request(text=start + other))
    talks = [request(messages=(Message("system", start), Message("user", end))) for end in (one, other)]
    assert prefix_of(talks[0]) == prefix_of(talks[1])


def test_other_beginnings_models_and_forms_have_other_keys() -> None:
    """The model, the text, who says it and token ids all count."""
    asked = [
        request(text="a"), request(text="b"), request(text="a", model="n"),
        request(token_ids=(1, 2)), request(token_ids=(1, 3)),
        request(messages=(Message("user", "a"),)), request(messages=(Message("system", "a"),)),
        request(messages=(Message("user", "a"), Message("assistant", "b"))),
    ]  # fmt: skip
    assert len({prefix_of(one) for one in asked}) == len(asked)


@given(st.lists(st.sampled_from(["1", "2", "10", "x"]), min_size=1))
def test_the_version_that_most_have(versions: list[str]) -> None:
    """No version has more, and of those with as many none is newer."""
    counts = Counter(versions)
    chosen = newest(versions)
    assert counts[chosen] == max(counts.values())
    rank = {"x": -1, "1": 1, "2": 2, "10": 10}
    assert rank[chosen] == max(rank[one] for one, count in counts.items() if count == counts[chosen])


def test_a_rest_ends_with_a_heartbeat_after_it() -> None:
    """Neither time alone brings a server back nor a heartbeat alone, nor one that was asked before it failed."""
    rest = Ejection(1.0)
    assert not rest.resting(0.0, float("-inf"))
    assert rest.fail(began=9.0, now=10.0, answered_at=9.9)
    assert rest.resting(10.5, 10.4) and rest.resting(11.5, 9.9) and rest.resting(11.5, 10.0)
    assert not rest.resting(11.0, 10.4)


def test_the_streams_of_a_dead_server_are_one_failure() -> None:
    """However many requests die of one fault, at once or late, the rest is that of one."""
    rest = Ejection(1.0)
    assert rest.fail(9.0, 10.0, 9.9)
    assert not any(rest.fail(began, 10.0 + began / 10, 9.9) for began in (1.0, 5.0, 9.99, 10.0))
    assert (rest.rest_s, rest.until) == (1.0, 11.0)
    assert not rest.fail(10.5, 10.6, 9.9), "asked for want of another: it has to answer anew, and that is all"
    assert rest.resting(11.5, 10.55) and not rest.resting(11.5, 10.7) and rest.until == 11.0


def test_a_server_that_flaps_is_asked_less_and_less() -> None:
    """One that fails five seconds after each return rests 1, 2, 4 … 60 s: in ten minutes it fails some of the time, not
    every five seconds; after a minute without a failure it is as new.
    """
    rest, now, rests = Ejection(1.0), 0.0, []
    while now < 600.0:
        assert rest.fail(now - 0.1, now, now - 0.05)
        rests.append(rest.rest_s)
        now = (rest.until or 0.0) + 5.0
    assert rests[:8] == [1, 2, 4, 8, 16, 32, 60, 60] and len(rests) < 16
    assert rest.fail(now + FORGIVEN_S, now + FORGIVEN_S, now) and rest.rest_s == 1.0


@given(
    st.floats(0.05, 60.0),
    st.lists(st.tuples(st.floats(0.0, 100.0), st.floats(0.0, 100.0), st.booleans()), min_size=1, max_size=40),
)
def test_rests_are_bounded_and_always_end(first_s: float, events: list[tuple[float, float, bool]]) -> None:
    """Whatever fails when: a rest is no shorter than the first and no longer than a minute, and once it is over a
    heartbeat ends it.
    """
    rest, now, answered_at = Ejection(first_s), 0.0, float("-inf")
    for pause_s, ago_s, answers in events:
        now += pause_s
        if answers:
            answered_at = now
        begins = rest.fail(now - ago_s, now, answered_at)
        assert rest.until is not None and rest.failed_at is not None
        assert first_s <= rest.rest_s <= LONGEST_REST_S and rest.until - now <= LONGEST_REST_S + 1e-6
        assert not begins or rest.resting(now, answered_at)
        after = max(now, rest.until) + 0.001
        assert not rest.resting(after, after)


@pytest.mark.parametrize("choose", [least, lambda candidates: affine(b"k", candidates)])
def test_of_nobody_nobody_is_chosen(choose: Any) -> None:
    """An empty fleet is an error here: the fleet says so before."""
    with pytest.raises(ValueError, match="empty"):
        choose([])
