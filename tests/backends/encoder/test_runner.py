from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from backends.encoder.answer import gathered
from backends.encoder.entry import Entry
from backends.encoder.runner import EngineRunner, SessionRunner, feed
from backends.encoder.tokens import Tokens
from backends.inflight.devices import CUDA, CUDA_PROVIDER, ON_CPU, Placement
from backends.inflight.entry import EntryError
from backends.inflight.errors import InvalidArgument, Unavailable

ON_CUDA = Placement(CUDA, CUDA, 0, ((CUDA_PROVIDER, {}), *ON_CPU.providers))
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def entry(folder: Path, **changes) -> Entry:
    facts = dict(
        folder=folder, digest="", task="embeddings", inputs=INPUTS, output="embedding", width=1, max_len=64, pad=9,
        skips_padding=False, prompt="", problem="single_label", labels=(), device="cpu", threads=1,
        max_tokens_per_batch=64, engine=None, engine_version=0,
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
    """A text that breaks its run gets the error; texts beside it and in other runs get their rows."""
    runner = SessionRunner(entry(summing))
    bad, good = runner.run([text(*[200] * 40), text(1, 2)])
    assert isinstance(bad, Exception) and good.tolist() == [3]
    texts = [text(n, 200 if n in (3, 4) else 1) for n in range(7)]
    for rows in (
        runner.run(texts),
        EngineRunner(entry(summing), lambda g: runner._session.run(None, g)[0], 4).run(texts),
    ):
        assert [isinstance(row, Exception) for row in rows] == [n in (3, 4) for n in range(7)]
        assert [row.tolist() for n, row in enumerate(rows) if n not in (3, 4)] == [[n + 1] for n in (0, 1, 2, 5, 6)]
        assert isinstance(gathered(rows[3:4], 1), InvalidArgument)

    def ask(given):
        if given["input_ids"].shape[1] > 8:
            raise ValueError("out of memory")
        return np.ones((len(given["input_ids"]), 1), np.float32)

    bad, good = EngineRunner(entry(summing), ask, 4).run([text(*[1] * 40), text(1, 2)])
    assert str(bad) == "out of memory" and good.tolist() == [1]


def test_an_engine_that_is_away_is_asked_once(summing: Path):
    """Texts are asked for one by one only where that can help: an engine that is not there fails them all at once."""
    asked = []

    def ask(given):
        asked.append(len(given["input_ids"]))
        raise Unavailable("mood--engine failed: unknown model")

    runner = EngineRunner(entry(summing), ask, 4)
    assert [type(row) for row in runner.run([text(1, 2)] * 4)] == [Unavailable] * 4
    assert (asked, runner.device) == ([4], "")


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


def test_a_provider_that_did_not_start_is_not_passed_over_in_silence(summing: Path, capsys: pytest.CaptureFixture[str]):
    """ONNX Runtime goes on without a provider that it cannot have: an error of cuda, a marked fallback of auto."""
    placing = lambda device, device_id: ON_CUDA  # noqa: E731
    with pytest.warns(UserWarning), pytest.raises(EntryError, match=f"{CUDA_PROVIDER}.*set device to auto or cpu"):
        SessionRunner(entry(summing, device="cuda"), placing=placing)
    with pytest.warns(UserWarning):
        runner = SessionRunner(entry(summing, device="auto"), placing=placing)
    assert (runner.device, runner.fallback, runner.run([text(1, 2)])[0].tolist()) == ("cpu", True, [3])
    assert CUDA_PROVIDER in capsys.readouterr().err


class OnCuda:
    """A session that says it is on CUDA, computes on the CPU, and raises ``fault(rows)`` where that is a message."""

    def __init__(self, session: onnxruntime.InferenceSession, fault: Callable[[int], str]) -> None:
        self._session, self._fault = session, fault

    def disable_fallback(self) -> None: ...

    def get_providers(self) -> list[str]:
        return [CUDA_PROVIDER]

    def run(self, names, given):
        if said := self._fault(len(given["input_ids"])):
            raise RuntimeError(said)
        return self._session.run(names, given)


@pytest.fixture
def on_cuda(summing: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SessionRunner]:
    """A runner whose CUDA session has a fault; ``opened`` tells each session's first provider and what is left out."""
    real = onnxruntime.InferenceSession

    def made(fault: Callable[[int], str]) -> SessionRunner:
        def session(path, options, providers, disabled_optimizers=()):
            opened.append((providers[0][0], *disabled_optimizers))
            made = real(path, options, providers=["CPUExecutionProvider"])
            return OnCuda(made, fault) if providers[0][0] == CUDA_PROVIDER else made

        opened: list[tuple[str, ...]] = []
        monkeypatch.setattr(onnxruntime, "InferenceSession", session)
        runner = SessionRunner(entry(summing, device="cuda"), placing=lambda device, device_id: ON_CUDA)
        runner.opened = opened
        assert (runner.device, runner.fallback) == ("cuda", False)
        return runner

    return made


def test_a_lost_device_moves_the_session_to_the_cpu(on_cuda: Callable[..., SessionRunner]):
    """A run in which CUDA fails is answered by the CPU, and the fallback is said from then on."""
    runner = on_cuda(lambda rows: "CUDA failure 700: an illegal memory access was encountered ; GPU=0")
    assert runner.run([text(1, 2)])[0].tolist() == [3]
    assert (runner.device, runner.fallback) == ("cpu", True)
    assert runner.run([text(1, 3)])[0].tolist() == [4]
    # the fused residual layer norm is the slower one on the CPU alone
    assert runner.opened == [(CUDA_PROVIDER,), ("CPUExecutionProvider", "SkipLayerNormFusion")]


def test_a_shortage_of_memory_halves_the_batch(on_cuda: Callable[..., SessionRunner]):
    """Eight rows where two fit are run two by two; nothing moves to the CPU, and texts keep their order."""
    ran = []

    def fault(rows: int) -> str:
        ran.append(rows)
        return "Failed to allocate memory for requested buffer of size 939524096" if rows > 2 else ""

    runner = on_cuda(fault)
    assert [row.tolist() for row in runner.run([text(n, 1) for n in range(8)])] == [[n + 1] for n in range(8)]
    assert ran == [8, 4, 2, 2, 4, 2, 2] and (runner.device, runner.fallback) == ("cuda", False)


def test_one_row_that_does_not_fit_is_told_so(on_cuda: Callable[..., SessionRunner]):
    """There is nothing left to halve: the error is out_of_memory, which may be tried again, and the device is kept."""
    runner = on_cuda(lambda rows: "CUDA failure 2: out of memory ; GPU=0")
    assert [error.wire()[:13] for error in runner.run([text(1), text(2)])] == ["out_of_memory"] * 2
    assert (runner.device, len(runner.opened)) == ("cuda", 1)


def test_an_error_of_the_graph_moves_nothing(on_cuda: Callable[..., SessionRunner]):
    """What says nothing of the device is the run's own error."""
    runner = on_cuda(lambda rows: "Got invalid dimensions for input: input_ids")
    assert "invalid dimensions" in str(runner.run([text(1)])[0])
    assert (runner.device, runner.fallback, len(runner.opened)) == ("cuda", False, 1)
