"""`truthgpt batch run` as people and scripts see it: what is printed, exit codes, wrong usage, interruptions."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.orchestrator.gateway import eventually, write_state


class Answers:
    """A gateway with two slots; a prompt that is a number is refused with it as status, "wait" is never answered."""

    def __init__(self) -> None:
        answers = self
        self.waiting = 0
        self.prompts: list[str] = []
        self.over = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                """Tests say what they want to see."""

            def do_GET(self) -> None:
                self._reply(200, {"models": [{"name": "demo", "slots": 2, "ready": True}]})

            def do_POST(self) -> None:
                prompt = json.loads(self.rfile.read(int(self.headers["content-length"])))["prompt"]
                answers.prompts.append(prompt)
                if prompt == "wait":
                    answers.waiting += 1
                    answers.over.wait(60)
                status = int(prompt) if prompt.isdecimal() else 200
                error = {"error": {"message": f"no {prompt}"}}
                self._reply(status, error if status != 200 else {"usage": {"completion_tokens": 3}})

            def _reply(self, status: int, value: object) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """The client is interrupted on purpose."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def answers(place: Any) -> Iterator[Answers]:
    made = Answers()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.02,))
    thread.start()
    write_state(place.home, made.url)
    yield made
    made.over.set()
    made.server.shutdown()
    thread.join()
    made.server.server_close()


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def write(file: Path, *prompts: str) -> None:
    """A batch of these prompts, with their numbers as custom_ids."""
    request = {"method": "POST", "url": "/v1/completions"}
    lines = [{"custom_id": str(n), **request, "body": {"prompt": prompt}} for n, prompt in enumerate(prompts)]
    file.write_text("".join(json.dumps(each) + "\n" for each in lines))


def test_a_batch_that_succeeds(place: Any, answers: Answers, files: tuple[Path, Path]) -> None:
    """Exit code 0, a summary of two lines and nothing else on standard output; the output is where it was asked for."""
    write(files[0], "a", "b", "c")
    result = place.run("batch", "run", str(files[0]), "--output", str(files[1]))
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()
    assert first == f"{files[1]}: 3 of 3 lines succeeded, 0 failed" and second.startswith("9 tokens in ")
    assert result.stderr == ""
    assert [json.loads(line)["custom_id"] for line in files[1].read_text().splitlines()] == ["0", "1", "2"]


def test_a_line_that_fails_is_counted_and_explained(place: Any, answers: Answers, files: tuple[Path, Path]) -> None:
    """Exit code 1, and the reasons with how often each came; the other lines are answered."""
    write(files[0], "a", "400", "400", "404", "b")
    result = place.run("batch", "run", str(files[0]), "--output", str(files[1]))
    assert result.exit_code == 1
    assert "2 of 5 lines succeeded, 3 failed" in result.stdout
    assert "  2 x 400: no 400\n" in result.stdout and "  1 x 404: no 404\n" in result.stdout


def test_json_is_one_document(place: Any, answers: Answers, files: tuple[Path, Path]) -> None:
    """The promised keys; a batch of nothing succeeds."""
    write(files[0], "a", "400")
    document = place.json("batch", "run", str(files[0]), "--output", str(files[1]), code=1)
    assert document.pop("duration_s") >= 0
    assert document == {
        "total": 2, "succeeded": 1, "failed": 1, "skipped": 0, "output": str(files[1]), "output_tokens": 3,
    }  # fmt: skip
    write(files[0])
    assert place.json("batch", "run", str(files[0]), "--output", str(files[1]), "--overwrite")["total"] == 0
    assert files[1].read_bytes() == b""


def test_wrong_usage(place: Any, answers: Answers, files: tuple[Path, Path], tmp_path: Path) -> None:
    """No file, standard input, an output that exists, a folder that does not: exit code 2, and nothing is asked."""
    write(files[0], "a")
    files[1].write_text("mine")
    file, out = map(str, files)
    other = str(tmp_path / "other")
    assert "is not a file" in place.refused("batch", "run", str(tmp_path / "none"), "--output", other, code=2)
    assert "is not a file" in place.refused("batch", "run", str(tmp_path), "--output", other, code=2)
    assert "standard input" in place.refused("batch", "run", "-", "--output", other, code=2)
    assert "standard input" in place.refused("batch", "run", file, "--output", "-", code=2)
    assert "--overwrite" in place.refused("batch", "run", file, "--output", out, code=2)
    assert "not a folder" in place.refused("batch", "run", file, "--output", str(tmp_path / "no" / "x"), code=2)
    place.refused("batch", "run", file, "--output", other, "--concurrency", "0", code=2)
    assert files[1].read_text() == "mine" and answers.prompts == [] and not Path(other).exists()


def test_nothing_running_says_how_to_start(place: Any, files: tuple[Path, Path]) -> None:
    """Without a stack and without --url the hint is `truthgpt up`; a URL where nobody answers is an error, too."""
    write(files[0], "a")
    arguments = ("batch", "run", str(files[0]), "--output", str(files[1]))
    assert "truthgpt up" in place.refused(*arguments)
    assert "does not answer" in place.refused(*arguments, "--url", f"http://127.0.0.1:{place.ports['HTTP']}")
    assert "not the URL" in place.refused(*arguments, "--url", "http://")


def test_another_input_is_refused(place: Any, answers: Answers, files: tuple[Path, Path]) -> None:
    """What was begun with another input is neither continued nor lost."""
    write(files[0], "a")
    partial = files[1].with_name("out.jsonl.partial")
    partial.write_text('{"truthgpt_batch": 1, "input": {"sha256": "0", "bytes": 1}}\n')
    assert "another input" in place.refused("batch", "run", str(files[0]), "--output", str(files[1]))
    assert partial.exists() and answers.prompts == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_is_done(
    place: Any, answers: Answers, files: tuple[Path, Path], number: signal.Signals
) -> None:
    """Ctrl-C and SIGTERM: exit code 130 at once and a sentence on how to go on; the same command then does the rest."""
    write(files[0], "a", "b", "wait", "wait", "c")
    arguments = ("batch", "run", str(files[0]), "--output", str(files[1]))
    with place.process(*arguments) as process:
        eventually(lambda: answers.waiting == 2)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=10)
    assert (process.returncode, stdout) == (130, "")
    assert stderr == "stopped: 2 of 5 lines are done; the same command goes on from here\n"
    assert not files[1].exists()
    answers.over.set()
    asked = len(answers.prompts)
    document = place.json(*arguments)
    assert (document["total"], document["succeeded"], document["skipped"]) == (5, 5, 2)
    assert sorted(answers.prompts[asked:]) == ["c", "wait", "wait"]


def test_what_was_killed_before_its_last_step_needs_no_gateway(
    place: Any, answers: Answers, files: tuple[Path, Path]
) -> None:
    """When all lines are answered and only the output is missing, it is made though nothing runs any more."""
    write(files[0], "a")
    arguments = ("batch", "run", str(files[0]), "--output", str(files[1]))
    place.json(*arguments)
    line = files[1].read_text()
    files[1].unlink()
    data = files[0].read_bytes()
    header = {"truthgpt_batch": 1, "input": {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}
    files[1].with_name("out.jsonl.partial").write_text(json.dumps(header) + "\n" + line)
    place.set(HOME=place.home / "elsewhere")
    assert place.json(*arguments)["skipped"] == 1 and files[1].read_text() == line


def test_a_terminal_gets_a_bar(place: Any, answers: Answers, files: tuple[Path, Path]) -> None:
    """On a terminal the counts are drawn on standard error while it runs, and standard output has the summary alone."""
    write(files[0], "a", "400", "wait")
    controller, terminal = pty.openpty()
    try:
        with place.process(
            "batch", "run", str(files[0]), "--output", str(files[1]), stderr=terminal,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        ) as process:  # fmt: skip
            os.close(terminal)
            shown = b""
            while b"2/3" not in shown:
                shown += os.read(controller, 4096)
            answers.over.set()
            assert "2 of 3 lines succeeded" in process.stdout.read()
        assert b"1 failed" in shown and b"/s" in shown
    finally:
        os.close(controller)
