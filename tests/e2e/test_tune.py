"""`truthgpt tune` beside a running stack: a real search, a reload under load, and what is left when it is killed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.local import tritonserver
from tests.counting import write_entry

from .encoder_server import ONNXRUNTIME
from .stack import COMMAND, Stack, wait_until
from .test_models_at_run_time import Load, told

# Two slots for four clients, and 5 ms a step: with four there is nearly twice the throughput, on any machine.
LOAD = ("--concurrency", "4", "--prompt-tokens", "8", "--output-tokens", "16", "--bound", "latency:60")
QUICK = (*LOAD, "--trials", "3", "--trial-s", "0.3", "--rounds", "1", "--yes")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A stack of `counting` with two slots; each test leaves it so."""
    folder = Path(tempfile.mkdtemp(prefix="truthgpt-e2e-"))
    write_entry(folder / "repository", slots=2, max_len=2000, step_delay_ms=5, max_queue=80)
    made = Stack(folder / "home", folder / "repository")
    try:
        made.start()
        yield made
    finally:
        made.stop()
        assert made.leftovers() == []
        shutil.rmtree(folder)


@pytest.fixture
def config(stack: Stack) -> Iterator[Path]:
    """The model's config.pbtxt, which is to be as before when a test ends, with nothing of a tuning left."""
    path = stack.repository / "counting" / "config.pbtxt"
    before = path.read_bytes()
    yield path
    assert path.read_bytes() == before and stack.load()["slots"] == 2
    assert scratches(stack) == [] and {found.name for found in path.parent.iterdir()} == {"1", "config.pbtxt"}


def scratches(stack: Stack) -> list[str]:
    """Processes that work in a scratch folder, and shared memory of one."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if f"{stack.home}/tune/scratch-" in line and process.status() != psutil.STATUS_ZOMBIE:
            found.append(line)
    return found


def begun(stack: Stack, *arguments: str) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*COMMAND, "tune", "counting", *arguments], env=stack.environ, **pipes)


def killed_in_the_reload(stack: Stack, config: Path, *arguments: str) -> None:
    """Begin a command that puts other settings in place, and `kill -9` it once they are; wait until that is undone."""
    before, note = config.read_bytes(), stack.home / "tune" / "pending.json"
    process = begun(stack, *arguments)
    try:
        while process.poll() is None and config.read_bytes() == before:
            time.sleep(0.001)
    finally:
        process.kill()
    said = "".join(process.communicate())
    assert process.returncode == -signal.SIGKILL, said
    wait_until(lambda: config.read_bytes() == before and not note.exists(), 30, "the guard has put it back")


@pytest.mark.slow
def test_a_tuning_finds_what_is_better_and_is_undone(stack: Stack, config: Path) -> None:
    """Four slots are found, written and served; `kill -9` in the middle of `--undo` leaves them, `--undo` undoes them.

    Of the requests of clients that go on meanwhile none fails.
    """
    before = config.read_text()
    done = stack.cli("tune", "counting", *QUICK, "--json", timeout=100)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["winner"]["settings"]["slots"] == "4" and document["winner"]["ratio"] > 1.2, done.stderr
    assert document["applied"] and document["reloaded"] and document["diff"].count("\n+param") == 1
    slots = '"slots" value {{ string_value: "{}" }}'
    assert config.read_text() == before.replace(slots.format(2), slots.format(4))
    assert stack.load()["slots"] == 4 and scratches(stack) == []
    with Load(stack) as load:
        killed_in_the_reload(stack, config, "--undo")
        wait_until(lambda: stack.load()["slots"] == 4, 10, "what was served is served again")
        undone = stack.cli("tune", "counting", "--undo", "--json")
        assert undone.returncode == 0 and json.loads(undone.stdout)["reloaded"], undone.stderr
        load.more()
    assert load.failures == [], told(stack)
    known = json.loads(stack.cli("tune", "counting", "--history", "--json").stdout)
    assert known[0]["batch_sizes"][0]["batch_size"] == "4"


@pytest.mark.slow
def test_a_kill_of_a_whole_tuning_in_its_reload(stack: Stack, config: Path) -> None:
    """After the search, with the new file in place: the former one is back and served."""
    with Load(stack, clients=1) as load:
        killed_in_the_reload(stack, config, *QUICK, "--margin", "0")
        load.more()
    assert load.failures == [], told(stack)
    wait_until(lambda: stack.load()["slots"] == 2, 10, "the former settings are served")


@pytest.mark.slow
@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("stage", ["start", "trial"])
def test_an_interruption_leaves_nothing(stack: Stack, config: Path, stage: str, sig: signal.Signals) -> None:
    """While the server starts, or in a trial: no process, no shared memory; the next tuning clears the folder away."""
    process = begun(stack, *LOAD, "--trial-s", "5", "--yes")
    folder = stack.home / "tune"
    wait_until(lambda: any(folder.glob("scratch-*/triton.log")), 30, "the server is started")
    prefixes = [tritonserver.shm_prefix(one) for one in folder.glob("scratch-*")]
    if stage == "trial":
        wait_until(lambda: any(any(tritonserver.SHM.glob(f"{p}*")) for p in prefixes), 30, "the model is loaded")
    process.send_signal(sig)
    said = "".join(process.communicate(timeout=30))
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[sig], said
    wait_until(lambda: scratches(stack) == [], 20, "its processes have ended")
    if sig is signal.SIGKILL:
        done = stack.cli("tune", "counting", *QUICK, "--trials", "1", "--dry-run", timeout=100)
        assert done.returncode == 0, done.stderr
    assert not any(folder.glob("scratch-*"))
    assert not any(any(tritonserver.SHM.glob(f"{prefix}*")) for prefix in prefixes)


@pytest.mark.slow
def test_a_candidate_that_ends_the_server_is_one_that_failed(stack: Stack, config: Path) -> None:
    """The scratch server is killed in a trial: that candidate has failed, and the search goes on with another one."""
    process = begun(stack, *LOAD, "--trials", "4", "--trial-s", "2", "--rounds", "1", "--dry-run", "--json")
    prefix = f"{stack.home}/tune/scratch-"

    def server() -> psutil.Process | None:
        for found in psutil.process_iter():
            try:
                line = found.cmdline()
            except psutil.Error:
                continue
            if line and line[0].endswith("tritonserver") and any(prefix in argument for argument in line):
                return found
        return None

    def written() -> int:
        return sum(path.stat().st_size for path in (stack.home / "tune" / "history").glob("*.journal"))

    before = written()
    wait_until(lambda: server() is not None, 30, "there is a server")
    running = server()
    assert running is not None
    wait_until(lambda: written() > before, 60, "what is set is measured")
    first = tritonserver.stubs(running.pid)
    wait_until(lambda: set(tritonserver.stubs(running.pid)) - set(first), 30, "a candidate is loaded")
    time.sleep(1.0)
    running.kill()
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    trials = json.loads(out)["trials"]
    assert [trial["stage"] for trial in trials if trial["error"]] == ["search"] and len(trials) > 4, err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_encoder_that_triton_runs_natively_is_tuned(tmp_path: Path) -> None:
    """Its graph is loaded first; of the entry in front what batches are made by is tuned. No stack runs."""
    from export.pipeline import ExportOptions, export_model
    from tests.export import encoder_checkpoints as checkpoints

    backend = tmp_path / "home" / "triton" / "backends" / "onnxruntime"  # stands for Triton's own
    backend.mkdir(parents=True)
    (backend / "model.py").write_text(ONNXRUNTIME)
    made = Stack(tmp_path / "home", tmp_path / "repository")
    checkpoints.write_encoder(tmp_path / "mood", "bert", "ForSequenceClassification", num_hidden_layers=1)
    export_model(ExportOptions(str(tmp_path / "mood"), made.repository, "mood", max_len=48, serve_with="native"))
    load = ("--concurrency", "4", "--prompt-tokens", "16", "--trials", "2", "--trial-s", "0.3", "--rounds", "1")
    done = made.cli("tune", "mood", *load, "--dry-run", "--json", timeout=200)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(document["knobs"]) == {"instances", "queue_delay_us", "preferred"}
    assert len(document["trials"]) >= 3 and not any(trial["error"] for trial in document["trials"]), done.stderr
    refused = made.cli("tune", "mood--engine")
    assert refused.returncode == 1 and "graph of another model" in refused.stderr
    assert made.leftovers() == []
