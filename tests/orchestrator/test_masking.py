"""Secrets never reach a log: keys, credentials and passwords are masked wherever they stand in a text."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orchestrator import keys
from orchestrator.masking import masked, suspicious

AROUND = st.text(max_size=40)
ID = st.text("abcdefghijklmnopqrstuvwxyz234567", min_size=12, max_size=12)
SECRET = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-", min_size=43, max_size=43)
# what nobody would find in the text around it by chance
TOKEN = st.text("ABCDEFGHJKMNPQRSTVWXYZ23456789._~+/=-", min_size=12, max_size=60)
FORMS = (
    "Authorization: Bearer {}", "authorization: Basic {}", "AUTHORIZATION={}", "{{'authorization': 'Bearer {}'}}",
    "(b'authorization', b'{}')", '{{"Authorization": "Token {}"}}', "sent as bearer {}", "x-api-key: {}",
    "(b'x-api-key', b'{}')", "TRUTHGPT_API_KEY={}", "password: {}", "audit_key={}", "https://h/p?a=1&password={}&b=2",
    r'{{\"password\": \"{}\"}}', r'{{\"Authorization\": \"Basic {}\"}}', r'{{\\\"x-api-key\\\":\\\"{}\\\"}}',
)  # fmt: skip


@given(before=AROUND, id=ID, secret=SECRET, after=AROUND)
def test_a_key_is_masked_wherever_it_stands(before: str, id: str, secret: str, after: str) -> None:
    """Whatever text is around it, of a key only its id is left, which listings show anyway."""
    shown = masked(f"{before}{keys.credential(id, secret)}{after}")
    assert secret not in shown
    assert f"tg_{id}_***" in shown or "***" in shown


@given(id=ID, secret=SECRET, kept=st.integers(1, 42))
def test_a_part_of_a_key_is_masked(id: str, secret: str, kept: int) -> None:
    """A key that was cut off, as a long model name is, shows nothing of its secret either."""
    assert masked(f"model {keys.credential(id, secret)[: 16 + kept]}") == f"model tg_{id}_***"


@pytest.mark.parametrize("form", FORMS)
@given(secret=TOKEN)
def test_a_named_secret_is_masked(form: str, secret: str) -> None:
    """In a header, a mapping's repr, JSON, an assignment or a query the value after a secret's name is gone."""
    text = form.format(secret)
    assert secret not in masked(text)
    assert masked(text).count("***") >= 1


@given(
    user=st.text("abcdef", max_size=8),
    password=st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C")), min_size=6, max_size=30),
)
def test_a_url_loses_its_password(user: str, password: str) -> None:
    """The password of any URL is masked, unescaped signs in it included; host and user stay readable."""
    assume(password not in f"Redis redis://{user}:***@host:6379/0 is away")
    shown = masked(f"Redis redis://{user}:{password}@host:6379/0 is away")
    assert shown == f"Redis redis://{user}:***@host:6379/0 is away"


@given(
    text=st.one_of(st.text(), st.lists(st.sampled_from([*FORMS, "tg_", "://a:b@", "***", " ", ",", "="])).map("".join))
)
def test_masking_twice_is_masking_once(text: str) -> None:
    """Whoever masks a text that was masked before changes nothing."""
    assert masked(masked(text)) == masked(text)


@given(text=st.text(st.characters(codec="ascii", exclude_characters=":=_"), max_size=200))
def test_other_text_stays_as_it_is(text: str) -> None:
    """A text without a key, a URL or a secret's name is not changed."""
    assume(not suspicious(text))
    assert masked(text) == text
    assert json.dumps(masked(text)) == json.dumps(text)
