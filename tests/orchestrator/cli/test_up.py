"""`truthgpt up` where it fails or is stopped before it serves; what a started stack does is in tests/e2e."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import models
from orchestrator.cli import demo, launch, welcome
from orchestrator.client import GatewayClient
from orchestrator.local import state, tritonserver
from orchestrator.local.places import Place
from orchestrator.settings import Settings
from tests.orchestrator.gateway import Gateway, write_state


def nothing_left(place: Any) -> None:
    """No state file, no backend process and no shared memory of this home."""
    prefix = tritonserver.shm_prefix(place.home)
    assert state.read(place.home) is None
    assert tritonserver.orphans(prefix) == [] and list(tritonserver.SHM.glob(f"{prefix}*")) == []


def ended(process: subprocess.Popen[str]) -> str:
    """Standard error of a command that must fail."""
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (1, "") and "hint: " in stderr and "Traceback" not in stderr, stderr
    return stderr


def test_an_explicit_model_that_is_missing_is_refused(place: Any) -> None:
    """--model and TRUTHGPT_MODEL are taken at their word: nothing else is served, nothing is exported."""
    place.export()
    assert "truthgpt export microsoft/DialoGPT-small" in place.refused("up", "--model", "DialoGPT-small")
    place.set(MODEL="mine")
    assert "--name mine" in place.refused("up")


def test_several_models_and_no_choice_are_listed(place: Any) -> None:
    """With several models and none chosen the error lists them and the hint names the variable."""
    place.export("b")
    place.export("a")
    stderr = place.refused("up")
    assert "a, b" in stderr and "TRUTHGPT_MODEL=a" in stderr


def test_a_second_up_on_the_same_home_is_refused(place: Any, gateway: Any) -> None:
    """A running stack is named, with the commands that show and stop it, before anything is started or exported."""
    stderr = place.refused("up", "--detach")
    assert "already running" in stderr and gateway.url in stderr and "truthgpt down" in stderr
    assert f"--home {os.path.relpath(place.home)}" in place.refused("up", "--home", str(place.home))


def test_a_home_whose_lock_is_held_is_refused(place: Any) -> None:
    """A stack that is still starting holds the lock: a second one says that one is running."""
    place.export()
    with state.lock(place.home):
        done = place.process("up")
        stdout, stderr = done.communicate(timeout=20)
    assert (done.returncode, stdout) == (1, "") and "already running" in stderr and "hint: " in stderr


def test_servers_that_cannot_all_be_there_are_refused(place: Any) -> None:
    """The settings that exclude each other are named, before anything is started."""
    place.export()
    said = ended(place.process("up", "--tritons", "2", "--triton-urls", "http://127.0.0.1:1"))
    assert "triton_urls names the servers to use, and tritons asks for 2" in said
    place.set(TRITON_GRPC_PORT=place.ports["TRITON_HTTP"] + 100)
    said = ended(place.process("up", "--tritons", "2"))
    assert "triton_http_port of triton-2 and triton_grpc_port of triton are both" in said
    nothing_left(place)


def test_servers_of_others_that_do_not_answer_are_an_error(place: Any) -> None:
    """Nothing is exported, no repository is needed, and what was started for the gateway is gone again."""
    url = f"http://127.0.0.1:{place.ports['TRITON_HTTP']}"
    place.set(TRITON_URLS=url, START_TIMEOUT_S=3)
    said = ended(place.process("up"))
    assert f"no model of Triton at {url} answers" in said and "hint: see that it runs there" in said
    assert not place.repository.exists()
    nothing_left(place)


@pytest.mark.parametrize("detach", [(), ("--detach", "--json")])
def test_a_taken_port_is_an_error_with_its_setting(place: Any, detach: tuple[str, ...]) -> None:
    """In the foreground and detached alike the error and hint of the supervisor are shown and the code is 1."""
    place.export()
    with socket.create_server(("127.0.0.1", place.ports["TRITON_HTTP"])):
        done = place.process("up", *detach)
        stdout, stderr = done.communicate(timeout=20)
    assert (done.returncode, stdout) == (1, "") and "Traceback" not in stderr
    assert (
        f"port {place.ports['TRITON_HTTP']}" in stderr and "hint: " in stderr and "TRUTHGPT_TRITON_HTTP_PORT" in stderr
    )
    nothing_left(place)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_before_it_is_ready_is_no_success(place: Any, number: signal.Signals, code: int) -> None:
    """A signal during the start ends everything that was started, and the exit code is the signal's."""
    place.export()
    process = place.process("up", stdout=subprocess.DEVNULL)
    for line in process.stderr:
        if "starting Triton" in line:
            process.send_signal(number)
            break
    rest = process.communicate(timeout=30)[1]
    assert process.returncode == code and "ready" not in rest
    nothing_left(place)


def test_ctrl_c_while_a_detached_stack_starts_stops_it(place: Any) -> None:
    """Who stops waiting for a stack does not leave it behind."""
    place.export()
    process = place.process("up", "--detach", stdout=subprocess.DEVNULL, start_new_session=True)
    for line in process.stderr:
        if "starting Triton" in line:
            os.killpg(process.pid, signal.SIGINT)
            break
    process.communicate(timeout=60)
    assert process.returncode == 130
    nothing_left(place)


def test_an_empty_repository_needs_the_demo_and_torch(
    place: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without the demo's checkpoint, or without torch, the error says what is missing and the hint how to get it."""
    monkeypatch.setattr(demo, "folder", lambda: tmp_path / "nowhere")
    stderr = place.refused("up")
    assert "the demo model is not in" in stderr and "DialoGPT-small (profile development) is not exported" in stderr
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(demo, "folder", lambda: tmp_path)
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'truthgpt[export]'" in place.refused("up")


def exporting(place: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
    """Replace `python -m export` by a program, so that what `up` makes of it is seen without torch."""
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\n{body}")
    program.chmod(0o755)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(demo, "folder", lambda: tmp_path)
    monkeypatch.setattr(demo.sys, "executable", str(program))


@pytest.mark.parametrize(("precision", "expected"), [("mixed", "fp32"), ("fp32", "fp32"), ("int8", "int8")])
def test_the_demo_is_exported_into_the_repository(
    place: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str, expected: str
) -> None:
    """The exporter gets the checkpoint, the name, the repository and a precision that a CPU can serve."""
    exporting(
        place,
        monkeypatch,
        tmp_path,
        f"import json, sys; json.dump(sys.argv[1:], open({str(tmp_path / 'argv')!r}, 'w'))",
    )
    place.set(PRECISION=precision)
    demo.export(Settings.load())
    assert json.loads((tmp_path / "argv").read_text()) == [
        "-m", "export", str(tmp_path), "--name", "demo", "--repository", str(place.repository), "--precision", expected,
    ]  # fmt: skip


def test_an_export_that_fails_fails_up(place: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A failing exporter ends `up` with 1 before anything is started."""
    exporting(place, monkeypatch, tmp_path, "import sys; sys.exit(3)")
    assert "was not exported (exit code 3)" in place.refused("up", "--json")
    assert not place.home.exists()


def test_the_exporters_output_is_progress(capfd: pytest.CaptureFixture[str]) -> None:
    """What the exporter prints goes to standard error, so that --json stays one document."""
    assert demo._run([sys.executable, "-c", "print('published')"]) == 0
    assert capfd.readouterr() == ("", "published\n")


def test_sigterm_during_the_export_ends_the_exporter(tmp_path: Path) -> None:
    """`up` that is told to stop takes its exporter with it."""
    sleeper = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import sys; from orchestrator.cli import demo; demo._run([sys.executable, '-c', {sleeper!r}])"
    process = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
    process.terminate()
    assert process.wait(10) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.fixture
def ready(place: Any) -> Any:
    """A gateway, and the state of a stack that has just become ready."""
    with Gateway() as running:
        yield running, write_state(place.home, running.url)


def test_the_greeting_is_asked_and_shown_before_the_hints(
    place: Any, ready: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """--hello sends its prompt through the chat API and shows the answer, then the addresses and what to try next."""
    gateway, found = ready
    assert welcome.present(Settings.load(), found, as_json=False, hello=True, detached=True)
    output = capsys.readouterr().out
    assert gateway.asked[0][1]["messages"] == [{"role": "user", "content": "Hola, ¿cómo estás?"}]
    assert output.index("¡Hola, mundo!") < output.index("Try next") < output.index("To stop: ")
    assert f"curl -N {gateway.url}/v1/chat/completions" in output and "down" in output.rpartition("To stop: ")[2]


def test_the_python_that_is_shown_runs(place: Any, ready: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The snippet after "Or in Python" can be pasted as it is and prints the answer, with the key that is needed."""
    gateway, found = ready
    place.set(AUTH="keys", API_KEY="tg_one")
    welcome.present(Settings.load(), found, as_json=False, hello=False, detached=False)
    code = capsys.readouterr().out.split("Or in Python:\n")[1].split("\n\nTo stop")[0]
    gateway.events[-2] = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": null}]}\n\n'
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "¡Hola, mundo!"), done.stderr
    assert gateway.credentials[-1] == "Bearer tg_one" and len(gateway.asked) == 1


def test_the_curl_that_is_shown_is_a_request_that_the_gateway_takes(
    place: Any, ready: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The JSON in the curl command is a streamed chat completion of the served model."""
    _, found = ready
    welcome.present(Settings.load(), found, as_json=False, hello=False, detached=False)
    body = json.loads(capsys.readouterr().out.split("-d '")[1].split("'\n")[0])
    assert body == {
        "model": "demo", "messages": [{"role": "user", "content": "Hola, ¿cómo estás?"}], "stream": True,
    }  # fmt: skip


@pytest.mark.parametrize("grpc", ["127.0.0.1:8081", ""])
def test_both_addresses_of_kserve_are_said(ready: Any, capsys: pytest.CaptureFixture[str], grpc: str) -> None:
    """The gRPC address stands beside the HTTP one, and nothing of it is said where gRPC is switched off."""
    gateway, found = ready
    welcome.present(Settings.load(), replace(found, grpc=grpc), as_json=False, hello=False, detached=False)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  KServe v2 ")]
    assert line.split("   ")[1] == f"{gateway.url}/v2" + (f", {grpc} (gRPC)" if grpc else "")


def test_each_server_has_its_addresses(place: Any, ready: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Several have a line each, and in JSON an object; those of others are named as such."""
    _, found = ready
    servers = [Place(name, f"http://{name}", f"{name}:1", "m", "p") for name in ("one", "two")]
    several, elsewhere = replace(found, servers=servers), replace(found, servers=[], triton_http="http://a,http://b")
    for given, lines in (
        (several, ["http://one (HTTP), one:1 (gRPC)", "http://two (HTTP), two:1 (gRPC)"]),
        (elsewhere, ["http://a,http://b (not of this stack)"]),
    ):
        welcome.present(Settings.load(), given, as_json=False, hello=False, detached=False)
        shown = capsys.readouterr().out.splitlines()
        at = next(number for number, line in enumerate(shown) if line.startswith("  Triton "))
        assert [line[len("  Triton      ") :] for line in shown[at : at + len(lines)]] == lines
    welcome.present(Settings.load(), several, as_json=True, hello=False, detached=True)
    rows = json.loads(capsys.readouterr().out)["tritons"]
    assert rows == [{"http": "http://one", "grpc": "one:1"}, {"http": "http://two", "grpc": "two:1"}]


def test_json_is_the_addresses_and_nothing_else(place: Any, ready: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """With --json the greeting is asked all the same, and only the promised keys are printed."""
    gateway, found = ready
    assert welcome.present(Settings.load(), found, as_json=True, hello=True, detached=True)
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"http", "grpc", "ops", "triton_http", "triton_grpc", "tritons", "redis", "pid"}
    assert document["http"] == gateway.url and len(gateway.asked) == 1


def test_without_a_key_the_first_one_is_explained(place: Any, ready: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Where keys are needed and none is set, `up --hello` succeeds, sends nothing and says how to make a key."""
    gateway, found = ready
    place.set(AUTH="keys")
    for as_json in (False, True):
        assert welcome.present(Settings.load(), found, as_json=as_json, hello=True, detached=True)
        output = capsys.readouterr()
        assert "keys create --tenant" in output.err and gateway.asked == []
        assert as_json or output.out.index("keys create --tenant") < output.out.index("Try next")


def test_where_keys_are_needed_what_is_shown_sends_one(
    place: Any, ready: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a key the greeting goes with it, and curl takes it from the environment; it is never shown."""
    gateway, found = ready
    place.set(AUTH="keys", API_KEY="tg_one")
    assert welcome.present(Settings.load(), found, as_json=False, hello=True, detached=True)
    output = capsys.readouterr().out
    assert gateway.credentials[-1] == "Bearer tg_one" and "tg_one" not in output and "keys create" not in output
    assert '-H "authorization: Bearer $TRUTHGPT_API_KEY" \\\n' in output


def test_a_greeting_that_fails_is_told(place: Any, ready: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A stack that does not answer its first prompt makes `up` fail, with the addresses still shown."""
    gateway, found = ready
    gateway.status, gateway.body = 503, b'{"error": {"message": "not ready"}}'
    assert not welcome.present(Settings.load(), found, as_json=False, hello=True, detached=True)
    output = capsys.readouterr()
    assert "error: the stack is ready but its first answer failed: not ready\nhint: " in output.err
    assert "Try next" in output.out


def test_a_log_is_followed_in_whole_lines(tmp_path: Path) -> None:
    """Lines are given once, when complete, from the chosen place on, and an error among them is noticed."""
    path = tmp_path / "log"
    path.write_bytes(b"old error: x\n")
    tail = launch._Tail(path, path.stat().st_size)
    with path.open("ab") as log:
        log.write(b"one\ntw")
        log.flush()
        assert tail.lines() == ["one"] and tail.lines() == [] and not tail.failed
        log.write("o\nerror: ñ\n".encode())
        log.flush()
    assert tail.lines() == ["two", "error: ñ"] and tail.failed


def test_the_greeting_gives_up_on_a_stalled_gateway(
    place: Any, ready: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gateway that stalls cannot keep `up` from returning."""
    gateway, found = ready
    gateway.stall_s = 3
    monkeypatch.setattr(welcome, "HELLO_TIMEOUT_S", 0.3)
    assert not welcome.present(Settings.load(), found, as_json=True, hello=True, detached=True)
    assert "did not answer in time" in capsys.readouterr().err
    assert GatewayClient(gateway.url).live() and threading.active_count() < 50


ENCODERS = {
    "embed": ("/v1/embeddings", {"embedding": [0.5, 0.25, 1.0, 2.0]}, "4 numbers, beginning [0.5, 0.25, 1.0]", "[4]"),
    "classify": ("/v1/classify", {"label": "bueno", "score": 0.75}, "bueno (0.75)", "bueno 0.75"),
}


@pytest.mark.parametrize("operation", ENCODERS)
def test_an_encoder_is_greeted_and_shown_as_one(
    place: Any, ready: Any, capsys: pytest.CaptureFixture[str], operation: str
) -> None:
    """--hello asks its own endpoint; curl's body and the Python that are shown are what the gateway takes of it."""
    gateway, found = ready
    path, row, said, printed = ENCODERS[operation]
    gateway.row["operation"], gateway.answer = operation, {"object": "list", "data": [{"index": 0, **row}]}
    assert welcome.present(Settings.load(), found, as_json=False, hello=True, detached=True)
    output = capsys.readouterr().out
    assert gateway.asked == [(path, {"model": "demo", "input": "Hola, ¿cómo estás?"})]
    assert output.startswith(f"> Hola, ¿cómo estás?\n{said}\n") and "chat" not in output and "generate" not in output
    assert f"curl {gateway.url}{path}" in output
    assert json.loads(output.split("-d '")[1].split("'\n")[0])["model"] == "demo"
    code = output.split("Or in Python:\n")[1].split("\n\nTo stop")[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, printed), done.stderr
    assert gateway.asked[1][0] == path


def test_a_model_that_takes_no_text_is_not_greeted(
    place: Any, ready: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of another backend is shown with its KServe address, and --hello says that nothing was sent."""
    gateway, found = ready
    gateway.row["operation"] = "infer"
    assert welcome.present(Settings.load(), found, as_json=False, hello=True, detached=True)
    output = capsys.readouterr()
    assert gateway.asked == [] and "takes none" in output.err and f"curl {gateway.url}/v2/models/demo\n" in output.out


def test_an_answer_to_the_greeting_that_makes_no_sense_is_told(place: Any, ready: Any) -> None:
    """An encoder that answers without vectors has not answered."""
    gateway, found = ready
    gateway.row["operation"], gateway.answer = "embed", {"data": []}
    assert not welcome.present(Settings.load(), found, as_json=True, hello=True, detached=True)


def test_a_graph_is_not_served_by_itself(place: Any) -> None:
    """`up` neither chooses the graph of another model by itself nor takes it where it is named."""
    place.export("mood")
    path = place.export("mood--engine") / "1" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "graph_only": True}))
    assert "is the graph of another model" in place.refused("up", "--model", "mood--engine")
    assert "is the graph of another model" in place.refused("up", "--models", "mood--engine")
    assert models.choice(Settings.load()).model == "mood"
