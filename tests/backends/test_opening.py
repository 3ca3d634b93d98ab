from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from onnx import TensorProto

from backends.inflight import entry as entries
from backends.inflight.devices import CUDA, CUDA_PROVIDER, ON_CPU, Placement, place
from backends.inflight.engine import Engine
from backends.inflight.entry import Entry, EntryError
from backends.inflight.errors import DeviceLost
from backends.inflight.opening import open_model
from backends.inflight.runner import Logits, Runner
from backends.inflight.scheduler import Scheduler

from .decoder import MAX_LEN, VOCAB, write_decoder
from .fakes import Collector, sequence

ON_CUDA = Placement(CUDA, CUDA, 0, ((CUDA_PROVIDER, {}), *ON_CPU.providers))  # which is not there


@pytest.fixture
def entry(tmp_path: Path) -> Callable[..., Entry]:
    """Entries of the small decoder, as export writes them."""

    def make(element: int = TensorProto.FLOAT, kv_dtype: str = "float32", **parameters: object) -> Entry:
        folder = tmp_path / "tiny" / "1"
        folder.mkdir(parents=True, exist_ok=True)
        model = write_decoder(folder / "model.onnx", element)
        manifest = {
            "format": 1,
            "files": {"model.onnx": {"sha256": hashlib.sha256(model.read_bytes()).hexdigest()}},
            "graph": {"max_len": MAX_LEN, "vocab_size": VOCAB, "kv_dtype": kv_dtype},
            "tokens": {"eos": []},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return entries.load(folder, {name: str(value) for name, value in parameters.items()})

    return make


def test_the_device_is_auto_unless_the_entry_says_otherwise(entry: Callable[..., Entry]) -> None:
    """config.pbtxt's `device` and memory limit are read, and what is none of the choices is refused with them."""
    assert (entry().device, entry().gpu_memory_limit_mb) == ("auto", 0)
    assert (entry(device="cpu").device, entry(gpu_memory_limit_mb=512).gpu_memory_limit_mb) == ("cpu", 512)
    with pytest.raises(EntryError, match="parameter device must be one of auto, cpu, cuda, not 'gpu'"):
        entry(device="gpu")


def test_half_precision_runs_on_the_cpu_where_there_is_no_device(
    entry: Callable[..., Entry], capsys: pytest.CaptureFixture[str]
) -> None:
    """auto opens a float16 entry on the CPU, with no way to fall back further, and the log says why it is not CUDA."""
    placing = lambda *given: place(*given, fault=lambda device_id: "there is none")  # noqa: E731
    opened = open_model(entry(TensorProto.FLOAT16, "float16"), 0, placing)
    assert (opened.runner.device, opened.on_cpu, opened.fallback) == ("cpu", None, False)
    assert "tiny runs on the cpu: there is none" in capsys.readouterr().err


def test_a_device_that_fails_at_once_leaves_auto_on_the_cpu_and_marked(
    entry: Callable[..., Entry], capsys: pytest.CaptureFixture[str]
) -> None:
    """With auto the model is opened on the CPU and says that it fell back; asked for by name, CUDA's failure is the
    entry's.
    """
    with pytest.warns(UserWarning, match=CUDA_PROVIDER):
        opened = open_model(entry(), 0, lambda *given: ON_CUDA)
    assert (opened.runner.device, opened.on_cpu, opened.fallback) == ("cpu", None, True)
    assert CUDA_PROVIDER in capsys.readouterr().err
    with pytest.warns(UserWarning), pytest.raises(EntryError, match="set device to auto or cpu"):
        open_model(entry(device="cuda"), 0, lambda *given: ON_CUDA)


def test_slots_that_do_not_fit_are_named(entry: Callable[..., Entry]) -> None:
    """A cache larger than the memory is refused with what to lower."""
    with pytest.raises(EntryError, match=r"tiny does not fit: .*lower slots \(1000000000000\)"):
        open_model(replace(entry(), slots=10**12), 0)


class Lost(Runner):
    """A real runner whose device fails at a call."""

    lost_on, calls = 9, 0

    def decode(self, tokens: list[int], positions: list[int]) -> Logits:
        self.calls += 1
        if self.calls >= self.lost_on:
            raise DeviceLost("gone")
        return super().decode(tokens, positions)


def test_a_real_model_goes_on_exactly_after_its_device_is_lost(tmp_path: Path) -> None:
    """Real caches, made again on another runner from prompt and answer so far: the greedy answers are those of a run
    without a fault.
    """
    model = write_decoder(tmp_path / "model.onnx")
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]

    def answers(runner: Runner) -> list[list[int]]:
        engine = Engine(runner, Scheduler(3, 9, 4), reopen=lambda: Runner(model, 3, 1, ON_CPU), tell=lambda line: None)
        sinks = [Collector() for _ in prompts]
        for prompt, sink in zip(prompts, sinks, strict=True):
            engine.submit(sequence(prompt, 15, sink))
        engine.start()
        assert all(sink.ended.wait(10) and sink.failure is None for sink in sinks)
        assert engine.load().fallback == isinstance(runner, Lost)
        engine.close(1)
        return [sink.tokens for sink in sinks]

    without = answers(Runner(model, 3, 1, ON_CPU))
    assert answers(Lost(model, 3, 1, ON_CPU)) == without
    assert len({token for answer in without for token in answer}) > 3  # it does not say the same for ever
