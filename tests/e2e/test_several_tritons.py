"""One gateway of two workers before two real Triton servers, while one of them is killed, stopped or changed."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.clock import awake
from tests.counting import write_entry

from .load import Load, outcomes, until
from .stack import Stack, kill

PORTS = ("TRITON_HTTP", "TRITON_HTTP_2")
SPANISH = ("uno", "dos", "tres")
WINDOW_S = 2.0  # in which what ran on a server that died may still end
BACK_S = 20.0
RUN_S = 1.0


@contextmanager
def several(tritons: int, **parameters: object) -> Iterator[Stack]:
    """A stack of so many servers, with the counting model."""
    folder = Path(tempfile.mkdtemp(prefix="truthgpt-e2e-"))
    write_entry(folder / "repository", **parameters)
    extra = {"TRUTHGPT_TRITONS": str(tritons), "TRUTHGPT_WORKERS": "2"}
    stack = Stack(folder / "home", folder / "repository", extra=extra)
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()
        assert stack.leftovers() == []
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Two servers; each test leaves them well."""
    with several(2, slots=8, max_len=2000, step_delay_ms=5, max_queue=80) as started:
        yield started


def load(stack: Stack, clients: int = 8) -> Load:
    return Load(stack.url, stack.model, "none", clients)


def states(stack: Stack) -> list[str]:
    """Of the servers, by what one worker says."""
    return [row["state"] for row in json.loads(stack.request("GET", "/health")[2])["tritons"]]


def all_ready(stack: Stack) -> bool:
    """By what every worker says, most likely."""
    return all(states(stack) == ["ready", "ready"] for _ in range(8))


def works(stack: Stack, port: str) -> bool:
    """Whether requests run on a server at this moment."""
    return bool(stack.load(port)["running"])


async def assert_shared(stack: Stack) -> None:
    """Under a load both servers get requests."""
    for port in PORTS:
        await until(lambda port=port: works(stack, port), BACK_S, f"{port} gets requests")


def assert_well(samples: list[Any]) -> None:
    assert samples and set(outcomes(samples)) == {"ok"}, outcomes(samples)


@pytest.mark.parametrize(
    ("victim", "number"), [("triton-2", signal.SIGKILL), ("triton", signal.SIGSTOP)], ids=["killed", "stopped"]
)
async def test_a_server_that_dies_under_load_fails_nobody_who_has_no_token(stack: Stack, victim, number):
    """What has begun on it may end with an error in its stream; all others are answered, and it takes its share again."""
    async with load(stack) as running:
        await assert_shared(stack)
        assert_well(await running.during(RUN_S))
        before, other = stack.pid(victim), stack.pid("triton" if victim == "triton-2" else "triton-2")
        began = awake()
        kill(before, number)
        ill = await running.since(began - RUN_S, WINDOW_S)
        assert set(outcomes(ill)) <= {"ok", "in-band"}, outcomes(ill)
        assert_well(await running.during(RUN_S))
        await until(lambda: stack.pid(victim) != before and all_ready(stack), BACK_S, "it is back")
        await assert_shared(stack)
        again = await running.since(began + WINDOW_S, 0.5)
        assert_well(again)
    assert stack.pid("triton" if victim == "triton-2" else "triton-2") == other, "the other one is left alone"


def publish(stack: Stack, number: int) -> Path:
    """Add a version, in one step, that counts in Spanish."""
    with tempfile.TemporaryDirectory(dir=stack.repository.parent) as folder:
        made = write_entry(Path(folder), words=SPANISH, number=number)
        target = stack.repository / "counting" / str(number)
        (made / str(number)).rename(target)
    return target


def versions(stack: Stack) -> list[dict[str, str]]:
    """What each server says of the model: version -> state."""
    found = []
    for port in PORTS:
        rows = json.loads(stack.request("POST", "/v2/repository/index", {}, port)[2])
        found.append({row["version"]: row["state"] for row in rows if row["name"] == stack.model})
    return found


def command(stack: Stack, *arguments: str, code: int = 0) -> Any:
    done = stack.cli("models", *arguments, "--json")
    assert done.returncode == code, done.stdout + done.stderr + stack.logs()
    return done.stderr if code else json.loads(done.stdout)


async def test_models_change_on_all_servers_or_on_none_without_a_failed_request(stack: Stack):
    """A reload under load moves both; where the second cannot load a version the first one is moved back."""
    publish(stack, 2)
    backend = stack.home / "triton" / "backends-2" / "inflight" / "model.py"
    whole = backend.read_text()
    async with load(stack) as running:
        backend.write_text("raise RuntimeError('broken for this server alone')\n")
        said = await asyncio.to_thread(command, stack, "reload", "counting", code=1)
        assert "version 2 did not load" in said and "broken for this server alone" in said
        assert "version 1 goes on serving" in said and "triton-2.log" in said
        assert [found["1"] for found in versions(stack)] == ["READY", "READY"]
        backend.write_text(whole)

        done = await asyncio.to_thread(command, stack, "reload", "counting")
        assert (done["version"], done["before"], done["draining"]) == ("2", "1", [])
        assert [found["2"] for found in versions(stack)] == ["READY", "READY"]
        assert not any(found["1"] == "READY" for found in versions(stack))
        assert (await asyncio.to_thread(command, stack, "reload", "counting"))["changed"] is False
        await assert_shared(stack)
        assert_well(await running.during(0.2))
    assert_well(running.samples)
    listed = {row["version"]: row["state"] for row in command(stack, "list")}
    assert listed == {"1": "NOT_LOADED", "2": "READY"}

    assert command(stack, "unload", "counting", "--force")["state"] == "NOT_LOADED"
    assert not any("READY" in found.values() for found in versions(stack))
    assert command(stack, "load", "counting", "--version", "1")["changed"] is True
    assert [found["1"] for found in versions(stack)] == ["READY", "READY"]
    shutil.rmtree(stack.repository / "counting" / "2")


def test_a_stack_uses_the_servers_of_another_one(stack: Stack, tmp_path: Path):
    """With triton_urls no Triton is started and no repository is needed; what the servers have is not changed here."""
    urls = ",".join(f"http://127.0.0.1:{stack.ports[port]}" for port in PORTS)
    user = Stack(tmp_path / "home", tmp_path / "no repository", "default", {"TRUTHGPT_TRITON_URLS": urls})
    addresses = user.start()
    try:
        assert addresses["tritons"] == [] and set(user.state.processes) == {"redis", "gateway"}
        report = json.loads(user.cli("status", "--json").stdout)
        assert report["ready"] and [row["url"] for row in report["tritons"]] == urls.split(",")
        done = user.cli("generate", "one", "--max-tokens", "2", "--json")
        assert json.loads(done.stdout)["model"] == "counting", done.stderr
        for verb in ("load", "reload", "unload"):
            refused = user.cli("models", verb, "counting", "--json")
            assert refused.returncode == 1 and "no Triton of its own" in refused.stderr
        findings = {row["name"]: row for row in json.loads(user.cli("doctor", "--json").stdout)["checks"]}
        assert all(findings[name]["ok"] for name in ("server", "ports", "model", "entry", "leftovers")), findings
    finally:
        user.stop()
    assert user.leftovers() == []
    assert stack.ready(), "the servers are left alone"
