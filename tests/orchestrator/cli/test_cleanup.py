"""`truthgpt cleanup`, with and without a Redis."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from orchestrator.jobs.ledger import Ledger
from orchestrator.jobs.table import JOBS
from orchestrator.ops import jobrun
from orchestrator.ops.cleanup import TARGETS
from orchestrator.ops.cleanwork import Work
from orchestrator.settings import Settings
from tests.redis import RealRedis


@pytest.fixture
def full(place: Any) -> Any:
    """A home in which something is old, and a model of five versions."""
    for name in ("logs/gateway.log.1", "logs/gateway.log", "cache/a/x", "cache/a\nb"):
        path = place.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x" * 10)
        os.utime(path, (1.0, 1.0))
    place.export(versions=5)
    return place


def left(place: Any) -> list[str]:
    return sorted(str(path.relative_to(place.home)) for path in (place.home / "logs").iterdir())


def test_a_plan_changes_nothing(full: Any) -> None:
    """It names what would go, with its size, age and reason, as a table and as one document."""
    document = full.json("cleanup", "plan")
    found = {Path(item["path"]).name: item for item in document["items"]}
    assert set(found) == {"gateway.log.1", "x", "a\nb", "1", "2"} and document["omitted"] == 0
    assert found["x"]["bytes"] == 10 and found["x"]["age_s"] > 1e9 and found["x"]["what"] == "cache"
    assert found["1"]["age_s"] is None and "5 versions, 3 are kept" in found["1"]["why"]
    assert [row["name"] for row in document["targets"]] == list(TARGETS)
    assert document["count"] == 5 and document["bytes"] == sum(item["bytes"] for item in document["items"])
    text = full.run("cleanup", "plan", "cache", "logs").stdout
    assert "cache: 2 to remove, 20 bytes" in text and "a?b" in text.replace("\n", "") and "models" not in text
    assert left(full) == ["logs/gateway.log", "logs/gateway.log.1"] and (full.home / "cache" / "a" / "x").exists()
    assert not (full.home / "audit").exists()


def test_a_plan_beside_a_redis_changes_nothing_either(full: Any, server: RealRedis, client: redis.Redis) -> None:
    """Looking gives neither home nor repository an identity, and writes nothing into Redis."""
    full.set(REDIS_URL=server.url)
    assert full.json("cleanup", "plan")["count"] == 5
    assert not (full.home / ".truthgpt-id").exists() and not (full.repository / ".truthgpt-id").exists()
    assert client.keys() == []


def test_it_runs_without_a_stack_and_without_redis(full: Any) -> None:
    """All of it, or the targets that are named; that somebody has removed something is in the audit log."""
    assert full.run("cleanup", "run", "logs").stdout == "logs: 1 removed, 10 bytes\n"
    document = full.json("cleanup", "run")
    assert {row["name"]: row["count"] for row in document["targets"] if row["count"]} == {"cache": 2, "models": 2}
    assert left(full) == ["logs/gateway.log"] and list((full.home / "cache").iterdir()) == []
    assert sorted(path.name for path in (full.repository / "demo").iterdir()) == ["3", "4", "5", "config.pbtxt"]
    (one, two) = (row for row in full.json("audit", "tail") if row["event"] == "security")
    assert (one["operation"], one["detail"]) == ("cleanup run", "logs 1") and two["detail"] == "cache 2, models 2"
    assert full.json("cleanup", "run")["count"] == 0


def test_with_a_redis_it_takes_the_leases(full: Any, server: RealRedis, client: redis.Redis) -> None:
    """A target that a job works on at this moment is left to it; the others are done, and are in the history."""
    full.set(REDIS_URL=server.url)
    name = jobrun.name_of(Settings.load(), JOBS["cache"])
    Ledger(client).claim(name, "cache", "there:7", time.time(), None)
    Ledger(client).pause("logs", time.time())  # by hand it goes all the same
    done = full.run("cleanup", "run")
    assert done.exit_code == 0 and "warning: cache is being done by there:7" in done.stderr
    assert left(full) == ["logs/gateway.log"] and (full.home / "cache" / "a" / "x").exists()
    assert "logs" in [row["name"] for row in full.json("jobs", "history")]


def test_a_redis_that_does_not_answer_keeps_nobody_from_cleaning(full: Any) -> None:
    """With an address at which nobody is it warns and goes on."""
    full.set(REDIS_URL="unix:///nowhere/redis.sock")
    done = full.run("cleanup", "run", "logs", "cache")
    assert done.exit_code == 0 and "nobody else is kept from cleaning up" in done.stderr
    assert "cache: 2 removed" in done.stdout


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_redis_that_does_not_answer_keeps_every_version(full: Any, command: str) -> None:
    """What other replicas serve cannot be told then: no version goes, or would, and the command has failed."""
    full.set(REDIS_URL="unix:///nowhere/redis.sock")
    done = full.run("cleanup", command, "models", "logs")
    assert done.exit_code == 1 and "Redis does not say what other replicas serve" in done.stderr
    assert "models: 0 " in done.stdout and "logs: 1 " in done.stdout
    assert sorted(path.name for path in (full.repository / "demo").iterdir())[:5] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("as_json", [False, True])
def test_one_that_is_told_to_end_says_what_it_has_done(
    full: Any, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    """SIGTERM in the middle: exit code 143, and what was removed is told, and stands in the audit log."""
    first = TARGETS["cache"]

    def told(settings: Settings, work: Work) -> None:
        first(settings, work)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setitem(TARGETS, "cache", told)
    done = full.run("cleanup", "run", *(["--json"] if as_json else []))
    assert done.exit_code == 143 and "error: it was told to end before it was done" in done.stderr
    if as_json:
        assert json.loads(done.stdout)["count"] == 3
    else:
        assert "cache: 2 removed" in done.stdout and "models" not in done.stdout
    (row,) = (row for row in full.json("audit", "tail") if row["event"] == "security")
    assert (row["operation"], row["detail"]) == ("cleanup run", "logs 1, cache 2")
    assert (full.repository / "demo" / "1").exists()


def test_what_cannot_go_is_an_error_at_the_end(full: Any) -> None:
    """The other targets are done, the path and the reason are told, the exit code is 1, with --json too."""
    (full.home / "audit").mkdir()
    (full.home / "audit" / "base").write_text("forged")
    full.set(AUDIT_DAYS="1", AUDIT_KEY="k" * 32)
    done = full.run("cleanup", "run", "audit", "logs")
    assert done.exit_code == 1 and "logs: 1 removed" in done.stdout and "base was changed" in done.stderr
    document = full.json("cleanup", "run", "audit", code=1)
    assert document["targets"][0]["failed"] == 1 and "base was changed" in document["targets"][0]["errors"][0]


def test_wrong_names_are_wrong_usage(place: Any) -> None:
    """A target that there is none of is told with those that there are; an empty place has nothing to clean."""
    assert "'lgos' is none of logs, cache" in place.refused("cleanup", "run", "lgos", code=2)
    assert place.json("cleanup", "run")["count"] == 0 and not place.home.exists()
    assert f"there is no home {place.home}" in place.refused("cleanup", "run", "logs")
    assert f"there is no model repository {place.repository}" in place.refused("cleanup", "run", "models")
    assert not place.home.exists()
