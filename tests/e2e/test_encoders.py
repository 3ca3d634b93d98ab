"""Encoders as `truthgpt export` makes them, beside a model that generates, asked by the clients that people have."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from orchestrator.local import modelset, tritonserver
from tests.counting import write_entry
from tests.encoding import EMBEDS, write_encoder

from .encoder_server import ONNXRUNTIME
from .stack import Stack, wait_until
from .test_clients_page import ENCODERS, environ

pytestmark = pytest.mark.timeout(300)  # the first test exports two models
LABELS = {"id2label": {0: "malo", 1: "bueno"}, "label2id": {"malo": 0, "bueno": 1}}
INSTANCES = 2  # of the embedder
TEXTS = [
    "Hola, ¿cómo estás?",
    "El modelo aprende palabras del corpus.",
    "uno",
    "The quick brown fox",
    "日本 \U0001f600",
]
LONG = "río " * 25_000  # 100,000 characters


@dataclass
class Served(Stack):
    """`vectors` and `scores` of TEXTS: float32 [5, 32] of the exported file and [5, 2] of transformers."""

    vectors: Any = None
    scores: Any = None
    admin: str = ""


@pytest.fixture(scope="module")
def stack() -> Iterator[Served]:
    """`counting`, and two encoders of tiny checkpoints: `embedder` by our backend, the classifier `mood` natively."""
    from export.pipeline import ExportOptions, export_model
    from tests.export import encoder_checkpoints as checkpoints
    from tests.export.test_encoder import classifier, run_texts

    folder = Path(tempfile.mkdtemp(prefix="truthgpt-e2e-"))
    repository, sentences, mood = folder / "repository", folder / "sentences", folder / "mood"
    # Stands for Triton's own backend, which the server here does not carry.
    backend = folder / "home" / "triton" / "backends" / "onnxruntime"
    backend.mkdir(parents=True)
    (backend / "model.py").write_text(ONNXRUNTIME)
    extra = {"TRUTHGPT_MODELS": "embedder,mood", "TRUTHGPT_LIMIT_PER_DAY": "1000000000"}
    started = Served(folder / "home", repository, extra=extra)
    try:
        write_entry(repository, slots=4, max_len=2000, step_delay_ms=5)
        checkpoints.write_sentence_modules(checkpoints.write_encoder(sentences, num_hidden_layers=1))
        checkpoints.write_encoder(mood, "bert", "ForSequenceClassification", num_hidden_layers=1, **LABELS)
        exported = export_model(ExportOptions(str(sentences), repository, "embedder"))
        export_model(ExportOptions(str(mood), repository, "mood", max_len=48, serve_with="native"))
        config = repository / "mood" / "config.pbtxt"  # one process that tokenises is enough here
        config.write_text(re.sub(r"KIND_CPU count: \d+", "KIND_CPU count: 1", config.read_text()))
        powers = np.exp(classifier(mood, TEXTS, max_len=48))
        started.vectors, started.scores = run_texts(exported, TEXTS), powers / powers.sum(axis=1, keepdims=True)
        started.start()
        made = started.cli("keys", "create", "--tenant", "ops", "--scope", "admin", "--json")
        started.admin = json.loads(made.stdout)["key"]
        yield started
    finally:
        started.stop()
        assert started.leftovers() == []
        shutil.rmtree(folder)


def control(stack: Served, model: str, verb: str) -> None:
    """Load or unload a model through the admin edge."""
    headers = {"authorization": f"Bearer {stack.admin}"}
    path = f"/v2/repository/models/{model}/{verb}"  # 503 while a busy machine keeps Redis from answering
    wait_until(lambda: stack.request("POST", path, {}, "OPS", headers=headers)[0] == 200, 20, path)
    wait_until(lambda: ready(stack, model) == (verb == "load"), 10, f"{model} {verb}")


def ready(stack: Stack, model: str) -> bool:
    return bool(stack.request("GET", f"/v2/models/{model}/ready")[0] == 200)


def models(stack: Stack, *arguments: str, code: int = 0) -> Any:
    """A `truthgpt models` command: its document, or what it says of its failure."""
    done = stack.cli("models", *arguments, "--json", timeout=100)
    assert done.returncode == code, done.stdout + done.stderr + stack.logs()
    return done.stderr if code else json.loads(done.stdout)


def states(stack: Stack) -> dict[str, str]:
    return {f"{row['name']} {row['version']}": row["state"] for row in models(stack, "list")}


def api(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{stack.ports['HTTP']}/v1", api_key="any", max_retries=0)


def near(found: Any, expected: Any) -> bool:
    return bool(np.abs(np.asarray(found, np.float32) - expected).max() <= 1e-5)


def embed(stack: Served, at: int) -> str:
    """Ask for the vector of a text that nobody else asks for at the moment; ok, a status, or what no client may see."""
    headers = {"cache-control": "no-store"}
    status, _, body = stack.request(
        "POST", "/v1/embeddings", {"model": "embedder", "input": TEXTS[at]}, headers=headers
    )
    if status != 200:
        return str(status)
    return "ok" if near(json.loads(body)["data"][0]["embedding"], stack.vectors[at]) else "another's vector"


def classify(stack: Served, at: int) -> str:
    headers = {"cache-control": "no-store"}
    status, _, body = stack.request("POST", "/v1/classify", {"model": "mood", "input": TEXTS[at]}, headers=headers)
    if status != 200:
        return str(status) if status < 500 or status == 503 else f"{status} {body!r}"
    return "ok" if near(list(json.loads(body)["data"][0]["scores"].values()), stack.scores[at]) else "another's scores"


def generate(stack: Served, at: int) -> str:
    body = {"model": "counting", "prompt": f"one {at}", "max_tokens": 4, "seed": at, "temperature": 1.0}
    return "ok" if stack.request("POST", "/v1/completions", body)[0] == 200 else "no completion"


class Load:
    """Three clients, one for each model, each asking one request after another. A context."""

    def __init__(self, stack: Served) -> None:
        self._stack, self._going = stack, True
        self.outcomes = {call.__name__: Counter[str]() for call in (embed, classify, generate)}
        self._threads = [threading.Thread(target=self._client, args=(call,)) for call in (embed, classify, generate)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.more()
        return self

    def __exit__(self, *raised: object) -> None:
        self._going = False
        for thread in self._threads:
            thread.join(30)

    def more(self, count: int = 5) -> None:
        """Wait until each client has had so many further answers."""
        before = {name: sum(counter.values()) for name, counter in self.outcomes.items()}
        wait_until(
            lambda: all(sum(self.outcomes[name].values()) >= had + count for name, had in before.items()),
            30, "answers go on",
        )  # fmt: skip

    def _client(self, call: Callable[[Served, int], str]) -> None:
        asked = 0
        while self._going:
            asked += 1
            try:
                outcome = call(self._stack, asked % len(TEXTS))
            except (OSError, http.client.HTTPException) as error:
                outcome = f"{type(error).__name__}: {error}"
            self.outcomes[call.__name__][outcome] += 1
            time.sleep(0.01)  # what is done meanwhile needs the processor, too


def test_openais_client_embeds(stack: Served) -> None:
    """A list of more texts than the model takes at once comes back whole and in order, bit for bit in both forms."""
    texts = [TEXTS[i % 5] if i < 10 else f"texto número {i} ¿sí?" for i in range(150)]
    with api(stack) as client:
        packed = client.embeddings.create(model="embedder", input=texts)
        plain = client.embeddings.create(model="embedder", input=texts, encoding_format="float")
        assert len(packed.data) == 150 and packed.data == plain.data and packed.usage.total_tokens > 450
        assert near([row.embedding for row in packed.data[:10]], np.concatenate([stack.vectors] * 2))
        cut = client.embeddings.create(model="embedder", input=TEXTS, dimensions=8)
        shorter = stack.vectors[:, :8] / np.linalg.norm(stack.vectors[:, :8], axis=1, keepdims=True)
        assert near([row.embedding for row in cut.data], shorter)
        with pytest.raises(openai.BadRequestError, match=r"input\[1\] has \d+ tokens; .* at most 48") as bad:
            client.embeddings.create(model="embedder", input=["a", "uno " * 60])
        assert bad.value.param == "input[1]"
        cut = client.embeddings.create(model="embedder", input=["uno " * 60], extra_body={"truncate": True})
        assert cut.usage.prompt_tokens == 48


def test_classify(stack: Served) -> None:
    """Labels and scores are transformers'; the same again comes from the cache, over KServe too, and is counted."""
    asked = {"model": "mood", "input": TEXTS}
    status, headers, answer = stack.request("POST", "/v1/classify", asked, headers={"cache-control": "no-cache"})
    rows = json.loads(answer)["data"]
    assert (status, headers["x-cache"]) == (200, "bypass") and "r=" in headers["ratelimit"]
    assert near([[row["scores"]["malo"], row["scores"]["bueno"]] for row in rows], stack.scores)
    assert [row["label"] for row in rows] == [["malo", "bueno"][best] for best in stack.scores.argmax(axis=1)]
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [5, 1], "data": TEXTS}
    status, again, _ = stack.request("POST", "/v2/models/mood/infer", {"inputs": [tensor]})
    assert (status, again["x-cache"]) == (200, "hit")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tritons_clients(stack: Served, protocol: str) -> None:
    """Rows of texts as binary tensors, and every output as an array; what is no row of texts is refused."""
    library: Any = tritonclient.http if protocol == "http" else tritonclient.grpc

    def rows(elements: list[bytes], *shape: int) -> Any:
        tensor = library.InferInput("text_input", list(shape), "BYTES")
        tensor.set_data_from_numpy(np.array(elements, dtype=object).reshape(shape))
        return [tensor]

    texts = [text.encode() for text in TEXTS]
    with library.InferenceServerClient(f"127.0.0.1:{stack.ports['HTTP' if protocol == 'http' else 'GRPC']}") as client:
        answer = client.infer("embedder", rows(texts, 5, 1))
        assert near(answer.as_numpy("embedding"), stack.vectors)
        assert (answer.as_numpy("num_input_tokens") > 2).all()
        label = client.infer("mood", rows(texts, 5, 1), outputs=[library.InferRequestedOutput("label")])
        assert label.as_numpy("label").shape == (5, 1)
        numbers = library.InferInput("text_input", [1, 1], "INT32")
        numbers.set_data_from_numpy(np.zeros((1, 1), np.int32))
        hostile = [rows(texts, 5), rows(texts[:4], 2, 2), rows([b"\xff\xfe"], 1, 1), [numbers], rows([], 0, 1)]
        for model in ("embedder", "mood"):
            for tensors in hostile:
                with pytest.raises(InferenceServerException, match=r"(?i)text_input"):
                    client.infer(model, tensors)
            with pytest.raises(InferenceServerException):
                client.infer(f"{model}--engine", rows(texts, 5, 1))


HOSTILE: list[Any] = [
    {"input": []}, {"input": [""]}, {"input": LONG}, {"input": ["uno", LONG]}, {"input": 5}, {"input": [[1, 2]]},
    {"input": ["uno"] * 2049}, {"input": None}, {"input": "uno", "truncate": "yes"}, {"input": ["uno", 7]},
]  # fmt: skip
TENSORS = [
    {"datatype": "BYTES", "shape": [2, 2], "data": ["a", "b", "c", "d"]},
    {"datatype": "BYTES", "shape": [1, 1], "data": [LONG]},
    {"datatype": "INT32", "shape": [1, 1], "data": [1]}, {"datatype": "BYTES", "shape": [0, 1], "data": []},
    {"datatype": "BYTES", "shape": [1], "data": ["a"]}, {"datatype": "BYTES", "shape": [2, 1], "data": ["a"]},
]  # fmt: skip


def test_hostile_requests_harm_no_neighbour(stack: Served) -> None:
    """Whatever is asked at every endpoint among many good requests, it alone is refused, as its own fault."""
    asked: list[tuple[str, bytes]] = []
    for path, model in (("/v1/embeddings", "embedder"), ("/v1/classify", "mood")):
        asked += [(path, json.dumps({"model": model, **body}).encode()) for body in HOSTILE]
        asked += [(path, b'{"model": "%s", "input": "\xff\xfe"}' % model.encode()), (path, b"[]")]
        infer = f"/v2/models/{model}/infer"
        asked += [(infer, json.dumps({"inputs": [{"name": "text_input", **tensor}]}).encode()) for tensor in TENSORS]
        asked += [("/v1/completions", json.dumps({"model": model, "prompt": "a"}).encode())]

    def refused(request: tuple[str, bytes]) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", stack.ports["HTTP"], timeout=30)
        try:
            connection.request("POST", request[0], request[1], {"content-type": "application/json"})
            answer = connection.getresponse()
            told = answer.read()
            return (
                "ok"
                if answer.status in (400, 413, 422) and b"error" in told
                else f"{request}: {answer.status} {told!r}"
            )
        finally:
            connection.close()

    with ThreadPoolExecutor(16) as pool:
        good = [pool.submit(call, stack, i % 5) for i in range(40) for call in (embed, classify)]
        bad = [pool.submit(refused, request) for request in asked]
        assert Counter(each.result() for each in bad) == {"ok": len(asked)}
        assert Counter(each.result() for each in good) == {"ok": 80}


def test_a_hundred_thousand_characters_can_be_cut(stack: Served) -> None:
    """Where it is asked for, a text is cut to what the model reads, and its neighbours are whole."""
    body = {"model": "embedder", "input": [LONG[:16_000], TEXTS[0]], "truncate": True}
    status, _, answer = stack.request("POST", "/v1/embeddings", body)
    assert status == 200, answer
    assert near(json.loads(answer)["data"][1]["embedding"], stack.vectors[0])


def test_batches(stack: Served, tmp_path: Path) -> None:
    """`truthgpt batch run` takes both endpoints, and a line that is refused fails alone."""
    lines = [
        {"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": {"model": "embedder", "input": TEXTS}},
        {"custom_id": "c", "method": "POST", "url": "/v1/classify", "body": {"model": "mood", "input": TEXTS[:1]}},
        {"custom_id": "x", "method": "POST", "url": "/v1/embeddings", "body": {"model": "embedder", "input": []}},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = stack.cli("batch", "run", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--json")
    assert done.returncode == 1, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["total"], summary["succeeded"], summary["failed"]) == (3, 2, 1)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["response"]["status_code"] for row in rows] == [200, 200, 400]
    assert near([row["embedding"] for row in rows[0]["response"]["body"]["data"]], stack.vectors)


def test_the_graph_of_a_model_is_nobodys(stack: Served) -> None:
    """The graph of a natively served model is loaded, and no client sees it: it is neither listed nor asked."""
    listed = [row["id"] for row in json.loads(stack.request("GET", "/v1/models")[2])["data"]]
    assert sorted(listed) == ["counting", "embedder", "mood"]
    assert states(stack)["mood--engine 1"] == "READY"
    assert stack.request("GET", "/v2/models/mood--engine")[0] == 404
    assert "mood--engine" not in stack.cli("status").stdout
    assert "is the graph of mood" in models(stack, "unload", "mood--engine", code=1)


def test_the_pages_examples(stack: Served) -> None:
    """docs/clients.md: each example of an encoder, word for word."""
    given = environ(stack, EMBEDDER="embedder", CLASSIFIER="mood")
    for example in ENCODERS:
        done = example.run(given)
        assert done.returncode == 0, done.stdout + done.stderr
        expected = "32" if "embeddings" in example.code else ("malo", "bueno")[stack.scores[0].argmax()]
        assert expected in done.stdout, done.stdout


def publish(stack: Served, name: str, number: int, **changes: Any) -> None:
    """A version of a model, as an export of the same weights makes it; `changes` go to its manifest."""
    folder, fresh = stack.repository / name, stack.repository / name / f".{number}"
    shutil.copytree(folder / "1", fresh)
    manifest = json.loads((fresh / "manifest.json").read_text()) | {"version": str(number), **changes}
    (fresh / "manifest.json").write_text(json.dumps(manifest))
    fresh.rename(folder / str(number))


def graph_of(stack: Served, number: int) -> dict[str, Any]:
    """What the manifest of `mood` says of a version of its graph."""
    manifest = (stack.repository / "mood--engine" / str(number) / "manifest.json").read_bytes()
    return {"name": "mood--engine", "version": number, "manifest_sha256": hashlib.sha256(manifest).hexdigest()}


@pytest.mark.slow
def test_encoders_come_go_and_change_version_under_load(stack: Served) -> None:
    """Reloads of both kinds fail no request, also to a version with other labels, each version of a native model has
    its own graph, and one that is unloaded is missing until it is there again, which its neighbours do not notice.
    """
    config = stack.repository / "mood" / "config.pbtxt"
    labels = config.read_text()
    with Load(stack) as load:
        publish(stack, "embedder", 2)
        assert models(stack, "reload", "embedder")["version"] == "2"
        publish(stack, "mood--engine", 2)
        publish(stack, "mood", 2, served_by=graph_of(stack, 2))
        config.write_text(labels.replace("malo", "bad").replace("bueno", "good"))
        assert models(stack, "reload", "mood")["version"] == "2"
        load.more()
        served = {name for name, state in states(stack).items() if state == "READY"}
        assert served == {"counting 1", "embedder 2", "mood 2", "mood--engine 2"}
        assert [set(counter) for counter in load.outcomes.values()] == [{"ok"}] * 3, load.outcomes
        _, _, answer = stack.request("POST", "/v1/classify", {"model": "mood", "input": TEXTS[0]})
        assert list(json.loads(answer)["data"][0]["scores"]) == ["bad", "good"]
        config.write_text(labels)

        models(stack, "unload", "mood")
        assert {name for name, state in states(stack).items() if state == "READY"} == {"counting 1", "embedder 2"}
        path = stack.repository / "mood--engine" / "2" / "manifest.json"
        path.write_text(path.read_text() + " ")
        assert "not the one that mood version 2 was exported with" in models(stack, "load", "mood", code=1)
        assert models(stack, "load", "mood", "--version", "1")["state"] == "READY"
        load.more()
    whole(stack)
    assert {"ok", "404"} <= set(load.outcomes["classify"]) <= {"ok", "404", "503"}, load.outcomes
    assert [set(load.outcomes[name]) for name in ("embed", "generate")] == [{"ok"}] * 2, load.outcomes


@pytest.mark.slow
def test_a_native_model_that_does_not_load_changes_nothing(stack: Served) -> None:
    """The old version goes on with its own graph, the new one's leaves; a server that crashes comes back with both."""
    publish(stack, "mood--engine", 3)
    publish(stack, "mood", 3, served_by=graph_of(stack, 3))
    broken = stack.repository / "mood" / "3" / "tokenizer.json"
    broken.write_text("no tokenizer")
    path = stack.repository / "mood" / "3" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["tokenizer.json"]["sha256"] = hashlib.sha256(broken.read_bytes()).hexdigest()
    path.write_text(json.dumps(manifest))
    before = {name for name, state in states(stack).items() if state == "READY"}
    with Load(stack) as load:
        assert "goes on serving" in models(stack, "reload", "mood", code=1)
        load.more()
    for name in ("mood", "mood--engine"):
        shutil.rmtree(stack.repository / name / "3")
    assert [set(counter) for counter in load.outcomes.values()] == [{"ok"}] * 3, load.outcomes
    assert {name for name, state in states(stack).items() if state == "READY"} == before
    os.kill(stack.pid("triton"), signal.SIGKILL)
    wait_until(lambda: classify(stack, 0) != "ok", 10, "it is noticed")
    whole(stack)
    assert {name for name, state in states(stack).items() if state == "READY"} - {"mood--engine 2"} == before


@pytest.mark.slow
def test_the_admin_edge_takes_the_graph_along(stack: Served) -> None:
    """Unloading a native model over KServe unloads its graph, loading it loads that first, and meanwhile nobody brings
    it back."""
    control(stack, "mood", "unload")
    wait_until(lambda: not tritonserver.stubs(stack.pid("triton"), "mood--engine"), 10, "its graph is gone")
    time.sleep(3.0)  # the watch would have acted after one
    assert not ready(stack, "mood") and not tritonserver.stubs(stack.pid("triton"), "mood")
    control(stack, "mood", "load")
    assert classify(stack, 0) == "ok"
    models(stack, "reload", "mood", "--version", "1")
    whole(stack)


def test_a_full_queue(stack: Served) -> None:
    """What finds Triton's queue full is 503 queue_full with Retry-After, at once; the model stays ready."""
    write_encoder(stack.repository, "narrow", EMBEDS | {"pause_s": "0.3"}, max_queue=2)  # one that is slow on purpose
    control(stack, "narrow", "load")
    with ThreadPoolExecutor(12) as pool:
        bodies = [{"model": "narrow", "input": f"text {i}"} for i in range(12)]
        answers = list(pool.map(lambda body: stack.request("POST", "/v1/embeddings", body), bodies))
    refused = [(headers, json.loads(body)) for status, headers, body in answers if status != 200]
    assert 0 < len(refused) < 12
    for headers, body in refused:
        assert (body["error"]["code"], "retry-after" in headers) == ("queue_full", True), body
    assert ready(stack, "narrow")
    control(stack, "narrow", "unload")


def test_dead_processes_are_seen(stack: Served) -> None:
    """A model of whose two processes one was killed, and one whose only process was, are soon there again; whoever asks
    meanwhile is answered or told 503.
    """
    killed = [tritonserver.stubs(stack.pid("triton"), name)[0].pid for name in ("embedder", "mood")]
    with Load(stack) as load:
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        whole(stack)
    told = {outcome for counter in load.outcomes.values() for outcome in counter}
    assert told <= {"ok", "503", "404"}, load.outcomes


def test_a_damaged_graph_is_refused_at_the_start(stack: Served, tmp_path: Path) -> None:
    """Triton's own backends check no file: `up` does before Triton starts, and says what `models load` says."""
    repository = tmp_path / "repository"
    for name in ("counting", "mood", "mood--engine"):
        shutil.copytree(stack.repository / name, repository / name)
    number = max(int(path.name) for path in (repository / "mood").glob("[0-9]*"))
    manifest = json.loads((repository / "mood" / str(number) / "manifest.json").read_text())
    graph = repository / "mood--engine" / str(manifest["served_by"]["version"])
    other = Served(tmp_path / "home", repository, extra={"TRUTHGPT_MODELS": "mood"})

    def refused(what: str) -> None:
        done = other.cli("up", "--detach")
        assert done.returncode == 1 and what in done.stderr and "hint: " in done.stderr, done.stderr
        assert not (other.home / "logs" / "triton.log").exists() and other.leftovers() == []

    whole_graph = (graph / "model.onnx").read_bytes()
    (graph / "model.onnx").write_bytes(whole_graph + b" ")
    refused(f"mood--engine version {graph.name} is not loaded: {graph / 'model.onnx'} is damaged")
    (graph / "model.onnx").write_bytes(whole_graph)
    path = graph / "manifest.json"
    path.write_text(path.read_text() + " ")
    refused(f"mood version {number} is not loaded: {path} is not the one that mood version {number} was exported with")


@pytest.mark.slow
def test_a_graph_that_was_damaged_does_not_come_back_after_a_crash(stack: Served) -> None:
    """Triton is started without it, the supervisor says why, the others are served; restored, it is there again."""
    number = modelset.read(stack.home)["mood--engine"]
    graph = stack.repository / "mood--engine" / str(number) / "model.onnx"
    log = stack.home / "logs" / "supervisor.log"
    before, data = len(log.read_text()), graph.read_bytes()
    graph.write_bytes(data + b" ")
    try:
        os.kill(stack.pid("triton"), signal.SIGKILL)
        said = f"could not be reloaded: mood--engine version {number} is not loaded: {graph} is damaged"
        wait_until(lambda: said in log.read_text()[before:], 30, "it is refused")
        wait_until(lambda: embed(stack, 0) == "ok", 30, "the others are back")
        server = stack.pid("triton")
        assert classify(stack, 0) in ("503", "404")
    finally:
        graph.write_bytes(data)
    whole(stack)
    assert stack.pid("triton") == server


@pytest.mark.slow
def test_an_encoder_that_says_nothing_keeps_nobody_from_being_mended(stack: Served) -> None:
    """While one is in a long batch, a model that is killed comes back as fast as ever and the batch goes on; where its
    process is stopped in the batch, it is brought back without waiting for what a batch may take.
    """
    write_encoder(stack.repository, "lengthy", EMBEDS | {"pause_s": "25"})
    control(stack, "lengthy", "load")
    wanted, server = modelset.read(stack.home), stack.pid("triton")

    def pid(name: str) -> int:
        return next((stub.pid for stub in tritonserver.stubs(server, name)), 0)

    def fetch() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            stack.request("POST", "/v1/embeddings", {"model": "lengthy", "input": "one"}, timeout=60)

    lengthy, batch = pid("lengthy"), threading.Thread(target=fetch)
    modelset.write(stack.home, wanted | {"lengthy": 1})  # as `models load` does for an export
    try:
        batch.start()
        time.sleep(1.5)  # the watch has asked it meanwhile, too
        os.kill(pid("counting"), signal.SIGKILL)
        seeds = iter(range(1000, 10_000))  # no answer is to come from the cache
        wait_until(lambda: generate(stack, next(seeds)) != "ok", 5, "it is missed")
        wait_until(lambda: generate(stack, next(seeds)) == "ok", 8, "it is back")
        assert pid("lengthy") == lengthy and batch.is_alive(), "in its batch as before"
        os.kill(lengthy, signal.SIGSTOP)
        wait_until(lambda: pid("lengthy") not in (0, lengthy) and ready(stack, "lengthy"), 12, "it is back, too")
        assert stack.pid("triton") == server
    finally:
        modelset.write(stack.home, wanted)
        batch.join(70)
        control(stack, "lengthy", "unload")
    whole(stack)


@pytest.mark.slow
def test_another_number_of_processes(stack: Served) -> None:
    """It counts once it is loaded: neither an edited config.pbtxt nor a reload with it has the watch end a process that
    is well.
    """
    config = stack.repository / "embedder" / "config.pbtxt"
    before = config.read_text()

    def left_alone(count: int) -> None:
        pids = {stub.pid for stub in tritonserver.stubs(stack.pid("triton"), "embedder")}
        assert len(pids) == count
        time.sleep(3.0)  # the watch would have acted after one
        assert {stub.pid for stub in tritonserver.stubs(stack.pid("triton"), "embedder")} == pids
        assert embed(stack, 0) == "ok"

    for count in (1, 3, INSTANCES):
        had = len(tritonserver.stubs(stack.pid("triton"), "embedder"))
        config.write_text(re.sub(r"KIND_CPU count: \d+", f"KIND_CPU count: {count}", before))
        left_alone(had)
        assert models(stack, "reload", "embedder")["changed"]
        left_alone(count)
    config.write_text(before)
    whole(stack)


def whole(stack: Served) -> None:
    """Wait until both encoders answer with all of their processes, and go on to: the watch has nothing left to mend."""

    def running(name: str) -> int:
        return len(tritonserver.stubs(stack.pid("triton"), name))

    def good() -> bool:
        if running("embedder") < INSTANCES or running("mood--engine") < 1:  # a crash brings back two of its versions
            return False
        return all(call(stack, at) == "ok" for at in range(5) for call in (embed, classify))

    def stays_good() -> bool:
        for _ in range(4):  # for longer than the watch takes to look at a model and to mend it
            if not good():
                return False
            time.sleep(0.4)
        return True

    wait_until(stays_good, 60, "both are whole")
