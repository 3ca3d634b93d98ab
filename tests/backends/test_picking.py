"""Which tokens are left and with what probability, held against transformers' own processors in float64."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from backends.inflight.picking import drawn, log_probabilities, survivors, top
from backends.inflight.processors import Edits
from backends.inflight.request import SamplingParams

ROUNDING = 1e-9  # a filter's limit may lie on a token to within this; either side is right then


def row_of(seed, size, kind):
    """A row as models have it: noise, a peak with a long tail, many ties, or half of it masked."""
    random = np.random.default_rng(seed)
    row = random.normal(size=size) * random.choice([0.1, 1.0, 5.0])
    if kind == "tail":
        row = -1.5 * np.log(random.permutation(size) + 1.0) + 0.1 * row
    elif kind == "ties":
        row = np.round(row)
    elif kind == "masked":
        row[random.random(size) < 0.5] = -np.inf
        row[random.integers(size)] = 1.0
    elif kind == "extreme":
        row *= 1e30
    return row.astype(np.float32)


kinds = st.sampled_from(["noise", "tail", "ties", "masked", "extreme"])
small = st.builds(row_of, st.integers(0, 2**32), st.integers(1, 60), kinds)
large = st.builds(row_of, st.integers(0, 2**32), st.sampled_from([2500, 12_000]), kinds)
hand_made = st.lists(st.sampled_from([-np.inf, -30.0, -1.0, 0.0, 0.5, 1.0, 30.0]), min_size=1, max_size=8).map(
    lambda values: np.array([0.0, *values], np.float32)
)
rows = st.one_of(small, hand_made, large)
filters = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.05, 0.7, 1.0, 1.9, 100.0])},
    optional={
        "top_k": st.sampled_from([1, 2, 5, 50, 3000]),
        "top_p": st.one_of(st.floats(0.01, 0.999), st.sampled_from([1e-9, 0.5, 0.9])),
        "min_p": st.one_of(st.floats(0.001, 1.0), st.sampled_from([1.0, 0.5, 1e-30])),
        "typical_p": st.one_of(st.floats(0.01, 0.999), st.sampled_from([1e-9, 0.5, 0.9])),
    },
)


def theirs(row, temperature, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0):
    """Probabilities of a row after transformers' warpers in the documented order, float64."""
    ids, scores = torch.zeros((1, 1), dtype=torch.long), torch.from_numpy(row.astype(np.float64))[None]
    chain = [TemperatureLogitsWarper(temperature)]
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        chain.append(MinPLogitsWarper(min_p))
    if typical_p < 1:
        chain.append(TypicalLogitsWarper(typical_p))
    for warp in chain:
        scores = warp(ids, scores)
    return scores.softmax(-1)[0].numpy()


def ours(row, **how):
    ids, weights = survivors(row, float(row.max()), SamplingParams(**how))
    probabilities = np.zeros(row.size)
    probabilities[slice(None) if ids is None else ids] = weights / weights.sum()
    assert ids is None or (np.diff(ids) > 0).all()
    return probabilities


def same(row, ours, theirs):
    """Equal but for which of equal logits are left: that is up to the order of a sort."""
    mine, other = ours[np.lexsort((ours, row))], theirs[np.lexsort((theirs, row))]
    return ((mine > 1e-300) == (other > 1e-300)).all() and np.allclose(mine, other, rtol=1e-7, atol=1e-12)


@settings(max_examples=200)
@given(rows, filters)
def test_the_filters_leave_what_transformers_own_leave(row, how):
    """Surviving tokens and their probabilities equal transformers' warpers, in one order, whatever is combined."""
    got = ours(row, **how)
    limits = [name for name in ("top_p", "min_p", "typical_p") if name in how]
    for nudges in itertools.product((0.0, -ROUNDING, ROUNDING), repeat=len(limits)):
        nudged = {name: min(1.0, how[name] * (1 + nudge)) for name, nudge in zip(limits, nudges, strict=True)}
        if same(row, got, theirs(row, **{**how, **nudged})):
            return
    raise AssertionError(f"{how} leaves {np.flatnonzero(got)[:20]}, not {np.flatnonzero(theirs(row, **how))[:20]}")


@settings(max_examples=40)
@given(rows, st.floats(0.01, 0.99))
def test_of_equal_tokens_the_lowest_ids_are_in_the_nucleus(row, mass):
    """Where not all of equal logits belong to the smallest set, it has those that come first."""
    left = ours(row, temperature=1.0, top_p=mass) > 0
    for value in np.unique(row[left]):
        equals = np.flatnonzero((row == value) & (np.exp(row.astype(np.float64) - row.max()) > 0))
        assert (np.diff(left[equals].astype(int)) <= 0).all()


@given(rows, st.integers(1, 3000))
def test_top_finds_the_k_largest_and_all_that_equal_the_last(row, k):
    """Block maxima and partition find what a sort finds."""
    k = min(k, row.size)
    assert top(row, k).tolist() == np.flatnonzero(row >= np.sort(row)[-k]).tolist()


@given(rows, st.integers(0, 20), st.data())
def test_log_probabilities_are_log_softmax(row, count, data):
    """The token's and the likeliest tokens' numbers are torch's log_softmax of the row, the likeliest first."""
    expected = torch.from_numpy(row.astype(np.float64)).log_softmax(-1).numpy()
    token = data.draw(st.sampled_from(np.flatnonzero(np.isfinite(row)).tolist()))
    mine, likeliest = log_probabilities(row, token, count)
    close = dict(rtol=1e-9, atol=2e-6)
    np.testing.assert_allclose(mine, expected[token], **close)
    order = [t for t in np.argsort(-expected, kind="stable")[:count].tolist() if np.isfinite(expected[t])]
    assert [t for t, _ in likeliest] == order
    np.testing.assert_allclose([value for _, value in likeliest], expected[order], **close)


weights = st.one_of(
    st.lists(st.sampled_from([0.0, 1e-300, 0.1, 1.0]), min_size=1, max_size=20),
    st.builds(lambda seed: (np.random.default_rng(seed).random(5000) ** 9).tolist(), st.integers(0, 99)),
).map(lambda values: np.array([*values, 1.0, 0.0]))


@given(weights, st.floats(0, 1, exclude_max=True))
def test_a_draw_inverts_the_distribution_function(weights, uniform):
    """The place drawn is the one whose share of the sum holds the uniform number; a weight of 0 is never drawn."""
    place = drawn(weights, uniform)
    shares = np.cumsum(weights) / weights.sum()
    assert weights[place] > 0
    assert shares[place] - weights[place] / weights.sum() - 1e-12 <= uniform <= shares[place] + 1e-12


@pytest.mark.parametrize("uniform", [0.0, np.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("size", [3, 5000])
def test_the_ends_of_the_unit_interval_draw_a_token_that_has_weight(uniform, size):
    """Neither the smallest nor the largest uniform number falls on a masked token at an end of the row."""
    weights = np.zeros(size)
    weights[1] = 0.3
    assert drawn(weights, uniform) == 1


penalties = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.one_of(st.floats(0.1, 10), st.just(1.0)),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "min_tokens": st.integers(1, 6),
        "logit_bias": st.dictionaries(st.integers(0, 99), st.floats(-100, 100), max_size=5).map(
            lambda bias: tuple(bias.items())
        ),
    },
)
tokens = st.lists(st.integers(0, 99), max_size=20)


def processed(row, prompt, generated, how, end):
    """float64: OpenAI's bias, transformers' repetition penalty, OpenAI's penalties, transformers' minimum length."""
    scores = torch.from_numpy(row.astype(np.float64))[None]
    for token, bias in how.logit_bias:
        scores[0, token] += bias
    history = torch.tensor([[*prompt, *generated]])
    scores = RepetitionPenaltyLogitsProcessor(float(how.repetition_penalty))(history, scores)
    for token in set(generated):
        count = generated.count(token)
        scores[0, token] -= count * how.frequency_penalty + (count > 0) * how.presence_penalty
    if end:
        least = MinNewTokensLengthLogitsProcessor(len(prompt), how.min_tokens, sorted(end))
        scores = least(history, scores)
    return scores[0].numpy()


@given(
    st.builds(row_of, st.integers(0, 2**32), st.just(100), kinds.filter(lambda kind: kind != "extreme")),
    st.lists(st.integers(0, 99), min_size=1, max_size=20), tokens, penalties, st.sets(st.integers(0, 99), max_size=3),
)  # fmt: skip
def test_edits_are_transformers_processors_and_openais_penalties(row, prompt, generated, given, end):
    """Bias, penalties and the mask on end tokens give each logit the value that the reference gives, in float32."""
    how = SamplingParams(**given)
    edits = Edits(how, prompt, end, row.size)
    for token in generated:
        edits.accept(token)
    changed = row.copy()
    before = edits.apply(changed, len(generated))
    np.testing.assert_array_equal(changed, processed(row, prompt, generated, how, end).astype(np.float32))
    if before is not None:
        changed[before[0]] = before[1]
    np.testing.assert_array_equal(changed, row)


def test_many_different_tokens_are_counted():
    """The table of tokens grows with the answer."""
    how = SamplingParams(frequency_penalty=1.0)
    edits = Edits(how, [1], (), 1000)
    for token in [*range(500), *range(250)]:
        edits.accept(token)
    row = np.zeros(1000, np.float32)
    edits.apply(row, 750)
    assert row.tolist() == [-2.0] * 250 + [-1.0] * 250 + [0.0] * 500


@pytest.mark.parametrize("penalty", [5e-324, 1e-30, 10.0])
def test_an_extreme_repetition_penalty_leaves_finite_logits_finite(penalty):
    """Neither overflow nor 0/0: a logit that was finite can still be picked, one that was masked still cannot."""
    row = np.array([3e38, -3e38, 0.0, 1.0, -np.inf], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pick() ignores overflow for all of a step
        Edits(SamplingParams(repetition_penalty=penalty), [0, 1, 2, 4], (), 5).apply(row, 0)
    assert np.isfinite(row[:4]).all() and row[2] == 0 and row[4] == -np.inf


def test_tokens_beyond_the_vocabulary_are_left_alone():
    """A tokenizer may have more tokens than the model has logits: those need no penalty."""
    row = np.ones(3, np.float32)
    Edits(SamplingParams(repetition_penalty=2.0, min_tokens=1), [0, 7], (1, 9), 3).apply(row, 0)
    assert row.tolist() == [0.5, -np.inf, 1.0]
