import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.inflight.errors import InvalidArgument
from backends.inflight.request import parse


def given_parameters(**values):
    return parse(b"hello", json.dumps(values).encode())[1]


def test_all_known_parameters_are_read():
    """Each name of the protocol reaches its field."""
    params = given_parameters(max_tokens=5, temperature=0, top_k=-1, top_p=0.5, seed=7, stop=["a", "b"], timeout_s=1.5,
                              ignore_eos=True)  # fmt: skip
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p) == (5, 0.0, 0, 0.5)
    assert (params.seed, params.stop, params.timeout_s, params.ignore_eos) == (7, ("a", "b"), 1.5, True)
    assert given_parameters().ignore_eos is False


def test_null_means_not_given_and_a_missing_seed_is_drawn():
    """Null is the default, and two requests without a seed differ."""
    assert given_parameters(max_tokens=None, stop=None).max_tokens is None
    assert given_parameters().seed != given_parameters().seed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", True), ("max_tokens", "5"), ("temperature", -0.1),
        ("temperature", "hot"), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.1), ("top_k", -2),
        ("seed", "x"), ("stop", ""), ("stop", [1]), ("stop", ["x"] * 17), ("timeout_s", 0), ("logit_bias", {}),
        ("messages", []), ("messages", [{"role": "user"}]), ("prompt_token_ids", [1.5]),
        ("temperature", 10**400), ("timeout_s", -(10**400)), ("ignore_eos", 1), ("ignore_eos", "true"),
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
