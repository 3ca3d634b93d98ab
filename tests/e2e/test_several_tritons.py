"""One gateway of two workers before two real Triton servers, while one of them is killed, stopped or changed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.clock import awake
from tests.counting import write_entry

from .load import Load, outcomes, until
from .stack import COMMAND, Stack, kill, wait_until

PORTS = ("TRITON_HTTP", "TRITON_HTTP_2")
SPANISH = ("uno", "dos", "tres")
WINDOW_S = 2.0  # in which what ran on a server that died may still end
BACK_S = 20.0
RUN_S = 1.0
ASKED_S = 0.5  # more than a request of the load takes where nothing is wrong


@contextlib.contextmanager
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
    with contextlib.suppress(OSError, LookupError, ValueError):  # it is being started again
        return bool(stack.load(port)["running"])
    return False


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
    """What has begun on it may end with an error; all others are answered, and it takes its share again."""
    async with load(stack) as running:
        await assert_shared(stack)
        assert_well(await running.during(RUN_S))
        before, other = stack.pid(victim), stack.pid("triton" if victim == "triton-2" else "triton-2")
        kill(before, number)
        began = awake()
        assert_well(await running.since(began, WINDOW_S))
        assert_had_begun(running.samples)
        assert_well(await running.during(RUN_S))
        await until(lambda: stack.pid(victim) != before and all_ready(stack), BACK_S, "it is back")
        await assert_shared(stack)
        assert_well(await running.since(began, 0.5))
    assert stack.pid("triton" if victim == "triton-2" else "triton-2") == other, "the other one is left alone"


def assert_had_begun(samples: list[Any]) -> None:
    """What failed had a token: of a stream the client has it, of an answer that comes whole the gateway."""
    assert set(outcomes(samples)) <= {"ok", "in-band", "model_unavailable"}, outcomes(samples)


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
    assert_well(running.samples)
    assert_listed(stack, {"1": "NOT_LOADED", "2": "READY"})


def assert_listed(stack: Stack, wanted: dict[str, str]) -> None:
    assert {row["version"]: row["state"] for row in command(stack, "list")} == wanted


@pytest.mark.slow
def test_a_stack_uses_the_servers_of_another_one(stack: Stack, tmp_path: Path):
    """With triton_urls no Triton is started and no repository is needed; what the servers have is not changed here."""
    urls = ",".join(f"http://127.0.0.1:{stack.ports[port]}" for port in PORTS)
    user = Stack(tmp_path / "home", tmp_path / "no repository", "default", {"TRUTHGPT_TRITON_URLS": urls})
    addresses = user.start()
    try:
        assert addresses["tritons"] == [] and set(user.state.processes) == {"redis", "gateway"}
        report = json.loads(user.cli("status", "--json").stdout)
        assert report["ready"] and [row["url"] for row in report["tritons"]] == urls.split(",")
        assert user.state.model == stack.model, "what they have and the settings do not"
        refused = user.cli("models", "unload", "counting", "--json")
        assert refused.returncode == 1 and "no Triton of its own" in refused.stderr
    finally:
        user.stop()
    assert user.leftovers() == []
    assert stack.ready(), "the servers are left alone"


@pytest.mark.slow
def test_a_model_is_unloaded_from_all_servers_or_from_none_and_loaded_again(stack: Stack):
    """Where one server is stopped, the other one keeps its model; once it is back both do as they are told."""
    numbers = sorted(folder.name for folder in (stack.repository / "counting").iterdir() if folder.is_dir())
    stopped = [stack.pid(name) for name in ("supervisor", "triton-2")]  # the former would mend the latter
    for pid in stopped:
        kill(pid, signal.SIGSTOP)
    said = command(stack, "unload", "counting", "--force", code=1)
    assert f"Triton at http://127.0.0.1:{stack.ports[PORTS[1]]} does not answer" in said
    for pid in reversed(stopped):
        kill(pid, signal.SIGCONT)
    wait_until(lambda: all_ready(stack), BACK_S, "it is back")
    assert all("READY" in found.values() for found in versions(stack))
    assert command(stack, "unload", "counting", "--force")["state"] == "NOT_LOADED"
    assert not any("READY" in found.values() for found in versions(stack))
    assert_listed(stack, dict.fromkeys(numbers, "NOT_LOADED"))
    assert command(stack, "load", "counting")["changed"] is True
    assert [found[numbers[-1]] for found in versions(stack)] == ["READY", "READY"]
    assert command(stack, "reload", "counting")["changed"] is False


@pytest.mark.slow
async def test_a_server_that_flaps_costs_only_what_was_being_written(stack: Stack):
    """Killed every five seconds for half a minute: no request fails but streams that had begun."""
    async with load(stack) as running:
        await assert_shared(stack)
        began, killed = awake(), list[float]()
        while awake() - began < 30.0:
            before = stack.pid("triton-2")
            kill(before, signal.SIGKILL)
            killed.append(awake())
            await asyncio.sleep(5.0)
            await until(lambda before=before: stack.pid("triton-2") != before, BACK_S, "another server runs")
        await until(lambda: all_ready(stack), 70.0, "its rests are over")
        await assert_shared(stack)
    for moment in killed:
        # what had begun when it died may have had a token, nothing else may fail
        running.samples = [sample for sample in running.samples if not moment - ASKED_S < sample.began <= moment]
    assert_well(running.samples)


def test_ctrl_c_twice_waits_for_no_stream_on_any_server(tmp_path: Path):
    """The second one ends the servers and the gateway at once, and nothing is left of them."""
    write_entry(tmp_path / "repository", step_delay_ms=20)
    extra = {"TRUTHGPT_TRITONS": "2", "TRUTHGPT_DRAIN_S": "30"}
    stack = Stack(tmp_path / "home", tmp_path / "repository", extra=extra)
    log = tmp_path / "out"
    with log.open("wb") as out:
        process = subprocess.Popen([*COMMAND, "up"], env=stack.environ, stdout=out, stderr=out)
        try:
            wait_until(lambda: b"To stop" in log.read_bytes(), 30, "it is ready")
            streams = [stack.stream(f"one {number}", max_tokens=3000) for number in range(4)]
            wait_until(lambda: works(stack, PORTS[0]) and works(stack, PORTS[1]), 10, "both have streams")
            began = awake()
            process.send_signal(signal.SIGINT)
            wait_until(lambda: not stack.ready(), 5, "it stops")
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0 and awake() - began < 10, log.read_text()
            for stream in streams:
                stream.close()
        finally:
            process.kill()
            process.wait()
    assert stack.leftovers() == []


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_throughput_grows_with_the_number_of_servers():
    """With steps that take 80 ms whatever else runs, N servers of four slots give at least 0.95 N times as much."""
    rates: dict[int, list[float]] = {number: [] for number in (1, 2, 3, 4)}
    for _ in range(3):
        for number, found in rates.items():
            with several(number, slots=4, step_delay_ms=80) as stack:
                found.append(await tokens_per_s(stack, clients=8 * number))
    medians = {number: statistics.median(found) for number, found in rates.items()}
    assert all(medians[number] >= 0.95 * number * medians[1] for number in medians), rates


async def tokens_per_s(stack: Stack, clients: int, tokens: int = 16, seconds: float = 5.0) -> float:
    """What clients get that keep all slots busy and ask for so many tokens each, once they have begun."""
    body = {"model": stack.model, "max_tokens": tokens}
    done, going = 0, True

    async def ask(http: aiohttp.ClientSession, number: int) -> None:
        nonlocal done
        asked = 0
        while going:
            asked += 1
            given = {**body, "prompt": f"one {number} {asked}", "seed": 1000 * number + asked}
            async with http.post(f"{stack.url}/v1/completions", json=given) as answer:
                assert answer.status == 200, await answer.text()
                done += json.loads(await answer.read())["usage"]["completion_tokens"]

    async with aiohttp.ClientSession() as http:
        asking = [asyncio.create_task(ask(http, number)) for number in range(clients)]
        await asyncio.sleep(2.0)
        began, before = time.monotonic(), done
        await asyncio.sleep(seconds)
        rate = (done - before) / (time.monotonic() - began)
        going = False
        await asyncio.gather(*asking)
    return rate
