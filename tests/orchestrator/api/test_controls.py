"""The sampling parameters that plain requests do without, for all values."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.api.controls import CONTROLS, NAMES, control
from orchestrator.errors import InvalidRequest

DEFAULTS: dict[str, Any] = {
    "n": 1, "best_of": 1, "logit_bias": {}, "min_tokens": 0, "stop_token_ids": [], "ignore_eos": False, "min_p": 0,
    "typical_p": 1, "repetition_penalty": 1.0, "presence_penalty": -0.0, "frequency_penalty": 0, "priority": 0,
}  # fmt: skip
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(1, 4), "best_of": st.integers(4, 16), "min_tokens": st.integers(0, 9),
    "logit_bias": st.dictionaries(st.integers(0, 2**31 - 1).map(str), st.floats(-100, 100), max_size=4),
    "stop_token_ids": st.lists(st.integers(0, 2**31 - 1), max_size=4), "ignore_eos": st.booleans(),
    "min_p": st.floats(0, 1), "typical_p": st.floats(0, 1, exclude_min=True),
    "repetition_penalty": st.floats(0, 10, exclude_min=True), "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2), "priority": st.integers(-1000, 1000),
}  # fmt: skip
given_fields = st.fixed_dictionaries({}, optional=VALUES)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=4,
)  # fmt: skip


def read(fields: dict[str, Any], **values: Any) -> dict[str, Any]:
    control(fields, values)
    return values


@settings(deadline=None)
@given(st.sets(st.sampled_from(sorted(DEFAULTS))), given_fields)
def test_a_default_is_as_good_as_nothing(named: set[str], fields: dict[str, Any]) -> None:
    """Naming defaults, in any order, changes nothing of what is read."""
    named -= {"best_of"}  # whose default is n
    rest = {name: DEFAULTS[name] for name in sorted(named) if name not in fields}
    nothing = {"controls": (), "n": 1, "priority": 0}
    assert nothing | read(rest | fields) == nothing | read(fields | rest) == nothing | read(fields)


@settings(deadline=None)
@given(given_fields)
def test_what_is_sent_means_what_was_given(fields: dict[str, Any]) -> None:
    """Each value that is no default goes to the model as it was meant, in an order that is always the same."""
    controls = dict(read(fields).get("controls", ()))
    assert list(controls) == sorted(controls)
    for name in CONTROLS:
        value = fields.get(name, DEFAULTS[name])
        if name == "logit_bias":
            value = {id: bias for id, bias in value.items() if bias}
        elif name == "stop_token_ids":
            value = sorted(set(value))
        assert controls.get(name, DEFAULTS[name]) == value


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(NAMES)), anything, max_size=3))
def test_nothing_but_a_refusal_comes_of_nonsense(fields: dict[str, Any]) -> None:
    """Whatever JSON holds is read or refused by a name that was given."""
    fields = {name: value for name, value in fields.items() if value is not None}  # the edges drop null before
    try:
        read(fields)
    except InvalidRequest as error:
        assert error.param is not None and error.param.split(".")[0] in fields


@pytest.mark.parametrize("fields", [{"best_of": 2, "n": 3}, {"n": 17}, {"best_of": 17}])
def test_as_many_are_made_as_are_wanted(fields: dict[str, Any]) -> None:
    """best_of is from n to 16."""
    with pytest.raises(InvalidRequest):
        read(fields)


def test_best_of_as_many_as_are_wanted_is_no_choice() -> None:
    """best_of equal to n is the same request as without it, and may be streamed."""
    assert read({"n": 3, "best_of": 3}, stream=True) == read({"n": 3}, stream=True)
    with pytest.raises(InvalidRequest, match="streamed"):
        read({"n": 1, "best_of": 3}, stream=True)
