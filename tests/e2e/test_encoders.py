"""Encoders behind the gateway in the real Triton, asked by the clients that people have."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from orchestrator.local import tritonserver
from tests.encoding import CLASSIFIES, EMBEDS, scores, tokens, vector, write_encoder

from .stack import Stack, wait_until


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A stack of encoders alone; of `narrow` only two requests may wait, and its batches take 0.3 s."""
    folder = Path(tempfile.mkdtemp(prefix="truthgpt-e2e-"))
    write_encoder(folder / "repository", "embedder", EMBEDS)
    write_encoder(folder / "repository", "classifier", CLASSIFIES)
    write_encoder(folder / "repository", "narrow", EMBEDS | {"pause_s": "0.3"}, max_queue=2)
    started = Stack(folder / "home", folder / "repository", model="embedder")
    try:
        started.start()
        made = started.cli("keys", "create", "--tenant", "ops", "--scope", "admin", "--json")
        started.extra["admin"] = json.loads(made.stdout)["key"]
        for model in ("classifier", "narrow"):
            load(started, model)
        yield started
    finally:
        started.stop()
        assert started.leftovers() == []
        shutil.rmtree(folder)


def load(stack: Stack, model: str) -> None:
    """Load a model through the admin edge; the gateway sees it."""
    headers = {"authorization": f"Bearer {stack.extra['admin']}"}
    path = f"/v2/repository/models/{model}/load"  # 503 while a busy machine keeps Redis from answering
    wait_until(lambda: stack.request("POST", path, {}, "OPS", headers=headers)[0] == 200, 20, path)
    wait_until(lambda: ready(stack, model), 10, f"{model} is ready")


def ready(stack: Stack, model: str) -> bool:
    return bool(stack.request("GET", f"/v2/models/{model}/ready")[0] == 200)


def api(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{stack.ports['HTTP']}/v1", api_key="any", max_retries=0)


def test_openais_client_embeds(stack: Stack) -> None:
    """A list of more texts than the model takes at once comes back whole and in order, bit for bit, in both forms."""
    texts = [f"texto número {i} ¿sí?" for i in range(150)]
    with api(stack) as client:
        packed = client.embeddings.create(model="embedder", input=texts)
        plain = client.embeddings.create(model="embedder", input=texts, encoding_format="float")
        assert [row.embedding for row in packed.data] == [vector(text, 8) for text in texts]
        assert packed.data == plain.data
        assert packed.usage.total_tokens == sum(map(tokens, texts))
        with pytest.raises(openai.BadRequestError, match=r"input\[1\] has 22 tokens; .* at most 16") as bad:
            client.embeddings.create(model="embedder", input=["a", "b " * 20])
        assert bad.value.param == "input[1]"
        cut = client.embeddings.create(model="embedder", input=["b " * 20], extra_body={"truncate": True})
        assert cut.usage.prompt_tokens == 16


def test_a_bad_request_harms_no_neighbour(stack: Stack) -> None:
    """Among many at once that Triton batches together, those that are refused are refused alone."""
    bodies = [{"model": "embedder", "input": "c " * 30 if i % 5 == 0 else [f"uno {i}", f"dos {i}"]} for i in range(60)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: stack.request("POST", "/v1/embeddings", body), bodies))
    for i, (status, _, body) in enumerate(answers):
        if i % 5 == 0:
            assert status == 400, body
        else:
            assert status == 200, body
            found = [row["embedding"] for row in json.loads(body)["data"]]
            assert found == [vector(text, 8) for text in bodies[i]["input"]]


def test_classify(stack: Stack) -> None:
    """Labels and scores are the model's; the same again comes from the cache, over KServe too."""
    body = {"model": "classifier", "input": ["me gusta mucho"]}
    status, headers, answer = stack.request("POST", "/v1/classify", body)
    (row,) = json.loads(answer)["data"]
    assert (status, row["scores"]) == (
        200, dict(zip(("negative", "positive"), scores("me gusta mucho", 2), strict=True)),
    )  # fmt: skip
    assert row["score"] == max(row["scores"].values()) == row["scores"][row["label"]]
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": body["input"]}
    status, again, _ = stack.request("POST", "/v2/models/classifier/infer", {"inputs": [tensor]})
    assert (status, headers["x-cache"], again["x-cache"]) == (200, "miss", "hit")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tritons_clients(stack: Stack, protocol: str) -> None:
    """Rows of texts as binary tensors, and every output as an array."""
    texts = ["uno", "¿dos?", "three three"]
    library: Any = tritonclient.http if protocol == "http" else tritonclient.grpc
    tensor = library.InferInput("text_input", [3, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[text.encode()] for text in texts], dtype=object))
    with library.InferenceServerClient(f"127.0.0.1:{stack.ports['HTTP' if protocol == 'http' else 'GRPC']}") as client:
        answer = client.infer("embedder", [tensor])
        assert answer.as_numpy("embedding").tolist() == [vector(text, 8) for text in texts]
        assert answer.as_numpy("num_input_tokens").tolist() == [[tokens(text)] for text in texts]
        label = client.infer("classifier", [tensor], outputs=[library.InferRequestedOutput("label")])
        assert label.as_numpy("label").shape == (3, 1)
        flat = library.InferInput("text_input", [3], "BYTES")
        flat.set_data_from_numpy(np.array(texts, dtype=object))
        with pytest.raises(InferenceServerException, match=r"Expected \[n,1\]"):
            client.infer("embedder", [flat])


def test_batches(stack: Stack, tmp_path: Path) -> None:
    """`truthgpt batch run` takes both endpoints, and a line that is refused fails alone."""
    lines = [
        {"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": {"model": "embedder", "input": "uno"}},
        {"custom_id": "c", "method": "POST", "url": "/v1/classify", "body": {"model": "classifier", "input": ["a"]}},
        {"custom_id": "x", "method": "POST", "url": "/v1/embeddings", "body": {"model": "embedder", "input": []}},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = stack.cli("batch", "run", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--json")
    assert done.returncode == 1, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["total"], summary["succeeded"], summary["failed"]) == (3, 2, 1)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["response"]["status_code"] for row in rows] == [200, 200, 400]
    assert rows[0]["response"]["body"]["data"][0]["embedding"] == vector("uno", 8)


def test_a_full_queue(stack: Stack) -> None:
    """What finds Triton's queue full is 503 queue_full with Retry-After, at once; the model stays ready."""
    with ThreadPoolExecutor(12) as pool:
        bodies = [{"model": "narrow", "input": f"text {i}"} for i in range(12)]
        answers = list(pool.map(lambda body: stack.request("POST", "/v1/embeddings", body), bodies))
    refused = [(headers, json.loads(body)) for status, headers, body in answers if status != 200]
    assert 0 < len(refused) < 12
    for headers, body in refused:
        assert (body["error"]["code"], "retry-after" in headers) == ("queue_full", True), body
    assert ready(stack, "narrow")


def test_a_dead_process_is_seen(stack: Stack) -> None:
    """Who asks a model whose process was killed is told 503 at once, and soon it is there again."""
    (stub,) = tritonserver.stubs(stack.state.processes["triton"], "embedder")
    os.kill(stub.pid, signal.SIGKILL)

    def asked() -> tuple[int, bool]:
        headers = {"cache-control": "no-store"}
        status, told, _ = stack.request("POST", "/v1/embeddings", {"model": "embedder", "input": "a"}, headers=headers)
        return status, "retry-after" in told

    wait_until(lambda: asked() == (503, True), 10, "it is told")
    wait_until(lambda: asked() == (200, False), 30, "it was loaded again")
