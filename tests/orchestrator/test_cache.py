"""The cache's keys and entries for all inputs, and its scripts against a real Redis."""

from __future__ import annotations

import random
import zlib
from dataclasses import replace
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cache import (
    CACHE_LUA,
    DEFAULT_TTL_S,
    ENTER,
    HEAD_MAX_BYTES,
    LEAVE,
    RENEW,
    Answer,
    Lookup,
    Ticket,
    adapt,
    decode,
    encode,
    lookup_of,
    read_head,
    ticket,
)
from orchestrator.domain import TASKS, CachePolicy, Caller, GenerateRequest, Message, Model, changed

ANSWER = Answer("¡Hola!", "stop", 7, 3)
TICKET = Ticket("k" * 64, "t", "demo", "translation")


# The key


PARTS = ("a", "b", "ab", "", '","', "\n", "ñ", "1", "null", "\U0001f600")
text = st.sampled_from(PARTS)
prompts = st.one_of(
    st.fixed_dictionaries({"text": text}),
    st.fixed_dictionaries({"token_ids": st.lists(st.integers(0, 3), max_size=3).map(tuple)}),
    st.fixed_dictionaries({"messages": st.lists(st.builds(Message, text, text), max_size=3).map(tuple)}),
)
parameters = st.fixed_dictionaries({
    "max_tokens": st.sampled_from([None, 0, 1]), "temperature": st.sampled_from([0, 1, 1.0, 0.7]),
    "top_p": st.sampled_from([1, 1.0, 0.5]), "top_k": st.sampled_from([0, 1]), "seed": st.sampled_from([None, 0, 1]),
    "stop": st.lists(text, max_size=2).map(tuple), "task": st.sampled_from(TASKS), "n": st.sampled_from([1, 2]),
    "best_of": st.sampled_from([1, 3]), "logprobs": st.sampled_from([None, 0, 2]),
    "controls": st.sampled_from([(), (("min_p", 0.5),), (("min_p", 1.0),), (("min_p", 0.5), ("typical_p", 0.5))]),
})  # fmt: skip
answerers = st.builds(
    Model, st.sampled_from(["m", "n"]), st.sampled_from(["1", "2"]), st.just(0), st.just(True),
    digest=st.sampled_from(["", "1", "2"]),
)  # fmt: skip
asked = st.tuples(st.sampled_from(["t", "u"]), answerers, prompts, parameters)


def key_of(tenant: str, model: Model, prompt: dict[str, Any], values: dict[str, Any]) -> str:
    request = GenerateRequest(id="x", model=model.name, accepted_at=1.0, **prompt, **values)
    return ticket(Caller("c", tenant), model, request).key


def same(one: Any, other: Any) -> bool:
    """Whether two requests ask for the same: a model's version matters only where it has no digest."""
    return (one[0], *one[2:]) == (other[0], *other[2:]) and (
        (one[1].name, one[1].digest, one[1].digest or one[1].version)
        == (other[1].name, other[1].digest, other[1].digest or other[1].version)
    )


@given(asked, asked, st.integers(0, 3))
def test_a_key_is_shared_exactly_by_the_same_request(one: Any, other: Any, part: int) -> None:
    """Two requests that differ in anything that may change the answer never share a key, and equal ones always do."""
    near = (*one[:part], other[part], *one[part + 1 :])  # differs in one part at most
    for candidate in (other, near):
        assert (key_of(*one) == key_of(*candidate)) == same(one, candidate)


@pytest.mark.parametrize(
    "field",
    [
        "text", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "task", "token_ids", "messages", "n",
        "best_of", "logprobs", "controls",
    ],
)  # fmt: skip
def test_every_parameter_changes_the_key(field: str) -> None:
    """Each field by itself."""
    changed = {
        "text": "other", "max_tokens": 5, "temperature": 0.5, "top_p": 0.5, "top_k": 5, "seed": 5, "stop": ("x",),
        "task": "translation", "token_ids": (1,), "messages": (Message("user", "hola"),), "n": 2, "best_of": 2,
        "logprobs": 0, "controls": (("ignore_eos", True),),
    }  # fmt: skip
    request = GenerateRequest(id="r", model="m", accepted_at=0.0, text="hola")
    model = Model("m", "1", 0, True)
    keys = {ticket(Caller("c"), model, item).key for item in (request, replace(request, **{field: changed[field]}))}
    assert len(keys) == 2


def test_settings_that_change_the_answer_change_the_key() -> None:
    """An answer of at most 50 tokens is not given once 200 are allowed; no task is the model's own."""
    request = GenerateRequest(id="r", model="m", accepted_at=0.0, text="hola")
    model = Model("m", "1", 0, True, task="translation")
    assert ticket(Caller("c"), model, request, "50").key != ticket(Caller("c"), model, request, "200").key
    assert ticket(Caller("c"), model, request) == ticket(Caller("c"), model, replace(request, task="translation"))


def test_what_does_not_change_the_answer_does_not_change_the_key() -> None:
    """Streaming or not, ids, times, who of the tenant asks and in which language: one entry."""
    model = Model("m", "1", 0, True, digest="d")
    request = GenerateRequest(id="r", model="m", accepted_at=0.0, text="hola")
    other = replace(
        request, id="s", accepted_at=5.0, stream=True, timeout_s=3.0, traceparent="00-x", model="alias", temperature=1,
        cache=CachePolicy(max_age_s=5), echo=True, priority=3,
    )  # fmt: skip
    reloaded = replace(model, version="2", created=9, ready=False, chat=True)
    assert (
        ticket(Caller("c", "t"), model, request).key
        == ticket(Caller("d", "t", "admin", language="es"), reloaded, other).key
    )


# The entry


@given(st.text(max_size=3000), st.sampled_from(["stop", "length"]), st.integers(0, 10**6), st.integers(0, 10**6))
def test_an_entry_gives_its_answer_back(text: str, reason: str, prompt_tokens: int, completion_tokens: int) -> None:
    """Text, finish reason and both counts survive, whatever the text is."""
    answer = Answer(text, reason, prompt_tokens, completion_tokens)
    entry = encode(answer, "demo model", "summarization")
    assert decode(entry) == answer
    head = read_head(entry[:HEAD_MAX_BYTES])
    assert head is not None and (head.model, head.task) == ("demo model", "summarization")


def test_long_answers_are_compressed() -> None:
    """Over 1 KiB, and not below, where it would cost time and save nothing."""
    short, long = (encode(replace(ANSWER, text="palabra " * count), "m", "t") for count in (60, 1000))
    assert b"palabra" in short and b"palabra" not in long and len(long) < 200


@given(st.binary(max_size=100), st.integers(0, 4000), st.booleans(), st.randoms(use_true_random=False))
def test_damaged_entries_never_raise(noise: bytes, at: int, long: bool, chance: random.Random) -> None:
    """Any bytes, and entries that are cut or have noise in them, are read as an answer or as a miss."""
    entry = encode(replace(ANSWER, text="x" * (2000 if long else 5)), "m", "t")
    at %= len(entry)
    head = entry.partition(b"\n")[0] + b"\n"
    for damaged in (
        noise,
        entry[:at],
        entry[:at] + noise + entry[at + 1 :],
        head + noise,
        head.replace(b"p", b"z") + noise,
    ):
        found = decode(damaged)
        assert found is None or isinstance(found.text, str)
    assert decode(entry[:-1]) is None


def test_an_entry_that_inflates_without_end_is_a_miss() -> None:
    """A deflated body is read up to a bound."""
    assert decode(b"TG1 z 0000000000000 t m\n" + zlib.compress(b" " * (80 << 20))) is None


# The time to live


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_adapting_stays_between_the_bounds(ttl_s: int, requests: int) -> None:
    """Busy tasks live at most 7200 s by it, rare ones at least 300 s, and nothing moves the wrong way or too far."""
    found = adapt(ttl_s, requests)
    assert found <= ttl_s or (requests > 100 and found <= 7200)
    assert found >= ttl_s or (requests < 10 and found >= 300)
    assert ttl_s // 2 <= found <= 2 * ttl_s


def test_adapting_by_example() -> None:
    """The rule's own numbers, and its edges."""
    assert [adapt(3600, count) for count in (0, 9, 10, 100, 101)] == [1800, 1800, 3600, 3600, 7200]
    assert (adapt(7200, 500), adapt(300, 0), adapt(500, 0)) == (7200, 300, 300)
    assert set(DEFAULT_TTL_S) == set(TASKS)


# The scripts


def enter(client: redis.Redis, asked: Ticket = TICKET, worker: str = "w1", **options: Any) -> Lookup:
    reply: Any = client.eval(ENTER.text, 3, *asked.keys(), asked.args(worker, **options))
    return lookup_of(reply)


def leave(client: redis.Redis, entry: bytes = b"", worker: str = "w1", ttl_ms: int = 60_000, large: str = "") -> None:
    client.eval(LEAVE.text, 3, *TICKET.keys(), worker, entry, ttl_ms, large)


def stats(client: redis.Redis) -> dict[bytes, bytes]:
    found: Any = client.hgetall(TICKET.keys()[2])
    return found


def test_the_way_of_an_answer(client: redis.Redis) -> None:
    """The first leads, the next follow it, and after the store all are answered; each is counted once, per task."""
    assert enter(client) == Lookup("lead")
    assert enter(client, worker="w2") == Lookup("follow", leader="w1") == enter(client)
    assert enter(client, worker="w2", again=True) == Lookup("follow", leader="w1")
    leave(client, encode(ANSWER, "demo", "translation"))
    found = enter(client, worker="w2")
    assert found.state == "hit" and found.answer is not None
    assert replace(found.answer, created=0.0) == ANSWER
    seconds, micros = client.time()
    assert abs(seconds + micros / 1e6 - found.answer.created) < 5
    assert stats(client) == {b"misses:translation": b"1", b"hits:translation": b"3"}
    assert client.pttl(TICKET.keys()[0]) > 50_000 and not client.exists(TICKET.keys()[1])
    assert found.answer.chunk().text == ANSWER.text and found.answer.chunk().finish_reason == "stop"


def test_every_name_of_a_request_has_one_hash_tag() -> None:
    """So that Redis Cluster runs the script; two tenants have no name in common."""
    assert {name.partition("}")[0] for name in TICKET.keys()} == {"truthgpt:{t"}
    assert not set(TICKET.keys()) & set(replace(TICKET, tenant="u").keys())


def test_policies(client: redis.Redis) -> None:
    """no-store neither looks nor locks; no-cache leads whatever there is and takes no lock that is held."""
    off = replace(TICKET, policy=CachePolicy(store=False))
    assert enter(client, off) == Lookup("bypass") and not client.exists(TICKET.keys()[1])
    new = replace(TICKET, policy=CachePolicy(lookup=False))
    assert enter(client, new) == Lookup("lead") and client.get(TICKET.keys()[1]) == b"w1"
    assert enter(client, new, worker="w2") == Lookup("lead") and client.get(TICKET.keys()[1]) == b"w1"
    leave(client, encode(ANSWER, "demo", "translation"))
    assert enter(client, new, worker="w2") == Lookup("lead")
    assert stats(client) == {b"bypass:translation": b"4"}


def test_max_age(client: redis.Redis) -> None:
    """An older entry makes its caller the leader; a negative bound is 0; after the clock was set back all is young."""
    leave(client, encode(ANSWER, "demo", "translation"))
    key = TICKET.keys()[0]
    aged: Any = client.get(key)

    def found(age_s: float, max_age_s: int) -> str:
        created = int(aged[6:19]) - int(age_s * 1000)
        client.set(key, aged[:6] + b"%013d" % created + aged[19:])
        client.delete(TICKET.keys()[1])
        return enter(client, replace(TICKET, policy=CachePolicy(max_age_s=max_age_s))).state

    assert [found(10, 60), found(100, 60), found(10, 0), found(10, -5), found(-1000, 60)] == [
        "hit", "lead", "lead", "lead", "hit",
    ]  # fmt: skip


@pytest.mark.parametrize("value", [b"", b"\x00\xff", b"TG2 p 1700000000000 t m\n[]", b"TG1 p x", b"{}"])
def test_a_foreign_value_is_a_miss(client: redis.Redis, value: bytes) -> None:
    """Its caller leads, holds the lock, and its answer takes the place."""
    client.set(TICKET.keys()[0], value)
    assert enter(client) == Lookup("lead") and client.get(TICKET.keys()[1]) == b"w1"
    leave(client, encode(ANSWER, "demo", "translation"))
    assert enter(client).state == "hit"


def test_a_damaged_entry_is_a_miss() -> None:
    """The script sees a good first line, the gateway that the rest is broken."""
    assert lookup_of([b"hit", b"TG1 z 1700000000000 t m\nnot deflated"]) == Lookup("lead")


def test_a_lock_is_given_back_by_its_holder_only(client: redis.Redis) -> None:
    """Neither another worker's leaving nor its renewal touches it; a forgotten lock is taken again by renewal."""
    lock = TICKET.keys()[1]
    enter(client, lock_ms=5_000)
    leave(client, worker="w2")
    assert client.eval(RENEW.text, 1, lock, "w2", 60_000) == b"w1" and 0 < client.pttl(lock) <= 5_000
    assert client.eval(RENEW.text, 1, lock, "w1", 60_000) == b"w1" and client.pttl(lock) > 5_000
    leave(client)
    assert not client.exists(lock)
    client.eval(RENEW.text, 1, lock, "w1", 60_000)
    assert client.get(lock) == b"w1"


def test_the_lock_of_a_dead_worker_is_taken_over_once(client: redis.Redis) -> None:
    """Of two that saw it die the first leads and the second follows the first."""
    enter(client)
    assert enter(client, worker="w2", again=True, dead="w1") == Lookup("lead")
    assert enter(client, worker="w3", again=True, dead="w1") == Lookup("follow", leader="w2")


def test_a_full_redis_keeps_no_lock(client: redis.Redis) -> None:
    """Redis refuses the entry for want of memory: the lock is given back all the same."""
    enter(client)
    client.config_set("maxmemory", "1")
    try:
        leave(client, encode(ANSWER, "demo", "translation"), large="translation")
        assert not client.exists(*TICKET.keys()[:2])
    finally:
        client.config_set("maxmemory", "0")


def test_the_lua_defines_nothing_but_its_own_functions(client: redis.Redis) -> None:
    """It is composed into another script: it runs nothing, reads no arguments and its names have one prefix."""
    assert "KEYS" not in CACHE_LUA and "ARGV" not in CACHE_LUA
    names = [line.split("(")[0] for line in CACHE_LUA.splitlines() if line and not line[0].isspace() and line != "end"]
    assert names and all(name.startswith("local function cache_") for name in names)
    assert client.eval(CACHE_LUA + "return 7", 0) == 7


def test_what_is_remembered_of_a_body_changes_no_key() -> None:
    """The same body asked again, by other tenants and of a newer entry, has the keys that it has without a memo."""
    plain = GenerateRequest(id="x", model="m", accepted_at=1.0, text="Hola")
    remembered = changed(plain, memo={})
    for _ in range(2):
        for tenant in [f"t{number}" for number in range(40)]:
            for digest in ("d1", "d2"):
                asks, model = Caller("c", tenant), Model("m", "1", 0, True, digest=digest)
                assert ticket(asks, model, remembered).key == ticket(asks, model, plain).key
    assert remembered.memo is not None and len(remembered.memo) < 40
