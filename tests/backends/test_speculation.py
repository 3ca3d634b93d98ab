"""When drafts are verified, and which picks of an exact model are trusted."""

from __future__ import annotations

import numpy as np
import pytest

from backends.inflight.costs import Costs
from backends.inflight.sampling import Pick
from backends.inflight.sequence import Sequence
from backends.inflight.speculation import LENGTHS, MAX_ROWS, Speculation, too_close

from .fakes import sequence


def measured(each: float) -> Costs:
    """Steps of 10 ms, to which each further token of a row adds `each`."""
    costs = Costs()
    costs.decoded(1, 0.010)
    costs.decoded(4, 0.011)
    costs.verified(11, 0.010 + 10 * each)
    return costs


def grown(tokens: list[int], **params: object) -> Sequence:
    """A sequence that has generated these tokens."""
    one = sequence([40], 1000, **params)
    one.done = 1
    for token in tokens:
        one.accept(Pick(token))
    return one


REPEATING = [1, 2, 3] * 10
HOPELESS = [t for i in range(15) for t in (1, 2, 4 + i)]


def test_drafts_are_verified_where_costs_and_luck_make_it_pay() -> None:
    """Cheap tokens and a text that repeats itself: a long draft; tokens as dear as steps: none; a text whose drafts
    were wrong: none, and nothing is spent on finding out.
    """
    good = grown(REPEATING)
    (draft,) = Speculation(measured(0.0005), exact=True).drafts([good]).values()
    assert len(draft) >= 6 and draft == (REPEATING * 2)[: len(draft)]
    assert Speculation(measured(0.009), exact=True).drafts([good]) == {}
    bad = Speculation(measured(0.001), exact=True)
    bad.usual = 0.05
    assert bad.drafts([grown(HOPELESS)]) == {}


def test_nothing_is_drafted_before_costs_are_known_or_among_many() -> None:
    """Without a measured step, and with more rows than are verified one by one, all decode."""
    assert Speculation(Costs(), exact=True).drafts([grown(REPEATING)]) == {}
    assert Speculation(measured(0.0001), exact=True).drafts([grown(REPEATING) for _ in range(MAX_ROWS + 1)]) == {}
    few = [grown(REPEATING) for _ in range(MAX_ROWS)]
    assert set(Speculation(measured(0.0001), exact=True).drafts(few)) == set(few)


def test_only_those_whose_drafts_are_good_are_verified() -> None:
    """Beside one that repeats itself one that does not goes on decoding."""
    good, bad = grown(REPEATING), grown(HOPELESS)
    speculation = Speculation(measured(0.0005), exact=True)
    speculation.usual = 0.05
    assert set(speculation.drafts([bad, good])) == {good}


def test_a_draft_ends_within_the_budget() -> None:
    """With two tokens left to generate one may be drafted; with one, none."""
    for left, drafted in ((2, 1), (1, 0)):
        one = grown(REPEATING)
        one.budget = one.generated + left
        assert sum(map(len, Speculation(measured(0.0001), exact=True).drafts([one]).values())) == drafted
    assert max(LENGTHS) == 16


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"logit_bias": ((3, 1.0),)},
        {"min_tokens": 500},
    ],
)
def test_of_an_exact_model_only_plain_greedy_answers_are_drafted(params: dict[str, object]) -> None:
    """Where last bits can move a draw, or logits that are not compared, an exact model decodes; another one drafts."""
    one = grown(REPEATING, **params)
    assert Speculation(measured(0.0001), exact=True).drafts([one]) == {}
    assert Speculation(measured(0.0001), exact=False).drafts([one])


def test_a_close_runner_up_is_noticed_on_either_side() -> None:
    """Two logits within the margin are too close wherever they stand, equal ones as well; others are not."""
    logits = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    for first, second in ((3, 900), (900, 3), (0, 999), (999, 0)):
        for gap, close in ((0.0, True), (2e-5, True), (1e-3, False)):
            row = logits.copy()
            row[first], row[second] = 8.0, 8.0 - gap
            assert too_close(row) is close


def test_what_is_usual_follows_what_was_accepted() -> None:
    """Sequences to come profit from how drafts of others went."""
    speculation = Speculation(measured(0.001), exact=True)
    for _ in range(100):
        speculation.learn(4, 4)
    assert speculation.usual > 0.9
    for _ in range(200):
        speculation.learn(4, 0)
    assert speculation.usual < 0.1
