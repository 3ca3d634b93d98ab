"""`truthgpt bench` against the real gateway and the real Triton, in every protocol."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .stack import COMMAND, Stack, wait_until

LOAD = ("--concurrency", "1,4", "--requests", "8", "--warmup", "1", "--prompt-tokens", "20", "--output-tokens", "6")


def bench(stack: Stack, url: str, protocol: str, *more: str) -> subprocess.CompletedProcess[str]:
    return stack.cli("bench", "--url", url, "--protocol", protocol, "--model", stack.model, "--json", *LOAD, *more)


@pytest.mark.parametrize(
    ("protocol", "port", "more"),
    [
        ("openai", "HTTP", ()), ("openai", "HTTP", ("--endpoint", "completions", "--no-stream")),
        ("kserve-http", "HTTP", ()), ("kserve-http", "TRITON_HTTP", ()),
        ("kserve-http", "TRITON_HTTP", ("--no-stream",)),
        ("kserve-grpc", "GRPC", ()), ("kserve-grpc", "TRITON_GRPC", ("--no-stream",)),
    ],
)  # fmt: skip
def test_every_protocol_gives_the_same_kind_of_figures(
    stack: Stack, protocol: str, port: str, more: tuple[str, ...]
) -> None:
    """The promised keys are there, every request was answered, and tokens are those that were asked for."""
    host = f"127.0.0.1:{stack.ports[port]}"
    done = bench(stack, host if protocol == "kserve-grpc" else f"http://{host}", protocol, *more)
    assert done.returncode == 0, done.stderr
    runs: list[dict[str, Any]] = json.loads(done.stdout)["runs"]
    assert [run["concurrency"] for run in runs] == [1, 4]
    for run in runs:
        assert (run["completed"], run["errors"], run["output_tokens"]) == (8, 0, 48)
        assert run["tokens_counted_by"] == "server" and abs(run["prompt_tokens_mean"] - 20) <= 1
        for name in ("ttft_s", "latency_s", *(("itl_s",) if "--no-stream" not in more else ())):
            assert 0 < run[name]["p50"] <= run[name]["p90"] <= run[name]["p99"]
        assert run["requests_per_s"] * 6 == pytest.approx(run["output_tokens_per_s"], rel=0.01)
        # six steps of 20 ms, whatever else it took
        assert run["latency_s"]["min"] >= 0.1


def test_a_report_and_a_comparison_are_written(stack: Stack, tmp_path: Path) -> None:
    """The file of one measurement is compared with itself: every ratio is 1, and nothing was measured otherwise."""
    url, first = f"http://127.0.0.1:{stack.ports['HTTP']}", tmp_path / "a.json"
    done = bench(stack, url, "openai", "--output", str(first), "--html", str(tmp_path / "a.html"))
    assert done.returncode == 0, done.stderr
    assert json.loads(first.read_text()) == json.loads(done.stdout)
    assert "<svg" in (tmp_path / "a.html").read_text()
    done = stack.cli("bench", "--compare", str(first), str(first), "--json")
    found = json.loads(done.stdout)
    assert found["differences"] == [] and len(found["runs"]) == 2
    assert {value for run in found["runs"] for value in run["ratios"].values()} <= {1.0, None}


def test_who_interrupts_it_gets_what_was_measured(stack: Stack) -> None:
    """Ctrl-C prints the figures so far and ends with the exit code of an interruption."""
    argv = ["bench", "--url", f"http://127.0.0.1:{stack.ports['HTTP']}", "--model", stack.model, "--json"]
    argv += ["--requests", "100000", "--prompt-tokens", "20", "--output-tokens", "4"]
    process = subprocess.Popen([*COMMAND, *argv], env=stack.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        before = stack.load()["running"]
        wait_until(lambda: stack.load()["running"] > before, 30, "it measures")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, said
    (run,) = json.loads(out)["runs"]
    assert run["interrupted"] and run["completed"] > 0 and run["errors"] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--url", "http://127.0.0.1:1", "--model", "m"), 1, "no connection"),
        (("--model", "m"), 2, "--url"),
        (("--url", "http://127.0.0.1:1", "--model", "m", "--concurrency", "1", "--rate", "1"), 2, "exclude"),
        (("--url", "http://127.0.0.1:1", "--model", "m", "--concurrency", "x"), 2, "commas"),
        (("--url", "http://127.0.0.1:1", "--model", "m", "--concurrency", "100000"), 1, "4096"),
        (("--url", "http://127.0.0.1:1", "--model", "m", "--goodput", "speed:1"), 2, "ttft"),
        (("--url", "http://127.0.0.1:1", "--model", "m", "--extra-body", "[1]"), 2, "JSON object"),
        (("--compare", "/nowhere/a", "/nowhere/b"), 1, "/nowhere/a"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_told(stack: Stack, arguments: tuple[str, ...], code: int, says: str) -> None:
    """Exit code 2 for wrong usage, 1 for what fails, always with a sentence; the key is in none."""
    stack.environ["TRUTHGPT_API_KEY"] = "tg_a_secret"
    try:
        done = stack.cli("bench", *arguments)
    finally:
        del stack.environ["TRUTHGPT_API_KEY"]
    assert (done.returncode, says in done.stderr) == (code, True), done.stderr
    assert "secret" not in done.stdout + done.stderr
