"""What the engines are asked is the same for all of them, never the same twice, and of the promised lengths."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import workloads
from benchmarks.workloads import WORKLOADS, Conversation


def prompts(made: list[Conversation]) -> list[tuple[int, ...]]:
    return [one.turns[0].tokens for one in made]


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_seed_makes_the_same_and_another_seed_nothing_in_common(name: str) -> None:
    """Every engine of a round gets the same, and no round a prompt of the one before, which a cache might hold."""
    workload = WORKLOADS[name]
    load = workload.loads[-1]
    made = workload.make(load, "1")
    assert made == workload.make(load, "1")
    begins = [{prompt[:16] for prompt in prompts(workload.make(load, seed))} for seed in ("1", "2")]
    assert not begins[0] & begins[1]


@pytest.mark.parametrize("name", WORKLOADS)
def test_conversations_fit_into_the_context(name: str) -> None:
    """All that is said in a conversation, answers included, is within the model's positions, and tokens are words."""
    workload = WORKLOADS[name]
    for load in workload.loads:
        for one in workload.make(load, "x"):
            assert sum(len(turn.tokens) + turn.new for turn in one.turns) <= workload.max_len
            assert all(workloads.FIRST <= token < workloads.LAST for turn in one.turns for token in turn.tokens)


def test_w_long_and_chat_have_their_lengths() -> None:
    """W: 64 in, 64 out; long: 768 in, 32 out; chat: a common beginning of 512 tokens and nothing more, four turns."""
    for name, (prompt, new) in {"W": (64, 64), "long": (768, 32)}.items():
        made = WORKLOADS[name].make(4, "x")
        assert [(len(one.turns), len(one.turns[0].tokens), one.turns[0].new) for one in made] == [(1, prompt, new)] * 4
    made = WORKLOADS["chat"].make(16, "x")
    assert len({prompt[:512] for prompt in prompts(made)}) == 1
    assert len({prompt[512:520] for prompt in prompts(made)}) == 16
    assert {tuple(len(turn.tokens) for turn in one.turns) for one in made} == {(544, 32, 32, 32)}
    assert {turn.new for one in made for turn in one.turns} == {64}


@settings(deadline=None, max_examples=20)
@given(rate=st.sampled_from([0.5, 1.0, 4.0, 20.0]), seed=st.text(max_size=5))
def test_mixed_arrives_at_its_rate_with_the_lengths_of_the_table(rate: float, seed: str) -> None:
    """As many requests as the rate makes in the time, in order, each of the table's next length, whatever the seed."""
    made = workloads.mixed(rate, seed)
    assert len(made) == round(rate * workloads.MIXED_S)
    assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(made)) and made[0].at_s == 0.0
    found = [(len(one.turns[0].tokens), one.turns[0].new) for one in made]
    table = workloads.lengths()
    assert found == [table[number % len(table)] for number in range(len(made))]
    assert all(16 <= prompt <= 512 and 16 <= new <= 128 for prompt, new in table)
