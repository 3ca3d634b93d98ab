"""Keyed hashes: what an auditor can make again, what cannot be mistaken for something else, and the key's file."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.domain import EncodeRequest, GenerateRequest, InferRequest, Message, Tensor, changed
from orchestrator.fingerprint import KEY_FILE, AuditKeyError, Fingerprint, load_key

KEY = b"a key of sixteen bytes or more"
PRINTS = Fingerprint(KEY)


def generate(**prompt: object) -> GenerateRequest:
    return GenerateRequest(id="r", model="m", accepted_at=0.0, **prompt)  # type: ignore[arg-type]


def by_hand(use: str, data: bytes) -> str:
    """A hash as docs/audit.md tells an auditor to make it."""
    own = hmac.new(KEY, f"truthgpt audit {use}".encode(), hashlib.sha256).digest()
    return hmac.new(own, data, hashlib.sha256).hexdigest()[:32]


@pytest.mark.parametrize(
    ("request_", "canonical"),
    [
        (generate(text="¿Qué?"), "text\n¿Qué?"),
        (generate(messages=(Message("user", 'a"\n'), Message("assistant", "ñ"))),
         'messages\n[["user","a\\"\\n"],["assistant","ñ"]]'),
        (generate(token_ids=(15, 7)), "tokens\n[15,7]"),
        (EncodeRequest(id="r", model="m", accepted_at=0.0, texts=("a", "b")), 'texts\n["a","b"]'),
        (InferRequest(id="r", model="m", accepted_at=0.0, inputs=(
            Tensor("in", "INT8", (1, 2), b"xy"), Tensor("t", "BYTES", (2,), elements=(b"one", b"")))),
         "tensors\n2:in4:INT85:[1,2]2:xy1:t5:BYTES3:[2]0:3:one0:"),
    ],
)  # fmt: skip
def test_every_prompt_can_be_hashed_by_hand(
    request_: GenerateRequest | EncodeRequest | InferRequest, canonical: str
) -> None:
    """A request's hash is HMAC-SHA-256 over the documented form of its prompt, under the documented key."""
    assert PRINTS.request(request_) == by_hand("input", canonical.encode())


def test_a_body_that_comes_again_has_the_same_hash() -> None:
    """What is remembered of it is the hash of this key, and no other key's."""
    plain = GenerateRequest(id="r", model="m", accepted_at=0.0, text="Hola")
    remembered = changed(plain, memo={})
    for prints in (PRINTS, Fingerprint(b"another key"), PRINTS):
        assert prints.request(remembered) == prints.request(plain)


def test_a_caller_is_hashed_by_another_key_than_a_prompt() -> None:
    """A caller's id and a prompt of the same letters are not the same hash; nobody is nobody."""
    assert PRINTS.caller("k2") == by_hand("caller", b"k2") != PRINTS.text("k2")
    assert PRINTS.caller("") == ""


prompts = st.one_of(
    st.text(max_size=20).map(lambda text: generate(text=text)),
    st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), min_size=1, max_size=3).map(
        lambda turns: generate(messages=tuple(Message(*turn) for turn in turns))
    ),
    st.lists(st.integers(0, 99), min_size=1, max_size=4).map(lambda ids: generate(token_ids=tuple(ids))),
    st.lists(
        st.builds(Tensor, st.text(max_size=3), st.sampled_from(["INT8", "BYTES"]), st.tuples(st.integers(0, 9)),
                  st.binary(max_size=4), st.lists(st.binary(max_size=3), max_size=2).map(tuple)),
        min_size=1, max_size=2,
    ).map(lambda tensors: InferRequest(id="r", model="m", accepted_at=0.0, inputs=tuple(tensors))),
)  # fmt: skip


@given(prompts, prompts)
def test_two_prompts_have_one_hash_only_when_they_are_equal(
    one: GenerateRequest | InferRequest, other: GenerateRequest | InferRequest
) -> None:
    """No text can pass for a conversation, no list of tokens for another, no tensor for two."""
    assert (PRINTS.request(one) == PRINTS.request(other)) == (one == other)


@given(st.text(alphabet=st.characters(), max_size=30))
def test_any_text_has_a_hash(text: str) -> None:
    """Also one that JSON can carry and UTF-8 cannot: half of a surrogate pair."""
    assert re.fullmatch("[0-9a-f]{32}", PRINTS.text(text + "\ud800"))


def test_the_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    """Four processes that need a key at the same time all get one; its file is mode 0600 and nothing else is left."""
    code = "import sys, pathlib; from orchestrator.fingerprint import load_key; sys.stdin.read(1); " \
        "print(load_key(pathlib.Path(sys.argv[1]), None).hex())"  # fmt: skip
    home = tmp_path / "home"
    racing = [
        subprocess.Popen([sys.executable, "-c", code, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    for process in racing:
        assert process.stdin is not None
        process.stdin.write(b"g")
        process.stdin.flush()
    keys = {process.communicate()[0] for process in racing}
    assert len(keys) == 1 and len(keys.pop().strip()) == 64
    assert [path.name for path in home.iterdir()] == [KEY_FILE]
    assert stat.S_IMODE((home / KEY_FILE).stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    """A key that somebody else can read or replace proves nothing, so it is not used; the hint mends it."""
    load_key(tmp_path, None)
    (tmp_path / KEY_FILE).chmod(mode)
    with pytest.raises(AuditKeyError, match="others may read") as refused:
        load_key(tmp_path, None)
    assert refused.value.hint == f"chmod 600 {tmp_path / KEY_FILE}"


def test_a_key_that_is_none_is_refused_and_left_alone(tmp_path: Path) -> None:
    """A damaged key file is never replaced: the log that it belongs to could not be checked any more."""
    (tmp_path / KEY_FILE).touch(0o600)
    os.truncate(tmp_path / KEY_FILE, 10)
    with pytest.raises(AuditKeyError, match="is no key"):
        load_key(tmp_path, None)
    assert (tmp_path / KEY_FILE).stat().st_size == 10


def test_where_the_key_comes_from(tmp_path: Path) -> None:
    """The setting outranks the file; without both a reader makes none; a folder that is none is a clear error."""
    assert load_key(tmp_path, "a key of the settings", create=False) == b"a key of the settings"
    with pytest.raises(AuditKeyError, match="there is no key"):
        load_key(tmp_path, None, create=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(AuditKeyError):
        load_key(tmp_path / "file", None)
