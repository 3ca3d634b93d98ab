"""Alerts of a real stack: what goes wrong is found, listed, told and found well again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.counting import write_entry
from tests.orchestrator.monitor.receivers import receiving

from .stack import Stack, wait_until


def alerts(stack: Stack, *arguments: str) -> dict[str, dict[str, Any]]:
    """By their names."""
    done = stack.cli("alerts", "list", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in json.loads(done.stdout)}


@pytest.mark.slow
def test_redis_that_does_not_answer_is_told_and_so_is_its_return() -> None:
    """Redis is stalled: the alert fires, and a webhook is told once; Redis goes on: it is resolved, and told again."""
    folder = Path(tempfile.mkdtemp(prefix="truthgpt-e2e-"))
    with receiving() as webhook:
        write_entry(folder / "repository", step_delay_ms=5)
        extra = {
            "TRUTHGPT_ALERT_WEBHOOK_URL": webhook.url, "TRUTHGPT_ALERT_INTERVAL_S": "0.5",
            "TRUTHGPT_ALERT_TIMEOUT_S": "20",
        }  # fmt: skip
        stack = Stack(folder / "home", folder / "repository", extra=extra)

        def told() -> list[str]:
            return [status for status, name in webhook.seen if name == "TruthGPTRedisAway"]

        try:
            stack.start()
            wait_until(lambda: (stack.home / "alerts.json").exists(), 30, "somebody looks at the alerts")
            assert "TruthGPTRedisAway" not in alerts(stack)
            os.kill(stack.pid("redis"), signal.SIGSTOP)
            try:
                wait_until(lambda: "TruthGPTRedisAway" in alerts(stack), 60, "the alert fires")
                found = alerts(stack)["TruthGPTRedisAway"]
                assert (found["state"], found["severity"]) == ("firing", "critical")
                wait_until(lambda: told() == ["firing"], 20, "the webhook was told")
                assert stack.cli("alerts", "ack", "redis_away").returncode == 0
            finally:
                os.kill(stack.pid("redis"), signal.SIGCONT)
            wait_until(lambda: alerts(stack)["TruthGPTRedisAway"]["state"] == "resolved", 60, "the alert is resolved")
            assert "TruthGPTRedisAway" not in alerts(stack, "--firing")
            wait_until(lambda: told() == ["firing", "resolved"], 20, "the webhook was told of the end")
        finally:
            stack.stop()
            assert stack.leftovers() == []
            shutil.rmtree(folder)
