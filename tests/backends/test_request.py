import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.inflight.errors import InvalidArgument
from backends.inflight.request import SamplingParams, parse


def given_parameters(**values):
    return parse(b"hello", json.dumps(values).encode())[1]


def test_all_known_parameters_are_read():
    """Each name of the protocol reaches its field."""
    params = given_parameters(max_tokens=5, temperature=0, top_k=-1, top_p=0.5, seed=7, stop=["a", "b"], timeout_s=1.5,
                              ignore_eos=True)  # fmt: skip
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p) == (5, 0.0, 0, 0.5)
    assert (params.seed, params.stop, params.timeout_s, params.ignore_eos) == (7, ("a", "b"), 1.5, True)
    assert given_parameters().ignore_eos is False


def test_what_controls_the_answer_is_read():
    """Each of the parameters that shape the distribution, end the answer or ask for more of it reaches its field."""
    numbers = {"min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.2, "presence_penalty": -2,
               "frequency_penalty": 0.5, "logprobs": 0, "n": 2, "best_of": 4, "min_tokens": 3,
               "priority": -1000}  # fmt: skip
    params = given_parameters(**numbers, logit_bias={"7": -100, "0": 1.5}, stop_token_ids=[5, 6])
    assert {name: getattr(params, name) for name in numbers} == numbers
    assert params.logit_bias == ((7, -100.0), (0, 1.5)) and params.stop_token_ids == (5, 6)


def test_what_is_not_given_changes_nothing():
    """The defaults of the penalties and filters are those that do nothing, and one answer is made."""
    assert given_parameters(seed=0) == SamplingParams()


def test_best_of_follows_n_and_is_never_less():
    """Without best_of as many answers are made as are returned; fewer are refused."""
    assert given_parameters(n=3).best_of == 3 and given_parameters(best_of=3).n == 1
    with pytest.raises(InvalidArgument, match=r"best_of must be .* n \(3\) to 16, not 2"):
        given_parameters(n=3, best_of=2)


def test_min_tokens_is_at_most_max_tokens():
    """An answer cannot have more tokens than it may have."""
    assert given_parameters(min_tokens=5, max_tokens=5).min_tokens == 5
    with pytest.raises(InvalidArgument, match=r"min_tokens must be .* max_tokens \(4\), not 5"):
        given_parameters(min_tokens=5, max_tokens=4)


def test_null_means_not_given_and_a_missing_seed_is_drawn():
    """Null is the default, and two requests without a seed differ."""
    assert given_parameters(max_tokens=None, stop=None).max_tokens is None
    assert given_parameters().seed != given_parameters().seed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", True), ("max_tokens", "5"), ("temperature", -0.1),
        ("temperature", "hot"), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.1), ("top_k", -2),
        ("seed", "x"), ("stop", ""), ("stop", [1]), ("stop", ["x"] * 17), ("timeout_s", 0), ("top_n", 1),
        ("messages", []), ("messages", [{"role": "user"}]), ("prompt_token_ids", [1.5]),
        ("temperature", 10**400), ("timeout_s", -(10**400)), ("ignore_eos", 1), ("ignore_eos", "true"),
        ("min_p", -0.1), ("min_p", 1.1), ("min_p", True), ("typical_p", 0), ("typical_p", 1.1), ("typical_p", "x"),
        ("repetition_penalty", 0), ("repetition_penalty", 10.1), ("presence_penalty", -2.1),
        ("presence_penalty", float("nan")), ("frequency_penalty", 2.1), ("frequency_penalty", [1]),
        ("logit_bias", []), ("logit_bias", {"x": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"07": 1}),
        ("logit_bias", {"": 1}), ("logit_bias", {"²": 1}), ("logit_bias", {"1" * 5000: 1}),
        ("logit_bias", {"4294967296": 1}), ("logit_bias", {"1": 100.5}), ("logit_bias", {"1": -101}),
        ("logit_bias", {"1": None}), ("logit_bias", {"1": True}), ("logit_bias", {str(i): 1 for i in range(301)}),
        ("logprobs", -1), ("logprobs", 21), ("logprobs", True), ("logprobs", 1.0), ("n", 0), ("n", 17), ("n", "1"),
        ("best_of", 0), ("best_of", 17), ("min_tokens", -1), ("min_tokens", 1.5), ("stop_token_ids", 5),
        ("stop_token_ids", [-1]), ("stop_token_ids", [True]), ("stop_token_ids", ["5"]),
        ("stop_token_ids", [2**31]), ("stop_token_ids", [1] * 65), ("priority", -1001), ("priority", 1001),
        ("priority", 0.5),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_name(name, value):
    """The error names the parameter that is wrong."""
    with pytest.raises(InvalidArgument, match=name):
        parse(b"", json.dumps({name: value}).encode())


@given(st.binary(max_size=50), st.one_of(st.none(), st.binary(max_size=50)))
def test_garbage_is_refused_and_never_crashes(text, parameters):
    """Any bytes either parse or raise InvalidArgument."""
    try:
        parse(text, parameters)
    except InvalidArgument as error:
        assert str(error)


def test_invalid_utf8_is_refused_with_its_place():
    """Text that is not UTF-8 is an error that names the byte."""
    with pytest.raises(InvalidArgument, match="byte 3"):
        parse(b"abc\xff", None)


def test_two_prompts_in_one_request_are_refused():
    """text_input, messages and prompt_token_ids exclude each other."""
    with pytest.raises(InvalidArgument, match="one of"):
        parse(b"hi", b'{"prompt_token_ids": [1]}')


def test_deeply_nested_json_is_refused():
    """A hostile nesting depth is an error of the request."""
    with pytest.raises(InvalidArgument):
        parse(b"hi", b"[" * 100_000)


def test_an_error_does_not_repeat_a_huge_value():
    """A megabyte in the wrong place is not sent back whole."""
    for values in ({"seed": "x" * 10**6}, {"temperature": "x" * 10**6}, {"x" * 10**6: 1}):
        with pytest.raises(InvalidArgument) as caught:
            parse(b"", json.dumps(values).encode())
        assert len(str(caught.value)) < 400


def test_a_message_is_utf8_whatever_the_error_quotes():
    """Triton's strings are UTF-8: half of a surrogate pair, which JSON can spell, is escaped."""
    wire = InvalidArgument("the role \ud800 is unknown").wire()
    assert wire == "invalid_argument: the role \\ud800 is unknown"
