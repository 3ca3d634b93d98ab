"""Models loaded, reloaded and unloaded on the real Triton while clients keep asking."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import shutil
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.local import modelset, tritonserver
from orchestrator.triton import Deadlines, Repository, Triton
from tests.counting import WORDS, write_entry

from .stack import Stack, kill, wait_until

VOCABULARIES = {1: WORDS, 2: ("uno", "dos", "tres"), 3: ("eins", "zwei", "drei")}
PARAMETERS = {"slots": 8, "max_len": 2000, "step_delay_ms": 5, "max_queue": 80}
DRAIN_S = 2.0


def publish(stack: Stack, number: int, name: str = "counting", **changes: Any) -> Path:
    """Add a version as an export does, in one step. Each version counts in another language."""
    with tempfile.TemporaryDirectory(dir=stack.repository.parent) as folder:
        made = write_entry(Path(folder), name, words=VOCABULARIES[number], number=number, **PARAMETERS | changes)
        target = stack.repository / name
        target.mkdir(parents=True, exist_ok=True)
        (made / str(number)).rename(target / str(number))
        (made / "config.pbtxt").replace(target / "config.pbtxt")
    return target / str(number)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A stack of two models, `counting` and `beside`; each test leaves both in version 1."""
    folder = Path(tempfile.mkdtemp(prefix="truthgpt-e2e-"))
    extra = {"TRUTHGPT_MODELS": "beside", "TRUTHGPT_DRAIN_S": str(DRAIN_S)}
    made = Stack(folder / "home", folder / "repository", extra=extra)
    try:
        for name in ("counting", "beside"):
            publish(made, 1, name)
        made.start()
        yield made
    finally:
        made.stop()
        assert made.leftovers() == []
        shutil.rmtree(folder)


def command(stack: Stack, *arguments: str, code: int = 0) -> Any:
    """A `truthgpt models` command: its document, or what it says of its failure."""
    done = stack.cli("models", *arguments, "--json", timeout=100)
    assert done.returncode == code, done.stdout + done.stderr + stack.logs()
    return done.stderr if code else json.loads(done.stdout)


def ask(stack: Stack, prompt: str = "one", model: str = "counting", port: str = "HTTP", **body: object) -> Any:
    """(status, set of words, X-Cache) of one completion."""
    given = {"model": model, "prompt": prompt, "max_tokens": 3, "temperature": 0, **body}
    status, headers, answer = stack.request("POST", "/v1/completions", given, port, timeout=30)
    text = json.loads(answer)["choices"][0]["text"] if status == 200 else ""
    return status, set(text.split()), headers.get("x-cache")


class Load:
    """Clients that ask one request after another, half of them as streams, each prompt a new one. A context."""

    def __init__(self, stack: Stack, clients: int = 4) -> None:
        self._stack, self._going = stack, True
        self.versions: Counter[int] = Counter()
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._client, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        wait_until(lambda: sum(self.versions.values()) > 5, 20, "the load runs")
        return self

    def __exit__(self, *raised: object) -> None:
        self._going = False
        for thread in self._threads:
            thread.join(30)

    def more(self, count: int = 8) -> None:
        """Wait for so many further answers."""
        before = sum(self.versions.values())
        wait_until(lambda: self.failures or sum(self.versions.values()) >= before + count, 30, "answers go on")

    def _client(self, number: int) -> None:
        asked = 0
        while self._going:
            asked += 1
            prompt, tokens = f"one {number} {asked}", 4 + asked % 60
            try:
                words = self._stream(prompt, tokens) if number % 2 else self._whole(prompt, tokens)
            except (OSError, http.client.HTTPException, AssertionError, ValueError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                continue
            of = [version for version, vocabulary in VOCABULARIES.items() if words <= set(vocabulary)]
            if len(of) == 1:
                self.versions[of[0]] += 1
            else:
                self.failures.append(f"an answer of several versions: {words}")

    def _whole(self, prompt: str, tokens: int) -> set[str]:
        status, words, _ = ask(self._stack, prompt, max_tokens=tokens)
        assert status == 200, status
        return set(words)

    def _stream(self, prompt: str, tokens: int) -> set[str]:
        stream = self._stack.stream(prompt, max_tokens=tokens, temperature=0)
        try:
            events = list(stream.events())
            assert events[-1] == "[DONE]", events[-1]
            texts = [event["choices"][0]["text"] for event in events[:-1]]
            assert events[-2]["choices"][0]["finish_reason"] == "length"
            return set("".join(texts).split())
        finally:
            stream.close()


def told(stack: Stack) -> str:
    """What the gateway and the supervisor say of anything but good requests, for a failing test's message."""
    lines = (stack.home / "logs" / "gateway.log").read_text().splitlines()
    telling = [line for line in lines if '"outcome":"ok"' not in line]
    return "\n".join([*telling, (stack.home / "logs" / "supervisor.log").read_text()])


@contextmanager
def streaming(stack: Stack, **body: Any) -> Iterator[list[Any]]:
    """A stream that is running; its events, all of them once the context is left."""
    stream, events = stack.stream(**body), list[Any]()
    reader = threading.Thread(target=lambda: events.extend(stream.events()))
    reader.start()
    try:
        wait_until(lambda: len(events) > 3, 10, "the stream runs")
        yield events
        reader.join(60)
    finally:
        stream.close()


def break_graph(version: Path) -> None:
    """A graph that no backend can load, with a manifest that is right about it."""
    data = b"no graph at all"
    (version / "model.onnx").write_bytes(data)
    manifest = json.loads((version / "manifest.json").read_text())
    manifest["files"]["model.onnx"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (version / "manifest.json").write_text(json.dumps(manifest))


def test_a_reload_under_load_fails_no_request(stack: Stack) -> None:
    """Forth, to a version that does not load, and back: every answer is whole and of one version, none fails."""
    cached = ask(stack, "the same", seed=1)[1]
    assert ask(stack, "the same", seed=1)[1:] == (cached, "hit") and cached <= set(VOCABULARIES[1])
    with Load(stack) as load:
        publish(stack, 2)
        load.more()
        assert set(load.versions) == {1}, "a version that was only published is not served"
        done = command(stack, "reload", "counting")
        assert (done["version"], done["before"], done["changed"]) == ("2", "1", True)
        status, words, cache = ask(stack, "the same", seed=1)
        assert status == 200 and words <= set(VOCABULARIES[2]) and cache == "miss", "not what the old version said"
        began_with = dict(load.versions)
        load.more()
        assert load.versions[1] <= began_with[1] + 4, "what had begun on the old version, and nothing else"
        assert command(stack, "reload", "counting")["changed"] is False

        break_graph(publish(stack, 3))
        said = command(stack, "reload", "counting", code=1)
        assert "version 3 did not load" in said and "version 2 goes on serving" in said
        load.more()
        shutil.rmtree(stack.repository / "counting" / "3")

        assert command(stack, "reload", "counting", "--version", "1")["before"] == "2"
        load.more()
    assert load.failures == [], told(stack)
    assert load.versions[1] and load.versions[2] and not load.versions[3]
    assert ask(stack, "the same", seed=1) == (200, cached, "hit"), "an answer of the same entry is good again"
    rows = {(row["name"], row["version"]): row["state"] for row in command(stack, "list")}
    assert rows == {("counting", "1"): "READY", ("counting", "2"): "NOT_LOADED", ("beside", "1"): "READY"}
    shutil.rmtree(stack.repository / "counting" / "2")


def test_several_models_are_served_side_by_side_and_one_is_unloaded(stack: Stack) -> None:
    """Each answers by its name; a stream ends on a model that is being unloaded, new requests are refused, the others
    are ready all the while, and nothing of it stays in shared memory."""
    listed = json.loads(stack.request("GET", "/v1/models")[2])["data"]
    assert [row["id"] for row in listed] == ["beside", "counting"]
    assert ask(stack)[0] == ask(stack, model="beside")[0] == 200
    with streaming(stack, model="beside", max_tokens=250) as events, ThreadPoolExecutor(1) as pool:  # over a second
        unloading = pool.submit(command, stack, "unload", "beside")
        wait_until(lambda: ask(stack, "new", "beside")[0] in (404, 503), 10, "new requests are refused")
        assert stack.ready() and ask(stack)[0] == 200
        document = unloading.result(60)
    assert (document["state"], document["draining"]) == ("NOT_LOADED", [])
    assert events[-1] == "[DONE]", events[-2:]
    assert ask(stack, "new", "beside")[0] == 404
    assert len(list(tritonserver.SHM.glob(f"{tritonserver.shm_prefix(stack.home)}*"))) == 1, "of the other model"
    assert "beside" not in modelset.read(stack.home)
    assert command(stack, "load", "beside")["changed"] and ask(stack, "again", "beside")[0] == 200
    assert "--force" in command(stack, "unload", "counting", code=1), "the default model is not unloaded by mistake"


def test_a_damaged_version_is_refused_before_triton_hears_of_it(stack: Stack) -> None:
    """A file with another SHA-256 is named; Triton's log does not know of the attempt, and nothing has changed."""
    tokenizer = publish(stack, 2) / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("dos", "duo"))
    log = stack.home / "logs" / "triton.log"
    before = log.read_text()
    try:
        said = command(stack, "reload", "counting", code=1)
        assert f"{tokenizer} is damaged" in said and "hint: " in said
        assert "counting:2" not in log.read_text()[len(before) :]
        assert ask(stack, "still")[1] <= set(WORDS)
    finally:
        shutil.rmtree(tokenizer.parent)


@pytest.mark.slow
def test_what_was_loaded_at_run_time_is_back_after_a_crash_of_triton(stack: Stack) -> None:
    """A killed server comes back with the models and versions of before, not with what was published since."""
    write_entry(stack.repository, "third", **PARAMETERS)
    try:
        command(stack, "load", "third")
        publish(stack, 2)
        assert modelset.read(stack.home) == {"counting": 1, "beside": 1, "third": 1}
        before = stack.pid("triton")
        kill(before, signal.SIGKILL)
        wait_until(lambda: stack.pid("triton") != before, 20, "another server runs")
        for name in ("counting", "beside", "third"):
            wait_until(lambda name=name: ask(stack, "x", name)[0] == 200, 30, f"{name} answers again")
            assert ask(stack, "x", name)[1] <= set(WORDS)
        command(stack, "unload", "third")
    finally:
        for folder in ("third", "counting/2"):
            shutil.rmtree(stack.repository / folder)


@pytest.mark.slow
def test_a_stream_that_does_not_end_is_ended_when_the_time_to_drain_is_over(stack: Stack) -> None:
    """An unload takes no longer than it may: the stream gets an error, never a clean end, and the model goes."""
    publish(stack, 1, "endless", step_delay_ms=50)
    command(stack, "load", "endless")
    with streaming(stack, model="endless", max_tokens=1500) as events:
        assert command(stack, "unload", "endless")["draining"] == []
    assert "error" in events[-1] and "[DONE]" not in events
    assert "endless" not in {row["id"] for row in json.loads(stack.request("GET", "/v1/models")[2])["data"]}
    shutil.rmtree(stack.repository / "endless")


@pytest.mark.slow
@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGSTOP])
def test_a_model_whose_process_dies_leaves_the_others_alone(stack: Stack, sig: signal.Signals) -> None:
    """A stream on another model goes on to its end, and the model is back without a new server."""
    server = stack.pid("triton")
    with streaming(stack, prompt=f"one {sig}", max_tokens=1000) as events:
        kill(tritonserver.stubs(server, "beside")[0].pid, sig)
        wait_until(lambda: ask(stack, f"new {sig}", "beside")[0] == 503, 10, "it is not ready")
        wait_until(lambda: ask(stack, f"newer {sig}", "beside")[0] == 200, 25, "it is back")
    assert events[-1] == "[DONE]" and stack.pid("triton") == server


@pytest.mark.slow
def test_a_stopped_process_of_the_former_version_is_ended(stack: Stack) -> None:
    """A reload whose old version is stopped takes its time to drain and no longer, and leaves nothing of it."""
    publish(stack, 2)
    server = stack.pid("triton")
    (old,) = tritonserver.stubs(server, "counting", 1)
    with ThreadPoolExecutor(1) as pool:
        reloading = pool.submit(command, stack, "reload", "counting")
        wait_until(lambda: modelset.changed_now(stack.home) == "counting", 20, "the watch leaves it to the command")
        kill(old.pid, signal.SIGSTOP)
        done = reloading.result(60)
    assert (done["version"], done["draining"]) == ("2", [])
    assert [stub.pid for stub in tritonserver.stubs(server, "counting", 1)] == [] and stack.pid("triton") == server
    assert ask(stack, "a new one")[1] <= set(VOCABULARIES[2])
    assert command(stack, "reload", "counting", "--version", "1")["before"] == "2"
    shutil.rmtree(stack.repository / "counting" / "2")


@pytest.mark.slow
def test_a_changed_configuration_is_taken_up_under_load(stack: Stack) -> None:
    """The same version with another config.pbtxt is a reload like any other."""
    config = stack.repository / "counting" / "config.pbtxt"
    before = config.read_text()
    with Load(stack) as load:
        config.write_text(before.replace('"slots" value { string_value: "8" }', '"slots" value { string_value: "6" }'))
        assert command(stack, "reload", "counting")["changed"] is True
        load.more()
    assert load.failures == [] and stack.load()["slots"] == 6
    config.write_text(before)
    command(stack, "reload", "counting")


@pytest.mark.slow
def test_many_reloads_under_load_leave_nothing_behind(stack: Stack) -> None:
    """To and fro six times with eight clients: no failure, one process and one region for each model afterwards."""
    publish(stack, 2)
    with Load(stack, clients=8) as load:
        for turn in range(6):
            command(stack, "reload", "counting", "--version", str(2 - turn % 2))
            load.more(20)
    assert load.failures == [], told(stack)
    wait_until(lambda: len(tritonserver.stubs(stack.pid("triton"))) == 2, 15, "the old processes have ended")
    regions = list(tritonserver.SHM.glob(f"{tritonserver.shm_prefix(stack.home)}*"))
    assert len(regions) == 2
    shutil.rmtree(stack.repository / "counting" / "2")


SLEEPY = """import time
class TritonPythonModel:
    def initialize(self, args):
        time.sleep(4)
    def execute(self, requests):
        return []
"""
SLEEPY_CONFIG = """name: "sleepy" backend: "python" max_batch_size: 0
input { name: "a" data_type: TYPE_FP32 dims: 1 } output { name: "b" data_type: TYPE_FP32 dims: 1 }"""


@pytest.mark.slow
@pytest.mark.parametrize("edge", ["command", "admin"])
def test_a_load_that_takes_long_holds_up_no_stream(stack: Stack, edge: str) -> None:
    """While a model takes four seconds to load, streams of another one go on, and their gateway waits for none."""
    folder = stack.repository / "sleepy"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(SLEEPY)
    (folder / "config.pbtxt").write_text(SLEEPY_CONFIG)

    async def load() -> None:
        triton = Triton(stack.state.triton_http, Deadlines())
        await Repository(triton, stack.state.triton_grpc).load("sleepy", 60.0)
        await triton.close()

    key = json.loads(stack.cli("keys", "create", "--tenant", "ops", "--scope", "admin", "--json").stdout)["key"]
    headers = {"authorization": f"Bearer {key}"}
    with Load(stack) as running:
        if edge == "command":
            asyncio.run(load())
        else:
            path = "/v2/repository/models/sleepy/load"
            wait_until(lambda: stack.request("POST", path, {}, "OPS", 60, headers)[0] == 200, 20, "it is loaded")
    assert running.failures == [], told(stack)
    path = "/v2/repository/models/sleepy/unload"
    assert stack.request("POST", path, {}, "OPS", headers=headers)[0] == 200
    wait_until(lambda: not tritonserver.stubs(stack.pid("triton"), "sleepy"), 10, "it is gone")
    shutil.rmtree(folder)
