"""API keys: what is made, what verifies, what is written down."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import keys
from orchestrator.domain import Limits
from orchestrator.keys import Key, MalformedKey

SECRET = keys.new_secret()
KEY = Key(id=keys.new_id(), tenant="acme", hash=keys.hash_of(SECRET), created=1000.0)
CREDENTIAL = keys.credential(KEY.id, SECRET)

limits = st.dictionaries(st.sampled_from(keys.LIMIT_NAMES), st.integers(0, keys.LIMIT_MAX))
times = st.none() | st.floats(0, 1e11)
names = st.from_regex(keys.NAME, fullmatch=True)
records = st.builds(
    Key, id=names, tenant=names, hash=st.just(keys.hash_of(SECRET)), scope=st.sampled_from(keys.SCOPES), limits=limits,
    created=st.floats(0, 1e11), expires=times, revoked=times, note=st.text(), old_until=st.floats(0, 1e11),
    old_hash=st.none() | st.just(keys.hash_of("x")),
)  # fmt: skip


def accepted(credential: str, key: Key = KEY, now: float = 1000.0) -> bool:
    """Whether the credential is this key's."""
    found = keys.split(credential)
    return found is not None and found[0] == key.id and key.takes(found[1], now)


def test_a_credential_has_its_form() -> None:
    """tg_, twelve lower-case base32 characters, and 32 random bytes as base64url."""
    prefix, id, secret = CREDENTIAL.split("_", 2)
    assert prefix == "tg" and len(id) == 12 and set(id) <= set("abcdefghijklmnopqrstuvwxyz234567")
    assert len(secret) == 43 and keys.split(CREDENTIAL) == (id, secret) and accepted(CREDENTIAL)


def test_no_two_keys_verify_each_other() -> None:
    """Of many keys each takes its own secret and nobody else's."""
    made = [keys.new_secret() for _ in range(60)]
    held = [replace(KEY, hash=keys.hash_of(secret)) for secret in made]
    assert all(key.takes(secret, 0) == (a == b) for a, key in enumerate(held) for b, secret in enumerate(made))
    assert len({keys.new_id() for _ in range(1000)}) == 1000


@given(st.integers(0, len(CREDENTIAL) - 1), st.characters())
def test_any_changed_character_fails(position: int, character: str) -> None:
    """A credential with one character changed is never taken, the last one of its base64 text included."""
    changed = CREDENTIAL[:position] + character + CREDENTIAL[position + 1 :]
    assert accepted(changed) == (changed == CREDENTIAL)


@given(st.integers(0, len(CREDENTIAL) - 1), st.text(min_size=1, max_size=4))
def test_a_longer_or_shorter_credential_fails(position: int, text: str) -> None:
    """Nothing may be added, left out, or put around a credential."""
    assert not accepted(CREDENTIAL[:position] + text + CREDENTIAL[position:])
    assert not accepted(CREDENTIAL[:position]) and not accepted(CREDENTIAL + "\n")


@given(st.text(max_size=600))
def test_any_text_can_be_split(text: str) -> None:
    """Whatever is sent as a credential is answered, never an exception."""
    assert keys.split(text) is None


@given(records)
def test_a_record_comes_back(key: Key) -> None:
    """What is written is what is read."""
    assert keys.read(key.id, key.to_json().encode()) == key


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tenant", ["", "a b", "ñ", "x" * 65, 1, None]), ("hash", ["", "A" * 64, SECRET, None]),
        ("scope", ["root", [], None]),
        ("limits", [[], {"x": 1}, {"per_minute": -1}, {"per_minute": True}, {"per_minute": 1.5}, None]),
        ("created", ["1", True, None]), ("expires", ["1", False, {}]), ("revoked", ["", True]), ("note", [1, None]),
        ("old_hash", ["", 1]), ("old_until", [None, "1"]), ("unknown", [1]),
    ],
)  # fmt: skip
def test_a_malformed_field_is_told(name: str, values: list[object]) -> None:
    """A value that a field cannot have, and a field that nobody knows, are MalformedKey."""
    for value in values:
        with pytest.raises(MalformedKey):
            keys.read(KEY.id, json.dumps(json.loads(KEY.to_json()) | {name: value}))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", "\xff", "[" * 100_000, KEY.to_json().replace("null", "NaN"),
             KEY.to_json().replace('"note"', '"more"')],
)  # fmt: skip
def test_what_is_no_record_is_told(text: str) -> None:
    """Anything but a whole record is MalformedKey; a NaN would make a key that never expires."""
    with pytest.raises(MalformedKey):
        keys.read(KEY.id, text)


def test_states() -> None:
    """Expired from its second on; revoked whatever else it is."""
    key = replace(KEY, expires=2000.0)
    assert [key.state(now) for now in (1999.9, 2000.0)] == ["active", "expired"]
    assert replace(key, revoked=1500.0).state(1600.0) == replace(key, revoked=1500.0).state(2500.0) == "revoked"


@given(st.floats(0, 1e6), st.floats(0, 2e6))
def test_a_rotation_ends_the_old_secret_with_its_grace(grace_s: float, later_s: float) -> None:
    """The new secret works at once, the one before until the grace is over, the one before that no more."""
    second, third = keys.new_secret(), keys.new_secret()
    key = KEY.rotated(second, 5000.0, grace_s)
    now = 5000.0 + later_s
    assert key.takes(second, now) and key.takes(SECRET, now) == (now < 5000.0 + grace_s)
    assert key.id == KEY.id and keys.read(key.id, key.to_json()) == key
    again = key.rotated(third, 5000.0, grace_s)
    assert again.takes(third, now) and not again.takes(SECRET, now)


def test_a_repr_shows_no_hash() -> None:
    """Neither hash can reach a log through a repr."""
    key = KEY.rotated(keys.new_secret(), 0.0, 10.0)
    assert key.hash not in repr(key) and str(key.old_hash) not in repr(key) and SECRET not in repr(key)


def test_nobody_takes_nothing() -> None:
    """The stand-in of keys that do not exist takes no secret and is revoked."""
    assert not keys.NOBODY.takes(SECRET, 0.0) and not keys.NOBODY.takes("", 0.0) and keys.NOBODY.state(0) == "revoked"


@given(limits, limits)
def test_limits_merge_field_by_field(weaker: dict[str, int], stronger: dict[str, int]) -> None:
    """The stronger one wins where it says something, 0 included; the defaults fill the rest."""
    defaults = Limits(1, 2, 3, 4, 5, 6)
    found = keys.merged(defaults, weaker, stronger)
    for name in keys.LIMIT_NAMES:
        assert getattr(found, name) == stronger.get(name, weaker.get(name, getattr(defaults, name)))


@given(st.integers(1, keys.DURATION_MAX_S))
def test_durations_round_trip(seconds: int) -> None:
    """What is shown can be typed."""
    assert keys.parse_duration(keys.format_duration(seconds)) == seconds


@pytest.mark.parametrize(("text", "seconds"), [("30d", 2_592_000), ("12h", 43_200), ("90m", 5_400), ("1d12h", 129_600)])
def test_durations_read_as_people_write_them(text: str, seconds: int) -> None:
    """The forms of the documentation mean what they say."""
    assert keys.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0d", "30", "d", "-1d", "1.5h", "1w", "12h1d", "1d 1h", "99999d", "٣d", "9" * 99])
def test_what_is_no_duration_is_told(text: str) -> None:
    """Nothing, a bare number, a time in the past and more than a century are refused with an example."""
    with pytest.raises(ValueError, match="30d"):
        keys.parse_duration(text)


@pytest.mark.parametrize(
    ("address", "subject"),
    [("192.0.2.1", "ip-192.0.2.1"), ("::ffff:192.0.2.1", "ip-192.0.2.1"), ("2001:DB8:0::1", "ip-2001:db8::1"),
     ("fe80::1%eth0", "ip-fe80::1"), ("", "ip-unknown"), ("a b{c}", "ip-a-b-c-"), ("x" * 99, "ip-" + "x" * 61)],
)  # fmt: skip
def test_an_address_has_one_subject(address: str, subject: str) -> None:
    """Every spelling of an address counts for the same caller, and none can break out of a key name."""
    assert keys.subject_of(address) == subject
