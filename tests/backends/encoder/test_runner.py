from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from backends.encoder.entry import Entry
from backends.encoder.runner import EngineRunner, SessionRunner, feed
from backends.encoder.tokens import Tokens
from backends.inflight.entry import EntryError

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def entry(folder: Path, **changes) -> Entry:
    facts = dict(
        folder=folder, digest="", task="embeddings", inputs=INPUTS, output="embedding", width=1, max_len=64, pad=9,
        prompt="", problem="single_label", labels=(), device="cpu", threads=1, max_tokens_per_batch=64, engine=None,
        engine_version=0,
    )  # fmt: skip
    return Entry(**{**facts, **changes})


def text(*ids: int) -> Tokens:
    return Tokens(list(ids), [0] * len(ids))


@pytest.fixture(scope="module")
def summing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph whose embedding is the sum of the unmasked ids; an id of 100 or more is beyond its table and fails."""
    folder = tmp_path_factory.mktemp("summing")
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["known"]),
        helper.make_node("Mul", ["known", "attention_mask"], ["live"]),
        helper.make_node("Add", ["live", "token_type_ids"], ["all"]),
        helper.make_node("ReduceSum", ["all", "axes"], ["sum"], keepdims=1),
        helper.make_node("Cast", ["sum"], ["embedding"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "summing",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["rows", "seq"]) for name in INPUTS],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["rows", 1])],
        [
            helper.make_tensor("table", TensorProto.INT64, [100], list(range(100))),
            helper.make_tensor("axes", TensorProto.INT64, [1], [1]),
        ],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "model.onnx"
    )
    return folder


def test_rows_are_padded_on_the_right():
    """Ids get the pad token, mask and segments zeros; inputs that the graph does not have are left out."""
    given = feed([text(1, 2), Tokens([3], [1])], 3, 9, ("input_ids", "attention_mask"))
    assert list(given) == ["input_ids", "attention_mask"]
    assert given["input_ids"].tolist() == [[1, 2, 9], [3, 9, 9]]
    assert given["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert feed([Tokens([3], [1])], 2, 9, INPUTS)["token_type_ids"].tolist() == [[1, 0]]


@given(texts=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=40), max_size=30))
def test_every_text_gets_its_own_row(summing: Path, texts):
    """Whatever the lengths and the packing, each answer is the sum of its own ids, in the order of the texts."""
    runner = SessionRunner(entry(summing))
    assert [float(row[0]) for row in runner.run([text(*ids) for ids in texts])] == [sum(ids) for ids in texts]
    asked = EngineRunner(entry(summing), lambda given: runner._session.run(None, given)[0], 4)
    assert [float(row[0]) for row in asked.run([text(*ids) for ids in texts])] == [sum(ids) for ids in texts]


def test_a_failing_run_fails_its_own_texts_only(summing: Path):
    """A text that breaks its run gets the error; texts of another length, in another run, get their rows."""
    bad, good = SessionRunner(entry(summing)).run([text(*[200] * 40), text(1, 2)])
    assert isinstance(bad, Exception) and good.tolist() == [3]

    def ask(given):
        if given["input_ids"].shape[1] > 8:
            raise ValueError("out of memory")
        return np.ones((len(given["input_ids"]), 1), np.float32)

    bad, good = EngineRunner(entry(summing), ask, 4).run([text(*[1] * 40), text(1, 2)])
    assert str(bad) == "out of memory" and good.tolist() == [1]


def test_native_requests_have_bucket_shapes_and_at_most_max_rows(summing: Path):
    """Six texts of five tokens for an engine of four rows: two requests, padded to eight."""
    shapes = []

    def ask(given):
        shapes.append(given["input_ids"].shape)
        return np.ones((len(given["input_ids"]), 1), np.float32)

    EngineRunner(entry(summing), ask, 4).run([text(*[1] * 5)] * 6)
    assert shapes == [(4, 8), (2, 8)]


def test_a_device_that_is_not_there_is_refused(summing: Path):
    """device cuda without the provider is an error of the entry; auto runs on the CPU and is no fallback."""
    with pytest.raises(EntryError, match="no CUDA provider"):
        SessionRunner(entry(summing, device="cuda"))
    runner = SessionRunner(entry(summing, device="auto"))
    assert (runner.device, runner.fallback) == ("cpu", False)


def test_a_failing_cuda_session_is_rebuilt_on_the_cpu(summing: Path, monkeypatch: pytest.MonkeyPatch):
    """A run that fails on CUDA is answered by the CPU, and the fallback is said from then on."""
    opened = []
    real = onnxruntime.InferenceSession

    class OnCuda:
        def run(self, *_):
            raise RuntimeError("CUDA failure 2: out of memory")

    def session(path, options, providers, disabled_optimizers):
        opened.append((providers[0], *disabled_optimizers))
        return OnCuda() if providers == ["CUDAExecutionProvider"] else real(path, options, providers)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    runner = SessionRunner(entry(summing, device="auto"))
    assert (runner.device, runner.fallback) == ("cuda", False)
    assert runner.run([text(1, 2)])[0].tolist() == [3]
    assert (runner.device, runner.fallback) == ("cpu", True)
    assert runner.run([text(1, 3)])[0].tolist() == [4]
    # the fused residual layer norm is the slower one on the CPU alone
    assert opened == [("CUDAExecutionProvider",), ("CPUExecutionProvider", "SkipLayerNormFusion")]
