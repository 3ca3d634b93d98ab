"""The audit log of a real stack: what requests leave in it, and that it can be checked while it is being written."""

from __future__ import annotations

import json
from typing import Any

from .stack import Stack, wait_until


def events(stack: Stack, *arguments: str) -> list[dict[str, Any]]:
    done = stack.cli("audit", "tail", "-n", "1000", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_a_request_and_a_refusal_are_in_the_log(stack: Stack) -> None:
    """A generation with the hash of its prompt, a call of the admin port without a key, and a chain that verifies."""
    prompt = "quince hombres sobre el cofre del muerto"
    body = {"model": stack.model, "prompt": prompt, "max_tokens": 3}
    status, _, _ = stack.request("POST", "/v1/completions", body, headers={"X-Request-Id": "audited-1"})
    assert status == 200
    status, _, _ = stack.request("POST", "/v2/repository/index", {}, port="OPS", headers={"X-Request-Id": "audited-2"})
    assert status == 401
    found: dict[str, dict[str, Any]] = {}

    def written() -> bool:
        found.update((row["id"], row) for row in events(stack) if row.get("id", "").startswith("audited-"))
        return len(found) == 2

    wait_until(written, 10, "both events are written")
    hashed = stack.cli("audit", "hash", input=prompt).stdout.strip()
    generation, refusal = found["audited-1"], found["audited-2"]
    assert (generation["event"], generation["outcome"], generation["input_hash"]) == ("generation", "ok", hashed)
    assert generation["completion_tokens"] == 3 and generation["model"] == stack.model
    assert (refusal["event"], refusal["kind"]) == ("security", "unauthenticated")
    assert refusal["address"] == generation["caller"]
    done = stack.cli("audit", "verify")
    assert done.returncode == 0 and done.stdout.startswith("ok: "), done.stdout + done.stderr
    assert json.loads(stack.request("GET", "/health")[2])["audit"]["state"] == "ok"
    for path in (stack.home / "audit").iterdir():
        assert prompt.encode() not in path.read_bytes()
