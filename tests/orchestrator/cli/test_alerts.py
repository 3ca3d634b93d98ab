"""`truthgpt alerts`, on a book that a watcher wrote, with servers that really receive."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from orchestrator.monitor import alertbook
from orchestrator.monitor.notifier import Notifier
from orchestrator.monitor.watcher import Watcher
from orchestrator.settings import Settings
from tests.orchestrator.gateway import write_state
from tests.orchestrator.monitor.receivers import mailing, mute, receiving
from tests.orchestrator.monitor.test_conditions import WELL

GPUS = [{"gpu": "0", "used_bytes": 99, "total_bytes": 100}, {"gpu": "1", "used_bytes": 99, "total_bytes": 100}]


def looked(home: Path, *looks: tuple[float, dict[str, Any]]) -> None:
    """Have a watcher look: so many seconds ago, at these figures."""
    now, at = time.time(), 0.0
    figures: dict[str, Any] = {}
    settings = Settings.load({"home": home})
    watcher = Watcher(settings, lambda: {**WELL, **figures}, Notifier(settings), None, lambda: at, lambda: at, "node-1")

    async def run() -> None:
        nonlocal at, figures
        for ago_s, seen in looks:
            at, figures = now - ago_s, seen
            await watcher.look()

    asyncio.run(run())


@pytest.fixture
def watched(place: Any) -> Any:
    """A home with two alerts that fire and one that was resolved."""
    bad = {"audit_up": False, "models": [{"name": "demo", "fallback": True}], "redis_up": False}
    better = {"audit_up": False, "models": [{"name": "demo", "fallback": True}]}
    looked(place.home, (200, bad), (180, bad), (100, better), (30, better), (0, better))
    return place


def test_list_has_what_fires_the_critical_first(watched: Any) -> None:
    """The firing alerts with their fields in JSON, the resolved ones behind them; a table for people."""
    one, other = watched.json("alerts", "list", "--firing")
    assert (one["name"], one["state"], one["severity"]) == ("TruthGPTAuditAway", "firing", "critical")
    assert (other["name"], other["severity"], other["labels"]) == (
        "TruthGPTModelOnFallback", "warning", {"model": "demo"},
    )  # fmt: skip
    assert 195 < time.time() - datetime.fromisoformat(one["since"]).timestamp() < 300
    assert one["summary"] == "The audit log cannot be written."
    everything = watched.json("alerts", "list")
    assert [(row["name"], row["state"]) for row in everything] == [
        ("TruthGPTAuditAway", "firing"), ("TruthGPTModelOnFallback", "firing"), ("TruthGPTRedisAway", "resolved"),
    ]  # fmt: skip
    assert everything[2]["resolved"] is not None
    done = watched.run("alerts", "list")
    assert done.exit_code == 0 and done.stdout.splitlines()[0].split() == [
        "NAME", "STATE", "SEVERITY", "SINCE", "(UTC)", "WHAT",
    ]  # fmt: skip
    assert "TruthGPTAuditAway" in done.stdout and "resolved" in done.stdout and done.stderr == ""
    rows = [line.split() for line in done.stdout.splitlines()[1:]]  # each in one line, and the labels in its sentence
    assert [row[0] for row in rows] == ["TruthGPTAuditAway", "TruthGPTModelOnFallback", "TruthGPTRedisAway"]
    assert " ".join(rows[1][5:]) == "The model demo runs on the CPU because its device failed."


def test_list_where_nothing_fires(place: Any) -> None:
    """An empty list and success; that nobody has looked is said on standard error."""
    assert place.json("alerts", "list") == []
    done = place.run("alerts", "list")
    assert (done.exit_code, done.stdout) == (0, "no alert fires, and none has in the last hour\n")
    assert "no running stack has looked" in done.stderr
    assert not place.home.exists()


def test_old_news_are_said_to_be_old(place: Any) -> None:
    """Of a stack that has not looked for minutes the alerts are shown, with a warning."""
    looked(place.home, (600, {"audit_up": False}))
    done = place.run("alerts", "list", "--json")
    assert len(json.loads(done.stdout)) == 1 and "nobody looks at the alerts now" in done.stderr


def test_what_the_book_cannot_have_is_seen(watched: Any, gateway: Any) -> None:
    """On a full disk list names what fires by the running stack and why; ack and show of it say so, too."""
    write_state(watched.home, gateway.url, ops=gateway.url)
    gateway.summary = {"alerts": {"firing": 0, "critical": 0, "names": [], "unwritten": None}}
    assert "warning" not in watched.run("alerts", "list").stderr
    names = ["TruthGPTAuditAway", "TruthGPTDiskFull"]
    gateway.summary = {"alerts": {"firing": 2, "critical": 2, "names": names, "unwritten": "No space left on device"}}
    done = watched.run("alerts", "list")
    assert "cannot be written (No space left on device), and is as of 20" in done.stderr
    assert "warning: what fires now: TruthGPTAuditAway, TruthGPTDiskFull\n" in done.stderr
    assert done.exit_code == 0 and "TruthGPTModelOnFallback" in done.stdout
    assert "TruthGPTDiskFull fires, but the alert book cannot" in watched.refused("alerts", "ack", "disk_full")
    assert "cannot be written: No space" in watched.refused("alerts", "show", "disk_full")
    assert "does not fire" in watched.refused("alerts", "ack", "memory_high")
    watched.json("alerts", "clear", "audit_away"), watched.json("alerts", "clear", "model_on_fallback")
    done = watched.run("alerts", "list", "--firing")
    assert done.stdout == "" and "TruthGPTDiskFull" in done.stderr  # and not that nothing fires
    gateway.summary = {"alerts": 1}  # of another version
    assert watched.run("alerts", "list", "--firing").stdout == "no alert fires\n"


@pytest.mark.parametrize("name", ["TruthGPTRedisAway", "redis_away", "redisaway", "truthgpt-redis-away"])
def test_show_tells_all(watched: Any, name: str) -> None:
    """Everything that is known of the alerts of a name, its page and what to do first; short forms are understood."""
    (shown,) = watched.json("alerts", "show", name)
    assert (shown["name"], shown["state"], shown["host"]) == ("TruthGPTRedisAway", "resolved", "node-1")
    assert shown["runbook"] == "docs/operations.md#truthgptredisaway"
    text = watched.run("alerts", "show", name).stdout
    assert "docs/operations.md#truthgptredisaway" in text and "Start Redis again" in text


def test_a_name_that_is_none(watched: Any) -> None:
    """An unknown name fails with the nearest one; a known one that does not fire fails, too."""
    assert "did you mean TruthGPTRedisAway?" in watched.refused("alerts", "show", "RedisAwy")
    assert "docs/alerts.md" in watched.refused("alerts", "ack", "zzz")
    assert "has not in the last hour" in watched.refused("alerts", "show", "disk_full")
    assert "does not fire" in watched.refused("alerts", "ack", "disk_full")
    assert "does not fire" in watched.refused("alerts", "ack", "redis_away")  # it is resolved


def test_ack_is_in_the_book_and_in_the_audit_log(watched: Any) -> None:
    """All alerts of the name are acknowledged by who ran the command; the audit log says so; the note is bounded."""
    looked(watched.home, (90, {"gpus": GPUS}), (0, {"gpus": GPUS}))
    rows = watched.json("alerts", "ack", "gpu_memory_high", "--note", "a bigger card comes")
    assert sorted(row["labels"]["gpu"] for row in rows) == ["0", "1"]
    assert {row["acknowledged"]["note"] for row in rows} == {"a bigger card comes"}
    assert "acknowledged" in watched.run("alerts", "list").stdout
    assert "a bigger card comes" in watched.run("alerts", "show", "gpu_memory_high").stdout
    (event,) = watched.json("audit", "tail", "--event", "security")
    assert (event["operation"], event["detail"]) == ("alerts ack", "name=TruthGPTGpuMemoryHigh")
    watched.refused("alerts", "ack", "gpu_memory_high", "--note", "two\nlines", code=2)


def test_clear_forgets(watched: Any) -> None:
    """Without a name the resolved ones, with one those of that name; what holds fires again at the next look."""
    assert [row["name"] for row in watched.json("alerts", "clear")] == ["TruthGPTRedisAway"]
    assert len(watched.json("alerts", "list")) == 2
    assert watched.run("alerts", "clear", "audit_away").stdout == "cleared 1 alert\n"
    assert [row["name"] for row in watched.json("alerts", "list", "--firing")] == ["TruthGPTModelOnFallback"]
    assert watched.run("alerts", "clear", "audit_away").stdout == "cleared 0 alerts\n"
    assert [event["detail"] for event in watched.json("audit", "tail", "--event", "security")] == [
        "resolved ones", "name=TruthGPTAuditAway",
    ]  # fmt: skip
    looked(watched.home, (0, {"audit_up": False}))
    assert "TruthGPTAuditAway" in [row["name"] for row in watched.json("alerts", "list")]


def test_a_spoilt_book(place: Any) -> None:
    """Reading one fails with a hint; a command that changes it begins a new one."""
    place.home.mkdir()
    (place.home / alertbook.NAME).write_text("{")
    assert "is no alert book" in place.refused("alerts", "list")
    assert place.json("alerts", "clear") == [] and (place.home / "alerts.json.corrupt").read_text() == "{"


def test_test_needs_a_sender(place: Any) -> None:
    """Where none is configured it fails and names the settings; of the one that was asked for its own."""
    assert "TRUTHGPT_ALERT_WEBHOOK_URL" in place.refused("alerts", "test")
    assert "TRUTHGPT_SMTP_URL" in place.refused("alerts", "test", "--sender", "email")
    place.refused("alerts", "test", "--sender", "pigeon", code=2)


def test_test_sends_by_every_sender(place: Any) -> None:
    """Each sender really gets a test message, and the command says how long it took."""
    with receiving() as webhook, receiving() as slack, mailing() as box:
        place.set(
            ALERT_WEBHOOK_URL=webhook.url, ALERT_SLACK_URL=slack.url, ALERT_EMAIL_TO="ops@example.org",
            SMTP_URL=f"smtp://127.0.0.1:{box.port}", ALERT_TIMEOUT_S=30,
        )  # fmt: skip
        rows = place.json("alerts", "test")
        assert [(row["sender"], row["ok"]) for row in rows] == [("webhook", True), ("slack", True), ("email", True)]
        assert webhook.seen == [("test", "TruthGPTTest")] and "This is a test" in slack.requests[0].json["text"]
        assert box.mails[0][2]["Subject"].startswith("[TruthGPT] TEST TruthGPTTest on ")
        done = place.run("alerts", "test", "--sender", "slack")
        assert done.exit_code == 0 and done.stdout.startswith("slack    ok  sent") and len(webhook.requests) == 1


def test_test_fails_where_one_does(place: Any) -> None:
    """One that hangs or refuses fails the command within the time-out, and no secret is shown."""
    with receiving(404) as webhook, mute() as port:
        place.set(
            ALERT_WEBHOOK_URL=webhook.url, ALERT_SLACK_URL=f"http://ana:s3cr3t@127.0.0.1:{port}/s3cr3t",
            ALERT_EMAIL_TO="ops@example.org", SMTP_URL=f"smtp://ana:s3cr3t@127.0.0.1:{port}", ALERT_TIMEOUT_S=1,
        )  # fmt: skip
        done = place.run("alerts", "test")
        assert done.exit_code == 1 and "s3cr3t" not in done.output
        assert [line.split()[:2] for line in done.stdout.splitlines()] == [
            ["webhook", "FAILED"], ["slack", "FAILED"], ["email", "FAILED"],
        ]  # fmt: skip
        assert "404" in done.stdout and done.stdout.count("no answer within 1 s") == 2
        rows = place.json("alerts", "test", code=1)
        assert [row["ok"] for row in rows] == [False] * 3
