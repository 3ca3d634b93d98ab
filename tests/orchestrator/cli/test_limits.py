"""`truthgpt limits`: what was used, and limits that are set and reset, in a real Redis."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from orchestrator.domain import ENDPOINTS, Limits
from orchestrator.limits import LIMITS_LUA, reserve_args
from orchestrator.store import leases_key, limits_key
from tests.orchestrator.gateway import write_state
from tests.redis import RealRedis

RESERVE = LIMITS_LUA + "return limits_reserve(KEYS[1], KEYS[2], ARGV[1])"


@pytest.fixture
def deployment(place: Any, server: RealRedis, client: redis.Redis) -> Any:
    """A place whose running stack has an empty Redis."""
    write_state(place.home, "http://127.0.0.1:1", redis=server.url)
    return place


def use(client: redis.Redis, tenant: str, subject: str, limits: Limits, count: int, tokens: int = 0) -> None:
    """What the gateway's workers do for so many requests to generate."""
    names = limits_key(tenant, subject, "generate"), leases_key(tenant, subject)
    for number in range(count):
        packed = reserve_args(limits, tokens=tokens, lease=f"lease{number}", enforce=True)
        assert client.eval(RESERVE, 2, *names, packed)[0] == 1


def test_show_tells_what_was_used(deployment: Any, client: redis.Redis) -> None:
    """Used, limit, remaining and reset of each window and endpoint; asking counts nothing."""
    arguments = ("--per-minute", "5", "--tokens-per-day", "1000", "--concurrency", "9")
    id = deployment.json("keys", "create", "--tenant", "acme", *arguments)["id"]
    limits = Limits(per_minute=5, tokens_per_day=1000, concurrency=9)
    use(client, "acme", id, limits, 3, tokens=100)
    for _ in range(2):
        document = deployment.json("limits", "show", id)
    assert (document["id"], document["tenant"], list(document["endpoints"])) == (id, "acme", list(ENDPOINTS))
    windows = document["endpoints"]["generate"]
    facts = {name: (row["used"], row["limit"], row["remaining"]) for name, row in windows.items()}
    assert facts == {"minute": (3, 5, 2), "tokens_day": (300, 1000, 700), "concurrency": (3, 9, 6)}
    assert 50 < windows["minute"]["reset_s"] <= 61 and 80_000 < windows["tokens_day"]["reset_s"] <= 87_840
    assert document["endpoints"]["embed"]["minute"] == {"used": 0, "limit": 5, "remaining": 5, "reset_s": 0}
    shown = deployment.run("limits", "show", id).stdout
    assert "generate" in shown and "tokens_day" in shown and "300" in shown and "of acme" in shown


def test_an_address_is_a_caller_too(deployment: Any, client: redis.Redis) -> None:
    """In every spelling, and as the id that logs have; its limits are those of the settings."""
    deployment.set(LIMIT_PER_MINUTE=7)
    use(client, "open", "ip-2001:db8::1", Limits(per_minute=7), 2)
    for name in ("2001:db8::1", "2001:DB8:0::1", "ip-2001:db8::1"):
        document = deployment.json("limits", "show", name)
        assert (document["id"], document["tenant"]) == ("ip-2001:db8::1", "open")
        assert document["endpoints"]["generate"]["minute"]["used"] == 2
    assert deployment.json("limits", "show", "192.0.2.1")["endpoints"]["generate"]["minute"]["used"] == 0


def test_set_goes_over_the_key_and_default_gives_back(deployment: Any) -> None:
    """What is set holds field by field, 0 is no limit, `default` is the key's own limit again, then the settings'."""
    deployment.set(LIMIT_PER_HOUR=100)
    id = deployment.json("keys", "create", "--tenant", "acme", "--per-minute", "5")["id"]
    first = deployment.json("limits", "set", id, "--per-minute", "0", "--per-hour", "7", "--concurrency", "2")
    assert first["set"] == {"per_minute": 0, "per_hour": 7, "concurrency": 2}
    assert (first["limits"]["per_minute"], first["limits"]["per_hour"], first["limits"]["concurrency"]) == (0, 7, 2)
    shown = deployment.run("limits", "set", id, "--per-minute", "default", "--per-hour", "default").stdout
    assert shown == f"{id} of acme: per_minute 5, per_hour 100, concurrency 2\n"
    assert set(deployment.json("limits", "show", id)["endpoints"]["infer"]) == {"minute", "hour", "concurrency"}
    assert deployment.json("keys", "show", id)["limits"] == {"per_minute": 5}


def test_no_limits_at_all_are_told(deployment: Any) -> None:
    """Who has no limits sees that, and the document has every endpoint without windows."""
    assert deployment.run("limits", "show", "192.0.2.1").stdout == "ip-192.0.2.1 of open has no limits\n"
    assert deployment.json("limits", "show", "192.0.2.1")["endpoints"] == {endpoint: {} for endpoint in ENDPOINTS}


def test_reset_forgets_what_was_used(deployment: Any, client: redis.Redis) -> None:
    """Used is 0 again for this caller and no other; running requests still count as running."""
    deployment.set(LIMIT_PER_DAY=4, LIMIT_CONCURRENCY=9)
    for address in ("192.0.2.1", "192.0.2.2"):
        use(client, "open", f"ip-{address}", Limits(per_day=4, concurrency=9), 3)
    assert deployment.run("limits", "reset", "192.0.2.1").stdout == "ip-192.0.2.1 of open: forgotten\n"
    assert deployment.json("limits", "reset", "192.0.2.1", "--yes")["endpoints"] == 0
    for address, used in (("192.0.2.1", 0), ("192.0.2.2", 3)):
        windows = deployment.json("limits", "show", address)["endpoints"]["generate"]
        assert (windows["day"]["used"], windows["concurrency"]["used"]) == (used, 3)


def test_wrong_usage(deployment: Any, place: Any) -> None:
    """No such key, no limit to set, a number that is none: told with a hint; without a Redis the hint is `up`."""
    for verb in (("show",), ("set", "--per-day", "1"), ("reset",)):
        assert "there is no key nope" in deployment.refused("limits", *verb, "nope")
    deployment.refused("limits", "set", "192.0.2.1", code=2)
    for value in ("-1", "x", "1.5", "", "9" * 14, "Default"):
        deployment.refused("limits", "set", "192.0.2.1", "--per-day", value, code=2)
    place.set(HOME=place.home / "elsewhere")
    assert "truthgpt up" in place.refused("limits", "show", "192.0.2.1")
