"""What can be measured and what cannot: Target, Load, Goals."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.bench import openai
from orchestrator.bench.plan import Goals, Load, PlanError, Target

URL = "http://127.0.0.1:8080"


@pytest.mark.parametrize(
    ("protocol", "url", "found"),
    [
        ("openai", "http://host", (False, "host", 80, "")),
        ("openai", "https://host/base/v1/", (True, "host", 443, "/base/v1")),
        ("openai", "http://[::1]:9000", (False, "::1", 9000, "")),
        ("kserve-http", "http://host:8000/prefix", (False, "host", 8000, "/prefix")),
        ("kserve-grpc", "host:8001", (False, "host", 8001, "")),
        ("kserve-grpc", "grpcs://host", (True, "host", 443, "")),
        ("kserve-grpc", "grpc://host", (False, "host", 8001, "")),
    ],
)
def test_a_url_says_where_the_endpoint_is(protocol: Any, url: str, found: tuple[bool, str, int, str]) -> None:
    """Scheme, host, port and prefix, with the port that each scheme has."""
    target = Target(url, protocol, "demo")
    assert (target.tls, target.host, target.port, target.prefix) == found


def test_a_base_url_of_openais_clients_is_taken_as_well() -> None:
    """With /v1 at its end or without, the path is the same."""
    assert {openai.path(Target(f"{URL}/a{end}", "openai", "demo")) for end in ("", "/", "/v1", "/v1/")} == {
        "/a/v1/chat/completions"
    }


@pytest.mark.parametrize(
    "url",
    ["", "host", "ftp://host", "http://", "http://host:99999", "http://host:x", "http://host/?a=1", "http://host/#a",
     "http://ho st", "http://host/\r\nX: y", "http://hóst", "http://[::1", "grpc://host:1", "//host", "http://h\x00"],
)  # fmt: skip
def test_what_is_no_url_is_refused_with_an_example(url: str) -> None:
    """Nothing reaches a socket or a request line that is not an address."""
    with pytest.raises(PlanError, match="url") as caught:
        Target(url, "openai", "demo")
    assert "http://127.0.0.1:8080" in caught.value.hint


def test_a_password_in_a_url_is_refused_unrepeated() -> None:
    """It would stand in every report; the message does not hold it either."""
    with pytest.raises(PlanError) as caught:
        Target("http://user:hunter22@host", "openai", "demo")
    assert "hunter22" not in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize(
    "more",
    [
        {"protocol": "smtp"}, {"endpoint": "edits"}, {"model": ""}, {"model": "a\nb"}, {"model": "m" * 501},
        {"model": "half \ud800"}, {"task": "encode"}, {"endpoint": "embeddings"}, {"api_key": "a b"}, {"api_key": ""},
        {"api_key": "schlüssel"}, {"api_key": "a\r\nX: y"}, {"headers": (("X", "a\r\nY: b"),)},
        {"headers": (("X Y", "a"),)}, {"headers": (("", "a"),)}, {"headers": (("Content-Length", "3"),)},
        {"headers": (("X", "\u20ac"),)}, {"protocol": "kserve-grpc", "headers": (("x!", "a"),)},
        {"protocol": "kserve-grpc", "headers": (("x", "é"),)},
        {"protocol": "kserve-grpc", "headers": (("x-bin", "a"),)},
        {"protocol": "kserve-grpc", "headers": (("grpc-timeout", "1S"),)},
    ],
)  # fmt: skip
def test_what_no_target_can_have_is_refused(more: dict[str, Any]) -> None:
    """Names, keys and headers that would break a request or put another one in it."""
    with pytest.raises(PlanError) as caught:
        Target(**{"url": URL, "protocol": "openai", "model": "demo", **more})
    assert caught.value.hint and "\n" not in str(caught.value)


def test_a_report_of_a_target_holds_no_secret() -> None:
    """Neither its JSON nor its repr has the key or what a header says."""
    target = Target(URL, "openai", "demo", api_key="topsecret1", headers=(("Authorization", "Bearer other-secret"),))
    told = json.dumps(target.to_json()) + repr(target)
    assert "topsecret1" not in told and "other-secret" not in told
    assert target.to_json()["headers"] == ["Authorization"]
    assert target.secrets == ("topsecret1", "other-secret")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"rate": 1.0}, "either"), ({"concurrency": None}, "either"), ({"requests": None}, "no end"),
        ({"concurrency": 0}, "concurrency"), ({"concurrency": 4097}, "concurrency"), ({"concurrency": 1.5}, "integer"),
        ({"concurrency": True}, "integer"), ({"requests": 0}, "requests"), ({"warmup": -1}, "warmup"),
        ({"prompt_tokens": 0}, "prompt_tokens"), ({"output_tokens": 1_000_001}, "output_tokens"),
        ({"duration_s": float("nan")}, "duration_s"), ({"duration_s": float("inf")}, "duration_s"),
        ({"timeout_s": 0}, "timeout_s"), ({"temperature": -1}, "temperature"), ({"max_in_flight": 0}, "max_in_flight"),
        ({"concurrency": None, "rate": 0.0}, "rate"), ({"concurrency": None, "rate": 1e9}, "rate"),
        ({"prompt_tokens": None}, "no prompts"), ({"extra_body": {"model": "x"}}, "model"),
        ({"extra_body": {"stream": False, "input": 1}}, "input, stream"), ({"extra_body": {"a": float("nan")}}, "JSON"),
        ({"extra_body": {"a": 1 << 64}}, "JSON"), ({"extra_body": {"a": "\ud800"}}, "JSON"),
        ({"extra_body": {"a": object()}}, "JSON"),
    ],
)  # fmt: skip
def test_what_no_load_can_have_is_refused_by_name(more: dict[str, Any], named: str) -> None:
    """Each refusal names the field; what could not be sent is refused before anything is."""
    with pytest.raises(PlanError, match=named) as caught:
        Load(**{"requests": 1, **more})
    assert caught.value.hint


@pytest.mark.parametrize("value", [-1.0, float("nan"), 86_401.0, True, "1"])
def test_goals_are_seconds(value: Any) -> None:
    """Anything else is refused."""
    with pytest.raises(PlanError, match="goodput itl_s"):
        Goals(itl_s=value)


@given(
    st.none() | st.floats(0, 86_400), st.none() | st.floats(0, 86_400), st.integers(1, 4096), st.integers(1, 10**6)
)  # fmt: skip
def test_a_load_is_told_whole(ttft: float | None, itl: float | None, clients: int, tokens: int) -> None:
    """Every load's parameters are JSON, and its goals hold what was asked for and nothing else."""
    load = Load(concurrency=clients, duration_s=1.0, output_tokens=tokens, goals=Goals(ttft_s=ttft, itl_s=itl))
    told = json.loads(json.dumps(load.to_json(), allow_nan=False))
    given = {"ttft_s": ttft, "itl_s": itl}
    assert told["goodput"] == {name: value for name, value in given.items() if value is not None}
    assert bool(load.goals) == bool(told["goodput"])
    assert told["concurrency"] == clients and told["max_in_flight"] is None
