"""The real Triton as upstream: its model entries, what it is asked over HTTP, and perf_analyzer over gRPC."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks import gateway_load
from benchmarks.gateway_load import NUMBER, Ask
from benchmarks.gateway_machine import cores
from benchmarks.gateway_measure import CHUNKS
from benchmarks.gateway_peers import PERF_ANALYZER
from benchmarks.gateway_systems import System, chat_body, own_environ, post, start
from orchestrator.local import tritonserver
from tests.counting import write_entry

BACKEND = Path(__file__).parent / "instant_backend.py"
COUNTING, IDENTITY = "counting", "identity"
WORD = "(?:one|two|three)"
PROMPTS = 20_000  # of perf_analyzer: more than it asks in a run
_IDENTITY = """name: "identity"
backend: "python"
max_batch_size: 0
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ 16 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 16 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""
_IDENTITY_MODEL = '''import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Gives back what it is given."""

    def execute(self, requests):
        answers = []
        for request in requests:
            tensor = pb_utils.get_input_tensor_by_name(request, "INPUT0")
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", tensor.as_numpy())]))
        return answers
'''


def write_models(repository: Path) -> list[str]:
    """An entry of our own backend, for which `BACKEND` stands in, and one that gives back its input."""
    write_entry(repository, COUNTING)
    folder = repository / IDENTITY
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(_IDENTITY)
    (folder / "1" / "model.py").write_text(_IDENTITY_MODEL)
    return [COUNTING, IDENTITY]


def generate(
    port: int, stream: bool, tokens: int, model: str, key: str = "", *, same: int = 0, **changes: Any
) -> Ask:  # fmt: skip
    """Triton's generate extension, the same bytes for Triton itself and for the gateway."""
    sampling = json.dumps({"max_tokens": tokens, "temperature": 0})
    body = {
        "text_input": f"one two three {NUMBER}", "stream": stream, "sampling_parameters": sampling,
        "return_finish_reason": True, "return_num_output_tokens": True,
    }  # fmt: skip
    path = f"/v2/models/{model}/{'generate_stream' if stream else 'generate'}"
    headers = (("x-api-key", key),) if key else ()
    changes["token"] = WORD
    return Ask(port, path, body, tokens, same=same, headers=headers, **changes)


def direct(ports: dict[str, int]) -> System:
    """Triton without a gateway; it runs beside the load, on the other core."""

    async def verify() -> str | None:
        ask = generate(ports["http"], False, 1, COUNTING)
        status, body, _ = await post(
            ports["http"], ask.path, {**ask.body, "text_input": str(chat_body("")["messages"])}
        )
        return None if status == 200 and "error" not in body else f"status {status}: {body}"

    extra = {"grpc": ports["grpc"]}
    return System("triton", ports["http"], None, verify, model=COUNTING, token=WORD, ask=generate, extra=extra)


def prompts(path: Path) -> None:
    """Requests for perf_analyzer, each with a prompt that nobody has asked so far."""
    sampling = json.dumps({"max_tokens": CHUNKS, "temperature": 0})
    rows = [
        {
            "text_input": [f"one two three {gateway_load.new_number()}"], "sampling_parameters": [sampling],
            "stream": [True], "return_finish_reason": [True],
        }
        for _ in range(PROMPTS)
    ]  # fmt: skip
    path.write_text(json.dumps({"data": rows}))


async def perf(
    system: System, folder: Path, clients: int, requests: int, stream: bool, sample: Callable[[], float]
) -> dict[str, Any]:
    """One run of perf_analyzer over gRPC: so many requests, of which the first fifth warms up and is not counted.

    What is counted is what it exports of each request: when it was sent and when each response came. CPU is of all
    requests, its start included. Raises ClickException when it fails, or when a stream had too few responses.

    A run starts at the first prompt, so each has prompts of its own: a cache would answer those of the last run.
    """
    asked = folder / "prompts.json"
    if stream:
        prompts(asked)
    exported = folder / "profile.json"
    exported.unlink(missing_ok=True)
    argv = [
        str(PERF_ANALYZER / "perf_analyzer"), "-i", "grpc", "-u", f"127.0.0.1:{system.extra['grpc']}",
        "-m", COUNTING if stream else IDENTITY, "--concurrency-range", str(clients), "--request-count", str(requests),
        "--profile-export-file", str(exported), "--max-threads", "4",
    ]  # fmt: skip
    if system.key:
        argv += ["-H", f"x-api-key: {system.key}"]
    argv += ["--streaming", "--input-data", str(asked)] if stream else ["--input-data", "zero"]
    libraries = os.pathsep.join([str(PERF_ANALYZER), tritonserver.find().library_path()])
    before = sample()
    process = start(
        "perf_analyzer", argv, {**own_environ(), "LD_LIBRARY_PATH": libraries}, folder / "perf.log", cores()[1]
    )
    try:
        code = await asyncio.to_thread(process.popen.wait, 60)
    except subprocess.TimeoutExpired as error:
        raise click.ClickException(f"{system.name}: perf_analyzer waits for an answer for ever") from error
    finally:
        process.stop()
    cpu = sample() - before
    if code != 0 or not exported.exists():
        raise click.ClickException(f"{system.name}: perf_analyzer ended with {code}:\n{process.last_words()}")
    rows = json.loads(exported.read_text(errors="replace"), strict=False)["experiments"][0]["requests"]
    return {**_kept(rows, stream), "cpu_us": round(cpu / max(len(rows), 1) * 1e6, 1)}


def _kept(rows: list[dict[str, Any]], stream: bool) -> dict[str, Any]:
    """Latencies and rate of the last four fifths, by when they were sent."""
    rows = sorted(rows, key=lambda row: row["timestamp"])[len(rows) // 5 :]
    if not rows or not all(row["response_timestamps"] for row in rows):
        raise click.ClickException("perf_analyzer exported a request without a response")
    fewest = min(len(row["response_timestamps"]) for row in rows)
    if stream and fewest < CHUNKS:
        raise click.ClickException(f"a stream had {fewest} of {CHUNKS} responses")
    whole = [(row["response_timestamps"][-1] - row["timestamp"]) / 1e9 for row in rows]
    ended = max(row["response_timestamps"][-1] for row in rows)
    took = (ended - rows[0]["timestamp"]) / 1e9
    kept: dict[str, Any] = {"requests": len(rows), "per_s": round(len(rows) / took, 1), "errors": {}}
    kept |= {f"{name}_ms": round(value, 4) for name, value in gateway_load.quantiles(whole).items()}
    if stream:
        first = [(row["response_timestamps"][0] - row["timestamp"]) / 1e9 for row in rows]
        kept |= {f"first_{name}_ms": round(value, 4) for name, value in gateway_load.quantiles(first).items()}
        kept["events"] = round(sum(len(row["response_timestamps"]) for row in rows) / len(rows), 1)
    return kept
