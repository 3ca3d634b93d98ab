"""`truthgpt bench` against a running stack: every protocol, through the gateway and straight to Triton."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .stack import Stack
from .test_metrics import Samples, after, settled

__all__ = ["settled"]

REQUESTS, PROMPT, OUTPUT, STEP_S = 6, 20, 5, 0.02
# protocol, port, further options
EDGES: tuple[tuple[str, str, list[str]], ...] = (
    ("openai", "HTTP", ["--endpoint", "chat"]), ("openai", "HTTP", ["--endpoint", "completions", "--no-stream"]),
    ("kserve-http", "HTTP", []), ("kserve-http", "TRITON_HTTP", []), ("kserve-http", "HTTP", ["--no-stream"]),
    ("kserve-grpc", "GRPC", []), ("kserve-grpc", "TRITON_GRPC", []), ("kserve-grpc", "TRITON_GRPC", ["--no-stream"]),
)  # fmt: skip


def bench(stack: Stack, protocol: str, port: str, *more: str, code: int = 0) -> dict[str, Any]:
    """The document of a small measurement."""
    url = f"127.0.0.1:{stack.ports[port]}"
    sizes = ("--requests", str(REQUESTS), "--prompt-tokens", str(PROMPT), "--output-tokens", str(OUTPUT))
    done = stack.cli(
        "bench", "--url", url if protocol == "kserve-grpc" else f"http://{url}", "--protocol", protocol,
        "--model", stack.model, *sizes, "--warmup", "0", "--timeout", "60", "--json", *more,
    )  # fmt: skip
    assert done.returncode == code, done.stderr + stack.logs()
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize(("protocol", "port", "more"), EDGES)
def test_an_edge_is_measured(stack: Stack, protocol: str, port: str, more: list[str]) -> None:
    """Each request is answered with all its tokens, by the server's count, and no figure is too small."""
    (run,) = bench(stack, protocol, port, "--concurrency", "2", *more)["runs"]
    assert run["completed"] == REQUESTS and run["errors"] == 0 and run["error_kinds"] == {}
    assert run["output_tokens"] == REQUESTS * OUTPUT and run["tokens_counted_by"] == "server"
    assert run["prompt_tokens_mean"] == PROMPT
    assert run["requests_per_s"] == pytest.approx(REQUESTS / run["seconds"], rel=1e-3)
    assert run["output_tokens_per_s"] == pytest.approx(REQUESTS * OUTPUT / run["seconds"], rel=1e-3)
    for name in ("ttft_s", "latency_s"):
        assert 0 < run[name]["p50"] <= run[name]["p90"] <= run[name]["p99"] <= run["seconds"]
    assert run["latency_s"]["min"] >= 0.9 * STEP_S * (OUTPUT - 1)
    if "--no-stream" in more:
        assert run["ttft_s"] == run["latency_s"] and run["itl_s"] is None
    else:
        # a read that a busy machine delayed brings two tokens, which share its time: the mean stays
        assert run["itl_s"]["mean"] >= 0.7 * STEP_S and run["ttft_s"]["mean"] < run["latency_s"]["mean"]


def test_what_is_measured_is_what_the_gateway_counted(stack: Stack, settled: Samples) -> None:
    """Requests and tokens of a sweep and of the questions before it; none came from the cache."""
    told = bench(stack, "openai", "HTTP", "--concurrency", "1,2")
    assert [run["concurrency"] for run in told["runs"]] == [1, 2]
    # a worker speaks once a second: once it tells of this refusal, all that came before is told
    assert stack.request("GET", "/settled")[0] == 404
    grown = after(stack, settled, "errors_total", "not_found", rises_to=1)
    asked, model = grown["requests_total", "openai", "generate", "ok"], stack.model
    questions = asked - 2 * REQUESTS
    assert 1 <= questions <= 6
    assert grown["tokens_total", "completion", model] == 2 * REQUESTS * OUTPUT + 4 * questions
    assert grown.get(("tokens_total", "cached", model), 0) == 0


def test_an_open_loop_over_a_running_stack(stack: Stack) -> None:
    """Requests a second instead of clients; goodput is counted."""
    (run,) = bench(stack, "openai", "HTTP", "--rate", "20", "--goodput", "latency:60")["runs"]
    assert run["rate"] == 20 and run["concurrency"] is None and run["completed"] == REQUESTS
    assert run["goodput_per_s"] == run["requests_per_s"]


@pytest.mark.parametrize(
    ("protocol", "port"),
    [("openai", "HTTP"), ("kserve-http", "HTTP"), ("kserve-grpc", "GRPC"), ("kserve-http", "TRITON_HTTP")],
)  # fmt: skip
def test_a_model_that_nobody_serves(stack: Stack, protocol: str, port: str) -> None:
    """The server's own words and what to check; exit code 1, and no document."""
    url = f"127.0.0.1:{stack.ports[port]}"
    url = url if protocol == "kserve-grpc" else f"http://{url}"
    done = stack.cli("bench", "--url", url, "--protocol", protocol, "--model", "nothing", "--json")
    assert done.returncode == 1 and done.stdout == "" and "nothing" in done.stderr
    assert "hint: check --model" in done.stderr


def test_a_wrong_protocol_is_said(stack: Stack) -> None:
    """HTTP to the gRPC port: an error and a hint, not a hang."""
    url = f"http://127.0.0.1:{stack.ports['GRPC']}"
    done = stack.cli("bench", "--url", url, "--model", stack.model, "--timeout", "10")
    assert done.returncode == 1 and "does not answer well" in done.stderr and "hint: " in done.stderr
