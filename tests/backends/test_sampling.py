import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.inflight.request import SamplingParams
from backends.inflight.sampling import State, pick

rows = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=30).map(lambda v: np.array([v], np.float32))


def draw(logits, count=1, seed=0, **how):
    """Tokens that one state picks from the one row."""
    state = made(logits, seed=seed, **how)
    return [pick(logits, [state])[0].token for _ in range(count)]


def made(logits, prompt=(0,), end=(), **how):
    return State(SamplingParams(**how), prompt, frozenset(end), logits.shape[-1])


@given(rows)
def test_temperature_zero_takes_the_largest_logit(logits):
    """Greedy is arg-max, the lowest id on a tie."""
    assert draw(logits, temperature=0.0) == [int(np.argmax(logits[0]))]


@given(rows, st.integers(1, 5))
def test_top_k_draws_only_from_the_k_largest(logits, k):
    """No token below the k-th largest logit is ever drawn."""
    threshold = np.sort(logits[0])[-min(k, logits.shape[1])]
    assert all(logits[0, t] >= threshold - 1e-6 for t in draw(logits, 20, top_k=k))


@given(rows, st.floats(0.05, 0.99))
def test_top_p_draws_only_from_the_nucleus(logits, p):
    """Every drawn token has less than p of the mass strictly above it."""
    weights = np.exp(logits[0].astype(np.float64) - logits[0].max())
    weights /= weights.sum()
    for token in draw(logits, 20, top_p=p):
        assert weights[weights > weights[token]].sum() < p


@given(rows, st.integers(0, 2**63), st.floats(0.1, 5), st.integers(0, 4), st.floats(0.1, 1))
def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(logits, seed, temperature, k, p):
    """A row's draws depend on its own logits, parameters and seed: alone or between two other rows."""
    how = dict(temperature=temperature, top_k=k, top_p=p)
    alone = draw(logits, 5, seed, **how)
    states = [made(logits, temperature=1.0), made(logits, seed=seed, **how), made(logits, temperature=0.0)]
    batch = np.concatenate([logits[:, ::-1], logits, logits + 1])
    assert [pick(batch, states)[1].token for _ in range(5)] == alone


@given(st.sampled_from([0.7, 1.0, 1.5]))
def test_frequencies_match_the_softmax(temperature):
    """Twenty thousand draws follow the softmax of logits / temperature (chi-squared, far tail)."""
    logits = np.array([[0.0, 1.0, 2.0, -1.0]], np.float32)
    weights = np.exp(logits[0].astype(np.float64) / temperature)
    expected = weights / weights.sum() * 20_000
    counts = np.bincount(draw(logits, 20_000, 3, temperature=temperature), minlength=4)
    assert ((counts - expected) ** 2 / expected).sum() < 30


@pytest.mark.parametrize("temperature", [1e-300, 1e-5, 100.0])
def test_extreme_temperatures_do_not_overflow(temperature):
    """A temperature near zero is greedy in effect and a large one still draws valid tokens."""
    logits = np.array([[-1e4, 3.0, 1e4]], np.float32)
    tokens = draw(logits, 50, temperature=temperature)
    assert all(0 <= t < 3 for t in tokens) and (temperature > 1 or set(tokens) == {2})


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.5}])
def test_nothing_is_picked_from_a_row_that_is_not_finite(how):
    """A NaN or +infinity anywhere spoils its row and no other; -infinity is a masked token and fine."""
    logits = np.zeros((5, 1000), np.float32)
    logits[0, 999], logits[2, 0], logits[3, 5], logits[4] = np.nan, np.inf, -np.inf, -np.inf
    picks = pick(logits, [made(logits, **how) for _ in logits])
    assert [p is not None for p in picks] == [False, True, False, True, False]
