"""Cache-Control and X-TruthGPT-Task as both edges read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.policy import cache_policy, task
from orchestrator.domain import TASKS, CachePolicy
from orchestrator.errors import InvalidRequest


@pytest.mark.parametrize(
    ("header", "policy"),
    [
        ("", CachePolicy()),
        ("no-cache", CachePolicy(lookup=False)),
        ("No-Store", CachePolicy(store=False)),
        ("no-cache, no-store", CachePolicy(lookup=False, store=False)),
        ("max-age=60", CachePolicy(max_age_s=60)),
        ('max-age="60", max-age=7', CachePolicy(max_age_s=7)),
        ("max-age=0,no-transform", CachePolicy(max_age_s=0)),
        ("max-age=99999999999999999999", CachePolicy(max_age_s=2**31 - 1)),
        ("max-age=soon", CachePolicy(max_age_s=0)),
        ("max-age=-1", CachePolicy(max_age_s=0)),
        ("max-age", CachePolicy(max_age_s=0)),
        ("only-if-cached, private", CachePolicy()),
    ],
)
def test_cache_control(header: str, policy: CachePolicy) -> None:
    """The three directives count in any case and order; a max-age that is none counts as 0."""
    assert cache_policy({b"cache-control": header.encode()}) == policy


@given(st.binary(max_size=100))
def test_any_cache_control_is_survived(header: bytes) -> None:
    """No header raises or gives an age below zero."""
    assert (cache_policy({b"cache-control": header}).max_age_s or 0) >= 0


def test_tasks() -> None:
    """A known task is taken, an unknown one is refused by name, and none is the default."""
    assert task({}, "translation") == "translation"
    assert [task({b"x-truthgpt-task": name.encode()}, "translation") for name in TASKS] == list(TASKS)
    with pytest.raises(InvalidRequest) as caught:
        task({b"x-truthgpt-task": b"cooking\xff"}, "translation")
    assert "sentiment_analysis" in caught.value.text.en
