"""`truthgpt doctor` on a real stack of the production profile: it proves each switch, and finds each that is broken."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.counting import write_entry
from tests.orchestrator.monitor.receivers import receiving

from .stack import Stack, wait_until


@pytest.fixture
def production() -> Iterator[Stack]:
    folder = Path(tempfile.mkdtemp(prefix="truthgpt-doctor-"))
    write_entry(folder / "repository", step_delay_ms=5)
    extra = {
        "ENVIRONMENT": "production",
        "TRUTHGPT_DEVICE": "cpu",
        "TRUTHGPT_CONFIG": "",
        "TRUTHGPT_ALERT_RETRIES": "0",
    }
    made = Stack(folder / "home", folder / "repository", extra=extra)
    try:
        yield made
    finally:
        made.cli("down")
        assert made.leftovers() == []
        shutil.rmtree(folder)


def examine(stack: Stack, **environ: str) -> tuple[bool, dict[str, dict[str, Any]]]:
    stack.environ |= environ
    done = stack.cli("doctor", "--json")
    document = json.loads(done.stdout)
    assert (done.returncode == 0) == document["ok"], done.stderr
    assert all(set(row) == {"name", "ok", "detail", "hint"} for row in document["checks"])
    return document["ok"], {row["name"]: row for row in document["checks"]}


def test_every_switch_is_proven_and_every_broken_one_found(production: Stack) -> None:
    """All is well first, with a test alert that arrives; then a backup is damaged, a sender mute, a job failing, Redis
    away: each is a fault of its own check with what to do, and the others stay proven.
    """
    with receiving() as webhook:
        production.environ["TRUTHGPT_ALERT_WEBHOOK_URL"] = webhook.url
        production.start()
        assert production.cli("keys", "create", "--tenant", "acme").returncode == 0
        made = json.loads(production.cli("backup", "create", "--json").stdout)
        well, rows = examine(production)
        assert well, rows
        for name, told in {
            "monitoring": "series", "alerts": "was sent by webhook", "security": "wrong key is refused; a second",
            "audit": "written and read again", "cache": "stored and found again", "breaker": "opened at 5 failures",
            "cleanup": "10 jobs", "backup": "every byte of",
        }.items():  # fmt: skip
            assert told in rows[name]["detail"], rows[name]
        assert "backup keygen" in rows["backup"]["hint"], "in production one that is not encrypted is a warning"
        assert rows["auto_scaling"]["ok"] is None and rows["auto_scaling"]["detail"].startswith("not available")
        assert "nothing to balance" in rows["load_balancing"]["detail"] and rows["load_balancing"]["hint"]
        assert [status for status, _ in webhook.seen] == ["test"]
    with Path(made["path"]).open("r+b") as file:
        file.seek(made["bytes"] // 3)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    assert production.cli("jobs", "run", "backup_check").returncode == 1
    well, rows = examine(production)  # the webhook has gone as well
    faults = {name for name, row in rows.items() if row["ok"] is False}
    assert faults == {"backup", "alerts", "cleanup"} and all(rows[name]["hint"] for name in faults), rows
    assert "backup_check failed" in rows["cleanup"]["detail"] and webhook.url not in json.dumps(rows)
    os.kill(production.pid("redis"), signal.SIGSTOP)
    try:
        well, rows = examine(production)
    finally:
        os.kill(production.pid("redis"), signal.SIGCONT)
    assert {"redis", "cache", "security", "cleanup"} <= {name for name, row in rows.items() if row["ok"] is False}
    assert rows["breaker"]["ok"] and rows["audit"]["ok"], "what needs no Redis is proven all the same"
    wait_until(production.ready, 20, "the stack is well again")
    status = production.request("GET", "/health")[2]
    assert b"doctor" not in status, "a scratch breaker is nobody's"
