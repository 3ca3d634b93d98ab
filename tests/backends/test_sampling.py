import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.inflight.errors import InvalidArgument
from backends.inflight.request import SamplingParams
from backends.inflight.sampling import Pick, State, pick

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


GOLDEN = {
    (): [12409, 17908, 15472, 4295, 5908, 17426],
    (("top_k", 50),): [12034, 17544, 14165, 4611, 6781, 17331],
    (("top_p", 0.9),): [12409, 17902, 15474, 4281, 5872, 17426],
    (("top_k", 50), ("top_p", 0.5)): [10897, 18934, 13057, 4068, 4378, 17596],
    (("temperature", 0.05), ("top_p", 0.9)): [12385, 17475, 15021, 4464, 6435, 17331],
}


@pytest.mark.parametrize("how", GOLDEN)
def test_seeded_answers_stay_what_they_were(how):
    """A change of how tokens are found changes no answer that a seed has given before."""
    logits = (np.random.default_rng(0).integers(-600, 600, 20_000) / 100).astype(np.float32)[None]
    assert draw(logits, 6, 7, **dict(how)) == GOLDEN[how]


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.5, 1.0]), seed=st.integers(0, 2**64 - 1), top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.7]), min_p=st.sampled_from([0.0, 0.1]), typical_p=st.sampled_from([1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.5]), presence_penalty=st.sampled_from([0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, -1.0]), min_tokens=st.sampled_from([0, 2]),
    logit_bias=st.sampled_from([(), ((0, 5.0), (7, -100.0))]), logprobs=st.sampled_from([None, 0, 4]),
)  # fmt: skip


@given(st.lists(params, min_size=1, max_size=6), st.integers(0, 2**32), st.sampled_from([10, 3000]), st.data())
def test_a_row_is_picked_from_as_if_it_were_alone(company, seed, vocab, data):
    """Whatever is asked of the other rows, and wherever its row lies, a state's picks over three steps are the same."""
    random = np.random.default_rng(seed)
    steps = [random.normal(size=(8, vocab)).astype(np.float32) for _ in range(3)]
    steps[1][:, 1] = -np.inf
    rows = data.draw(st.permutations(range(8)))[: len(company)]

    def answers(states, rows):
        told = []
        for logits in steps:
            whole = logits.copy()
            told.append(pick(whole, states, rows))
            for state, one in zip(states, told[-1], strict=True):
                state.accept(one.token)
            assert np.array_equal(whole, logits)  # penalties leave no trace
        return [*zip(*told, strict=True)]

    def states(*those):
        return [State(how, [2, 3, 3], frozenset({4}), vocab) for how in those]

    assert answers(states(*company), rows) == [
        answers(states(how), [row])[0] for how, row in zip(company, rows, strict=True)
    ]


@given(params, st.integers(1, 4))
def test_a_sampled_token_costs_one_uniform_number_and_a_greedy_one_none(how, count):
    """However many tokens the filters leave, the random state is as far as there are tokens."""
    state = State(how, [1], frozenset(), 10)
    for _ in range(count):
        assert pick(np.zeros((1, 10), np.float32), [state])[0] is not None
    stream = np.random.Generator(np.random.PCG64(how.seed)).random(count + 1)
    assert state.random.random() == stream[count if how.temperature > 0 else 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_end_token_comes_only_after_min_tokens(temperature):
    """End tokens, the model's and the request's, are barred until so many tokens are generated, and not longer."""
    logits = np.array([[9.0, 0.0, 50.0, 60.0]], np.float32)
    state = made(logits, end=[3], temperature=temperature, stop_token_ids=(2,), min_tokens=2)
    tokens = []
    for _ in range(3):
        tokens.append(pick(logits, [state])[0].token)
        state.accept(tokens[-1])
    assert set(tokens[:2]) <= {0, 1} and tokens[2] in state.end


def test_nothing_is_picked_where_only_barred_tokens_could_come():
    """A row in which nothing but end tokens is possible is no row to pick from before min_tokens."""
    logits = np.array([[1.0, -np.inf]], np.float32)
    assert pick(logits, [made(logits, end=[0], min_tokens=1)]) == [None]


def test_end_tokens_that_leave_nothing_to_begin_with_are_refused():
    """min_tokens with stop tokens that are the whole vocabulary is an error of the request, not of the model."""
    with pytest.raises(InvalidArgument, match="min_tokens needs"):
        made(np.zeros((1, 3)), end=[0], stop_token_ids=(1, 2), min_tokens=1)


def test_a_barred_token_does_not_hide_that_a_row_is_not_finite():
    """NaN at a masked token spoils its row like any other."""
    for bad in (np.nan, np.inf):
        logits = np.array([[bad, 1.0]], np.float32)
        assert pick(logits, [made(logits, end=[0], min_tokens=1)]) == [None]


def test_penalties_make_a_greedy_answer_go_on():
    """A token that was generated, or stood in the prompt, gives way to the next one."""
    logits = np.array([[3.0, 2.0, 1.5]], np.float32)
    for how in ({"presence_penalty": 1.2}, {"frequency_penalty": 1.2}):
        state = made(logits, temperature=0.0, **how)  # token 0 stands in the prompt, which does not count here
        tokens = [pick(logits, [state])[0].token]
        state.accept(tokens[0])
        assert [*tokens, pick(logits, [state])[0].token] == [0, 1]
    assert draw(logits, temperature=0.0, repetition_penalty=2.0) == [1]
    assert draw(logits, temperature=0.0, logit_bias=((0, -100.0), (2, 1.0))) == [2]


def test_log_probabilities_are_those_of_the_raw_logits():
    """Neither penalties nor temperature show in them; the token that was picked is not added to the likeliest."""
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125]])).astype(np.float32)
    state = made(logits, temperature=0.0, logit_bias=((0, -100.0), (3, 50.0)), logprobs=2)
    (one,) = pick(logits, [state])
    assert one.token == 3 and [t for t, _ in one.top] == [0, 1]
    assert np.allclose([one.logprob, *(v for _, v in one.top)], np.log([0.125, 0.5, 0.25]))
    assert pick(logits, [made(logits, temperature=0.0)])[0] == Pick(0)


@pytest.mark.parametrize(("name", "value"), [("logit_bias", ((3, 1.0), (4, 1.0))), ("stop_token_ids", (3, 4))])
def test_a_token_outside_the_vocabulary_is_refused(name, value):
    """The error names the parameter, the token and the limits."""
    with pytest.raises(InvalidArgument, match=f"{name} has 4, the vocabulary is 0 to 3"):
        made(np.zeros((1, 4)), **{name: value})
