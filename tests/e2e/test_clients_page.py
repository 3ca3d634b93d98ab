"""docs/clients.md: every example, word for word, against the running stack."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from orchestrator.settings import Settings
from tests.examples import Example, examples

from .refusing import RETRY_AFTER_S, Refusing
from .stack import Stack

PAGE = Path(__file__).resolve().parents[2] / "docs" / "clients.md"
VARIABLES, *EVERY = examples(PAGE)
ENCODERS = [each for each in EVERY if each.heading == "Embeddings and classes"]  # run by test_encoders.py
ITSELF = [each for each in EVERY if each.heading.startswith("Triton with ")]  # Triton's own ports
EXAMPLES = [each for each in EVERY if each not in ENCODERS + ITSELF]
CURL, CURL_STREAM, CURL_ERROR = (each for each in EXAMPLES if each.heading == "curl")
TRITON = {"tritonclient.http", "tritonclient.grpc", "tritonclient.grpc.aio"}
NEEDS = {"console": "curl", "javascript": "node"}
# Those that the page says try again, and how often the counting model's answer is in what they print.
RETRIED = {"openai (Python)": 2, "LangChain": 4, "LiteLLM": 2, "JavaScript": 1}
WHOLE = {"tritonclient.http": 1, "tritonclient.grpc": 2, "tritonclient.grpc.aio": 2}
ANSWER = "two three one two three"


def environ(stack: Stack, url: str | None = None, **changes: str) -> dict[str, str]:
    return {
        "GATEWAY": url or f"http://127.0.0.1:{stack.ports['HTTP']}",
        "GATEWAY_GRPC": f"127.0.0.1:{stack.ports['GRPC']}",
        "TRITON": f"http://127.0.0.1:{stack.ports['TRITON_HTTP']}",
        "TRITON_GRPC": f"127.0.0.1:{stack.ports['TRITON_GRPC']}",
        "TRUTHGPT_API_KEY": "any text will do",
        "MODEL": stack.model,
        **changes,
    }


def runnable(chosen: list[Example]) -> list[Example]:
    """Those whose programs are on this machine; skips when there are none."""
    missing = {kind for kind, program in NEEDS.items() if shutil.which(program) is None}
    found = [each for each in chosen if each.kind not in missing]
    if not found:
        pytest.skip(f"not installed: {', '.join(NEEDS[kind] for kind in sorted(missing))}")
    return found


def said(done: CompletedProcess[str]) -> str:
    """What it printed, the pieces of a stream put together."""
    pieces = re.findall(r'^data: (\{.*"delta".*\})$', done.stdout, re.MULTILINE)
    return "".join(json.loads(piece)["choices"][0]["delta"].get("content") or "" for piece in pieces) or done.stdout


def check(example: Example, stack: Stack, expected: int, retries: bool) -> list[str]:
    """Run one; what is wrong with it."""
    with ExitStack() as opened:
        way = opened.enter_context(Refusing(stack.ports["HTTP"])) if retries else None
        done = example.run(environ(stack, way.url if way else None))
        problems = []
        if done.returncode != 0 or said(done).count(ANSWER) < expected:
            problems.append(f"{example.heading}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        if way is not None and way.waited_s < RETRY_AFTER_S:
            problems.append(f"{example.heading} came back after {way.waited_s} s")
        return problems


def test_every_example_is_run_by_a_test_here() -> None:
    """No heading is without an expectation, and the variables set at the top are those of the tests."""
    assert {each.heading for each in EXAMPLES} == {*RETRIED, *WHOLE, "curl"}
    assert [each.heading.removeprefix("Triton with ") for each in ITSELF] == [
        "curl", "curl", "tritonclient.grpc", "tritonclient.grpc.aio", "tritonclient.http",
    ]  # fmt: skip
    assert [each.kind for each in ENCODERS] == ["console", "console", "python"]
    names = re.findall(r"^export (\w+)=(\S+)$", VARIABLES.code, re.MULTILINE)
    settings = Settings()
    assert dict(names) == {
        "GATEWAY": f"http://127.0.0.1:{settings.http_port}", "GATEWAY_GRPC": f"127.0.0.1:{settings.grpc_port}",
        "TRITON": f"http://127.0.0.1:{settings.triton_http_port}",
        "TRITON_GRPC": f"127.0.0.1:{settings.triton_grpc_port}",
        "TRUTHGPT_API_KEY": "tg_...", "MODEL": "demo", "EMBEDDER": "minilm", "CLASSIFIER": "sentiment",
    }  # fmt: skip
    assert {kind for kind in (each.kind for each in EXAMPLES)} == {"console", "python", "javascript"}


def test_openai_clients_are_answered_and_come_back_after_a_refusal(stack: Stack) -> None:
    """curl, openai, LangChain, LiteLLM and JavaScript print the model's answer, whole and streamed; each was first
    refused with 429 and did not come back before Retry-After.
    """
    chosen = runnable([CURL, CURL_STREAM, *(each for each in EXAMPLES if each.heading in RETRIED)])
    with ThreadPoolExecutor(4) as pool:  # the refused ones wait, meanwhile others run
        work = [
            pool.submit(check, each, stack, RETRIED.get(each.heading, 1), each is not CURL_STREAM) for each in chosen
        ]
        assert [problem for each in work for problem in each.result()] == []


def test_triton_clients_are_answered(stack: Stack) -> None:
    """tritonclient's three clients print the model's answer, and over gRPC its stream."""
    with ThreadPoolExecutor(2) as pool:
        chosen = [each for each in EXAMPLES if each.heading in TRITON]
        work = [pool.submit(check, each, stack, WHOLE[each.heading], False) for each in chosen]
        assert [problem for each in work for problem in each.result()] == []


def test_triton_itself_answers_once_or_streams(stack: Stack) -> None:
    """`generate` prints exactly one response with the whole answer, `generate_stream` one for each piece of it."""
    whole, streamed = (each.run(environ(stack)) for each in runnable(ITSELF[:2]))
    once = json.loads(whole.stdout)
    assert once["text_output"].startswith(ANSWER) and once["finish_reason"] == "length"
    pieces = [json.loads(line.removeprefix("data: ")) for line in streamed.stdout.splitlines() if line.strip()]
    assert len(pieces) > 10 and "".join(piece["text_output"] for piece in pieces) == once["text_output"]
    assert [piece["finish_reason"] for piece in pieces if piece["finish_reason"]] == ["length"]


@pytest.mark.parametrize("example", ITSELF[2:4], ids=lambda each: each.heading)
def test_triton_itself_streams_over_grpc(stack: Stack, example: Example) -> None:
    """Both of tritonclient's gRPC clients print the whole answer, and a model that is not there is told."""
    done = example.run(environ(stack))
    assert done.returncode == 0 and done.stdout.startswith(ANSWER), done.stderr
    assert len(done.stdout.split()) == 20 and done.stderr == ""
    missing = example.run(environ(stack, MODEL="missing"))
    assert "missing" in missing.stdout and "Traceback" not in missing.stderr, missing.stderr


def test_triton_itself_says_how_it_is(stack: Stack) -> None:
    """tritonclient.http prints health, the model's inputs, its slots and its statistics."""
    done = ITSELF[4].run(environ(stack))
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    # As a whole Triton is not ready while any model is not, and other tests leave what they could not load.
    assert re.fullmatch("True ready (True|False) model True", lines["live"]), lines
    assert lines["server"] == "triton" and lines["slots"] == "4"
    assert "'text_input', 'stream', 'sampling_parameters'" in lines["inputs"] and int(lines["requests"]) > 0


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        ("curl", r'"code": ?"model_not_found"'),
        ("openai (Python)", r"404 model_not_found .*missing.* [\w-]+$"),
        ("JavaScript", r"404: .*missing"),
        ("tritonclient.http", r"404 .*missing"),
        ("tritonclient.grpc", r"StatusCode.NOT_FOUND .*missing"),
    ],
)
def test_an_error_is_told(stack: Stack, heading: str, expected: str) -> None:
    """With a model that is not served, what the example does with errors shows the status and the gateway's words."""
    example = runnable([each for each in EXAMPLES if each.heading == heading])[0]
    done = example.run(environ(stack, MODEL="missing"))
    told = done.stdout + done.stderr
    assert re.search(expected, told, re.MULTILINE), told
    if heading == "curl":
        assert done.returncode == 22


def test_errors_come_in_the_language_asked_for(stack: Stack) -> None:
    """curl's example of an error names the parameter, in Spanish, and prints the status."""
    done = runnable([CURL_ERROR])[0].run(environ(stack))
    body, _, status = done.stdout.rpartition("}")
    error = json.loads(body + "}")["error"]
    assert (status.strip(), error["param"]) == ("400", "max_tokens")
    assert "debe" in error["message"], error
