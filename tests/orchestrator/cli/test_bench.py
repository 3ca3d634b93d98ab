"""`truthgpt bench` as people meet it."""

from __future__ import annotations

import itertools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clock import awake
from tests.e2e.stack import free_ports
from tests.orchestrator.bench.servers import ROLE, delta, event, usage
from tests.orchestrator.bench.test_result import found

EVENTS = [event(one) for one in (ROLE, delta("one"), delta(" two", "length"), usage(2, 8))] + [event(b"[DONE]")]


@pytest.fixture
def served(gateway: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server that answers two tokens, and no key in the environment."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    gateway.events = EVENTS
    return gateway


def asking(served: Any, *more: str) -> list[str]:
    small = ["--requests", "3", "--prompt-tokens", "8", "--output-tokens", "4"]
    return ["bench", "--url", served.url, "--model", "demo", *small, *more]


def test_figures_for_people_and_for_programs(place: Any, served: Any) -> None:
    """A table, or one document with a run for each number of clients; exit code 0."""
    served.pause_s = 0.02  # what comes in one read has no time between its tokens
    told = place.json(*asking(served, "--concurrency", "1,2", "--goodput", "ttft:5,latency:10"))
    assert [run["concurrency"] for run in told["runs"]] == [1, 2]
    for run in told["runs"]:
        assert run["completed"] == 3 and run["errors"] == 0 and run["goodput_per_s"] == run["requests_per_s"] > 0
        assert run["ttft_s"]["p50"] > 0 and run["itl_s"] and run["latency_s"]["p99"] > 0
    shown = place.run(*asking(served))
    assert shown.exit_code == 0 and shown.stderr == ""
    head, row = shown.stdout.strip().splitlines()
    assert "FIRST TOKEN p50" in head and row.startswith("1 client ") and row.split()[-1] == "0"


def test_a_rate_and_a_warm_up(place: Any, served: Any) -> None:
    """Requests a second instead of clients."""
    told = place.json(*asking(served, "--rate", "50,100", "--warmup", "2"))
    assert [run["rate"] for run in told["runs"]] == [50, 100] and told["runs"][0]["concurrency"] is None
    assert "50 requests/s" in place.run(*asking(served, "--rate", "50")).stdout


def test_prompts_of_a_file_and_further_fields(place: Any, served: Any, tmp_path: Path) -> None:
    """What is in the file is sent, with what --extra-body adds."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('"from the file"\n')
    told = place.json(*asking(served, "--prompt-file", str(path), "--extra-body", '{"top_k": 1}', "--ignore-eos"))
    assert told["runs"][0]["load"]["prompts"] == 1 and told["runs"][0]["load"]["prompt_tokens"] is None
    _, body = served.asked[-1]
    assert body["messages"][0]["content"] == "from the file" and body["top_k"] == 1 and body["ignore_eos"] is True


def test_an_error_at_once_is_exit_code_1(place: Any, served: Any, tmp_path: Path) -> None:
    """A server that fails at the first question is not measured, and nothing is written."""
    path = tmp_path / "result.json"
    served.events = [event(delta("one")), event({"error": {"message": "boom <b>"}})]
    refused = place.refused(*asking(served, "--output", str(path)))
    assert "(in_band): boom <b>" in refused and not path.exists()


def test_a_server_that_is_gone_is_not_asked_for_ever(place: Any, served: Any) -> None:
    """The run ends long before its time, and that it did is said."""
    answers = itertools.count(1)

    class Dying(list[bytes]):
        """After the first question all is errors."""

        def __iter__(self) -> Iterator[bytes]:
            return iter(EVENTS if next(answers) < 4 else [event({"error": {"message": "gone"}})])

    served.events = Dying()
    result = place.run(*asking(served, "--warmup", "0", "--duration", "600", "--requests", "100000"))
    assert result.exit_code == 1 and "20 × in_band: gone" in result.stderr
    assert "ended after 2 answers, for then nothing was answered any more" in result.stderr


def test_a_server_that_fails_later_is_measured_to_its_end(place: Any, served: Any, tmp_path: Path) -> None:
    """What it answered is printed and written, what it did not is on standard error; exit code 1."""
    path, answers = tmp_path / "result.json", itertools.count(1)

    class Failing(list[bytes]):
        """Every third answer is an error inside a 200."""

        def __iter__(self) -> Iterator[bytes]:
            return iter(EVENTS if next(answers) % 3 else [event({"error": {"message": "boom"}})])

    served.events = Failing()
    result = place.run(*asking(served, "--warmup", "0", "--requests", "8", "--output", str(path)))
    assert result.exit_code == 1 and "× in_band: boom" in result.stderr and result.stdout.startswith("LOAD")
    assert json.loads(path.read_text())["runs"][0]["error_kinds"]["in_band"]["first"] == "boom"


@pytest.mark.parametrize(
    "more",
    [
        ["--url", "x"], ["--url", "http://h", "--concurrency", "0"], ["--url", "http://h", "--rate", "-1"],
        ["--url", "http://h", "--requests", "0"], ["--url", "http://h", "--duration", "nan"],
        ["--url", "http://h", "--prompt-tokens", "0"], ["--url", "http://h", "--header", "Host: a"],
        ["--url", "http://h", "--header", "X-A: \u20ac"], ["--url", "http://h", "--prompt-file", "/no/such"],
        ["--url", "http://h", "--api-key-file", "/no/such"], ["--url", "http://h", "--goodput", "ttft:-1"],
        ["--url", "http://h", "--extra-body", '{"model": "a"}'], ["--url", "http://h", "--task", "encode",
         "--endpoint", "chat"], ["--url", "http://user:pw@h"], ["--url", "http://h", "--extra-body", '{"a": 1e999}'],
        ["--url", "https://h", "--ca-file", "/no/such"],
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_with_a_hint(place: Any, more: list[str]) -> None:
    """One sentence and what to do about it, before anything is sent."""
    place.refused("bench", "--model", "demo", *more)


@pytest.mark.parametrize(
    "more",
    [
        [], ["--url", "http://h"], ["--model", "demo"], ["--protocol", "smtp"], ["--endpoint", "edits"],
        ["--url", "http://h", "--model", "m", "--concurrency", "1,x"], ["--url", "http://h", "--model", "m",
         "--concurrency", ""], ["--url", "http://h", "--model", "m", "--concurrency", "1", "--rate", "1"],
        ["--url", "http://h", "--model", "m", "--concurrency", ",".join(map(str, range(1, 102)))],
        ["--url", "http://h", "--model", "m", "--goodput", "speed:1"],
        ["--url", "http://h", "--model", "m", "--goodput", "ttft:1,ttft:2"],
        ["--url", "http://h", "--model", "m", "--goodput", "ttft:x"],
        ["--url", "http://h", "--model", "m", "--extra-body", "[1]"],
        ["--url", "http://h", "--model", "m", "--extra-body", "{"],
        ["--url", "http://h", "--model", "m", "--header", "x"],
        ["--url", "http://h", "--model", "m", "--output", "/no/such/folder/a.json"],
        ["--url", "http://h", "--model", "m", "--output", "/dev"],
        ["--url", "http://h", "--model", "m", "--output", "/dev/null"],
        ["--url", "http://h", "--compare", "a", "b"], ["--compare", "a"], ["--compare", "a", "b", "--output", "c"],
    ],
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(place: Any, more: list[str]) -> None:
    """Nothing is measured whose results could not be written, and no device is replaced by a file."""
    assert place.refused("bench", *more, code=2)
    assert not Path("/dev/null").is_file()


def test_a_dead_server_is_an_error_at_once(place: Any) -> None:
    """Exit code 1 and where to look."""
    began = awake()
    told = place.refused("bench", "--url", f"http://127.0.0.1:{free_ports(1)[0]}", "--model", "demo")
    assert "no connection" in told and "truthgpt status" in told and awake() - began < 10


def test_the_key_is_sent_and_shown_nowhere(
    place: Any, served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the environment or a file; in no table, document, page or error."""
    secret, path, page = "correct-horse-battery", tmp_path / "key", tmp_path / "page.html"
    path.write_text(f"{secret}\n")
    output = tmp_path / "result.json"
    result = place.run(*asking(served, "--api-key-file", str(path), "--json", "--output", str(output),
                               "--html", str(page), "--header", f"X-Other: {secret}2"))  # fmt: skip
    assert result.exit_code == 0 and served.credentials[-1] == f"Bearer {secret}"
    told = result.output + result.stderr + output.read_text() + page.read_text()
    assert secret not in told
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    served.status, served.body = 401, json.dumps({"error": f"{secret} is no key"}).encode()
    told = place.refused(*asking(served))
    assert served.credentials[-1] == f"Bearer {secret}" and secret not in told and "*** is no key" in told
    monkeypatch.setenv("TRUTHGPT_API_KEY", "the-other-key")
    place.refused(*asking(served))
    assert served.credentials[-1] == "Bearer the-other-key"
    path.write_bytes(b"\xff\xfe\n")
    place.refused(*asking(served, "--api-key-file", str(path)))


def test_html_without_matplotlib_is_refused_before_anything_is_sent(
    place: Any, served: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    told = place.refused(*asking(served, "--html", str(tmp_path / "a.html")))
    assert "matplotlib" in told and "truthgpt[measure]" in told and served.asked == []


def test_two_results_are_compared(place: Any, tmp_path: Path) -> None:
    """Ratios of every figure, better or worse, and what was not measured alike; as JSON and as a page, too."""
    before, after, page = tmp_path / "before.json", tmp_path / "after.json", tmp_path / "page.html"
    before.write_text(json.dumps(found(1, 8)))
    slower = found(1, 8, scale=2.0)
    slower["runs"][0]["load"]["temperature"] = 1.0
    after.write_text(json.dumps(slower))
    result = place.run("bench", "--compare", str(before), str(after), "--html", str(page))
    assert result.exit_code == 0 and "not measured alike: temperature: 0.0 and 1.0" in result.stderr
    rows = [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines()]
    assert ["1 client", "ttft_s.p50", "0.1", "0.2", "2.000 ×", "worse"] in rows
    assert ["8 clients", "requests_per_s", "2", "1", "0.500 ×", "worse"] in rows
    assert "after.json to before.json" in page.read_text()
    told = place.json("bench", "--compare", str(before), str(after))
    assert told["runs"][1]["ratios"]["latency_s.p50"] == pytest.approx(2.0) and len(told["differences"]) == 1


@pytest.mark.parametrize("text", ["", "{}", '{"runs": [{"concurrency": 1}]}', "\x00", json.dumps(found(16))])
def test_what_cannot_be_compared_is_refused(place: Any, tmp_path: Path, text: str) -> None:
    """Files that are no results, and results with no run in common."""
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(found(1, 8)))
    bad.write_text(text)
    assert place.refused("bench", "--compare", str(good), str(bad))
    assert "no/such" in place.refused("bench", "--compare", str(good), "/no/such")


def test_warnings_tell_what_to_know_about_figures(place: Any, served: Any) -> None:
    """Tokens that nobody counted, prompts of another length."""
    served.events = [event(delta("one")), event(delta(" two", "length")), event(b"[DONE]")]
    told = place.run(*asking(served)).stderr
    assert "each piece of an answer counts as one" in told
    served.events = EVENTS
    told = place.run(*asking(served, "--prompt-tokens", "100")).stderr
    assert "prompts had 8 tokens, not 100" in told


def test_an_interrupt_prints_what_was_measured(place: Any, served: Any, tmp_path: Path) -> None:
    """Exit code 130, one document, and the file is written."""
    served.pause_s = 0.02
    path = tmp_path / "result.json"
    more = ["--requests", "100000", "--concurrency", "1,2", "--json", "--output", str(path)]
    process = place.process(*asking(served, *more))
    try:
        began = awake()
        while len(served.asked) < 8:
            assert process.poll() is None and awake() - began < 60
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in stderr and "interrupted after" in stderr
    told = json.loads(stdout)
    assert len(told["runs"]) == 1 and told["runs"][0]["interrupted"] and told["runs"][0]["completed"] >= 1
    assert json.loads(path.read_text()) == told


def test_on_a_terminal_a_bar_shows_how_far_it_is(place: Any, served: Any) -> None:
    """On standard error alone, and gone at the end; standard output is the table."""
    served.pause_s = 0.05
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "orchestrator.cli", *asking(served, "--requests", "8")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    seen, began = b"", awake()
    while awake() - began < 60:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                seen += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
    stdout, _ = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0 and stdout.startswith(b"LOAD")
    assert b"of 8 requests" in seen and b"1 client" in seen
