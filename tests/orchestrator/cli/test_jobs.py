"""`truthgpt jobs` on a real Redis."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
import redis

from orchestrator.jobs.ledger import Ledger
from orchestrator.jobs.process import RAN_AND_FAILED
from orchestrator.jobs.table import JOBS as TABLE
from orchestrator.ops import jobrun
from orchestrator.settings import Settings
from orchestrator.store import JOBS
from tests.redis import RealRedis

STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@pytest.fixture
def deployment(place: Any, server: RealRedis, client: redis.Redis) -> Any:
    """A home and a repository whose Redis is a real, empty one."""
    place.set(REDIS_URL=server.url)
    place.home.mkdir()
    place.repository.mkdir()
    return place


def row(deployment: Any, name: str) -> dict[str, Any]:
    return next(one for one in deployment.json("jobs", "list") if one["name"] == name)


def test_the_list_of_a_fresh_home(deployment: Any) -> None:
    """Every job with its schedule and next time, nothing of runs; those that are off have no next time."""
    deployment.set(SCHEDULES="models=off; logs=@daily")
    rows = deployment.json("jobs", "list")
    assert [one["name"] for one in rows] == [name for name in TABLE if not name.startswith("backup")]
    for one in rows:
        assert (one["last_run"], one["last_result"], one["paused"], one["running"]) == (None, None, False, False)
        assert one["next_run"] is None if one["name"] == "models" else STAMP.fullmatch(one["next_run"])
    assert row(deployment, "models")["schedule"] is None and row(deployment, "logs")["schedule"] == "@daily"
    assert not list(deployment.home.glob(".truthgpt-id*")) and not list(deployment.repository.glob(".truthgpt-id*"))
    text = deployment.run("jobs", "list").stdout
    assert "shared_memory" in text and "never" in text and "off" in text
    deployment.set(BACKUP="true")
    assert row(deployment, "backup_check")["schedule"] == "0 5 * * *"


def test_running_one(deployment: Any) -> None:
    """It runs, says what it did, and is in the list and in the history, which may be of one job or of all."""
    done = deployment.run("jobs", "run", "logs")
    assert done.exit_code == 0 and done.stdout.startswith("logs: nothing to remove (")
    document = deployment.json("jobs", "run", "cache_ttls")
    assert (document["name"], document["result"], document["manual"]) == ("cache_ttls", "ok", True)
    assert STAMP.fullmatch(document["started"])
    listed = row(deployment, "logs")
    assert listed["last_result"] == "ok" and STAMP.fullmatch(listed["last_run"]) and listed["error"] is None
    assert [one["name"] for one in deployment.json("jobs", "history")] == ["cache_ttls", "logs"]
    assert [one["name"] for one in deployment.json("jobs", "history", "logs")] == ["logs"]
    assert len(deployment.json("jobs", "history", "--limit", "1")) == 1
    assert "nothing to remove" in deployment.run("jobs", "history", "logs").stdout
    assert deployment.run("jobs", "history", "models").stderr == "no runs yet\n"


def test_one_that_fails(deployment: Any, client: redis.Redis) -> None:
    """Exit code 1, the reason on standard error and in the list; with --json one document all the same."""
    (deployment.home / "audit").mkdir()
    (deployment.home / "audit" / "base").write_text("forged")
    deployment.set(AUDIT_DAYS="1", AUDIT_KEY="k" * 32)
    said = deployment.refused("jobs", "run", "audit")
    assert "base was changed, or written with another key" in said
    document = deployment.json("jobs", "run", "audit", code=1)
    assert document["result"] == "failed" and "base" in document["error"]
    assert row(deployment, "audit")["last_result"] == "failed"
    name = jobrun.name_of(Settings.load(), TABLE["audit"])
    client.hset(JOBS, f"{name}:due", "1")
    # what the gateway starts says by its exit code that it ran, and is not to be begun again
    assert deployment.run("jobs", "run", "audit", "--scheduled").exit_code == RAN_AND_FAILED
    assert "audit failed: " in deployment.run("jobs", "list").stdout


def test_a_scheduled_run_only_where_it_is_due(deployment: Any, client: redis.Redis) -> None:
    """What the gateway starts does nothing and says nothing unless the job is due; then it is done once."""
    for _ in range(2):
        done = deployment.run("jobs", "run", "cache_ttls", "--scheduled")
        assert (done.exit_code, done.output) == (0, "")
    client.hset(JOBS, "cache_ttls:due", str(time.time() - 7200))
    assert "cache_ttls: " in deployment.run("jobs", "run", "cache_ttls", "--scheduled").stdout
    assert deployment.run("jobs", "run", "cache_ttls", "--scheduled").output == ""
    (run,) = deployment.json("jobs", "history", "cache_ttls")
    assert run["manual"] is False
    assert "--scheduled" not in deployment.run("jobs", "run", "--help").stdout


def test_pausing_and_resuming(deployment: Any) -> None:
    """A paused job is shown so, has no next time, runs with --force alone; both changes are in the audit log."""
    assert deployment.run("jobs", "pause", "models").stdout == "models is paused\n"
    assert deployment.json("jobs", "pause", "models") == {"name": "models", "paused": True, "changed": False}
    listed = row(deployment, "models")
    assert listed["paused"] is True and listed["next_run"] is None
    assert "is paused" in deployment.refused("jobs", "run", "models")
    assert deployment.run("jobs", "run", "models", "--force").exit_code == 0
    assert deployment.run("jobs", "resume", "models").stdout == "models is resumed\n"
    assert deployment.run("jobs", "resume", "models").stdout == "models was already resumed\n"
    rows = [one for one in deployment.json("audit", "tail") if one["event"] == "security"]
    assert [(one["operation"], one["detail"]) for one in rows] == [("jobs pause", "models"), ("jobs resume", "models")]


def test_one_that_is_running(deployment: Any, client: redis.Redis) -> None:
    """A second run is refused with who is at it, and the list shows it."""
    settings = Settings.load()
    name = jobrun.name_of(settings, TABLE["logs"])
    assert Ledger(client).claim(name, "logs", "there:7", time.time(), None).token
    assert "logs is running (there:7)" in deployment.refused("jobs", "run", "logs")
    listed = row(deployment, "logs")
    assert listed["running"] is True and listed["holder"] == "there:7"
    assert "running" in deployment.run("jobs", "list").stdout


def test_without_redis(place: Any) -> None:
    """Schedules can be listed; what needs the ledger says so."""
    rows = place.run("jobs", "list", "--json")
    assert rows.exit_code == 0 and json.loads(rows.stdout)[0]["name"] == "logs" and "warning: " in rows.stderr
    for arguments in (("run", "logs"), ("pause", "logs"), ("resume", "logs"), ("history",)):
        assert "no Redis is set" in place.refused("jobs", *arguments)
    assert not place.home.exists()


def test_wrong_names_and_schedules(deployment: Any) -> None:
    """An unknown job is wrong usage; a wrong schedule is told with the right form."""
    assert "'lgos' is none of logs, " in deployment.refused("jobs", "run", "lgos", code=2)
    deployment.set(SCHEDULES="logs=0 25 * * *")
    said = deployment.refused("jobs", "list")
    assert "'0 25 * * *' is no time for logs" in said and "minute, hour, day, month and weekday" in said
