"""int8 slots: their scales, what they cost in accuracy, and that the backend's runner serves them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from backends.inflight.devices import ON_CPU
from backends.inflight.runner import Runner
from export.errors import ExportError
from export.kvcache import LARGEST, ROOM, measure, quantize_cache
from export.optimize import array_of, save
from export.pipeline import ExportOptions, export_model
from export.quantize import quantize_int8
from export.runtime import SlotRuntime
from export.verify import verify
from tests.export.checkpoints import write_family
from tests.export.drafts import CHUNK, Draft
from tests.export.families import FAMILIES


def exercised(runtime: SlotRuntime) -> None:
    """A prompt in two chunks in one slot, and a padded batch behind which one sequence goes on."""
    runtime.prefill(2, [5, 6, 7, 8], 0)
    runtime.prefill(2, [9, 10], 4)
    runtime.prefill_fresh([[1, 2, 3], [4]])
    runtime.decode([11, 12], [3, 1])


def test_the_largest_magnitude_of_every_channel_is_measured(llama_draft: Draft, tmp_path: Path) -> None:
    """What was written into the caches at any time, by a chunk, a batch or a decode step, is what the ranges say."""
    ranges = measure(llama_draft.graph, tmp_path / "ranges", exercised)
    assert not (tmp_path / "ranges").exists()
    save(llama_draft.graph, tmp_path)
    runtime = SlotRuntime(tmp_path / "model.onnx", 4)
    exercised(runtime)
    assert ranges.keys() == runtime._cache.keys()
    for name, cache in runtime._cache.items():  # the padding of [4] is overwritten at position 1 only
        seen = np.abs(cache.array).max(axis=(0, 2))
        assert ranges[name].shape == seen.shape and (ranges[name] >= seen - 1e-7).all() and ranges[name].max() > 0


@pytest.mark.parametrize("model", ["gpt2_draft", "llama_draft"])
def test_int8_slots_cost_little(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """With packed and with separate inputs: logits stay within int8's bound, hardly further away than with float slots,
    and scales have room.
    """
    draft: Draft = request.getfixturevalue(model)
    graph = draft.graph.clone()
    quantize_int8(graph)
    before = draft.drift(graph, tmp_path / "float")
    ranges = measure(graph, tmp_path / "ranges", draft.exercise)
    quantize_cache(graph, tmp_path, draft.exercise)
    save(graph, tmp_path)
    parity = verify(SlotRuntime(tmp_path / "model.onnx", 8), draft.references, "int8", CHUNK)
    assert parity["rms_over_std"] <= before.rms_over_std + 0.01 and parity["nonfinite"] == 0
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        if str(value.name).startswith(("past_", "present_")):
            assert value.dtype == onnx.TensorProto.INT8
    for name, largest in ranges.items():
        scale = array_of(graph.graph.initializers[f"{name}.scale"])
        assert scale.shape == (1, largest.shape[0], 1, largest.shape[1])
        np.testing.assert_allclose(scale[0, :, 0] * LARGEST, largest * ROOM, rtol=1e-5)


def test_the_backend_runs_int8_slots(llama: Path, tmp_path: Path) -> None:
    """An exported entry says what its slots are of, and the backend's runner decodes in them what the exporter did, in
    a slot that was moved or loaded from a copy too.
    """
    options = ExportOptions(str(llama), tmp_path / "models", precision="int8", max_len=64, int8_cache=True)
    made = export_model(replace(options, batch_invariant=True))
    manifest = json.loads((made.path / "manifest.json").read_text())
    assert manifest["graph"]["kv_dtype"] == "int8"
    runner = Runner(made.path / "model.onnx", 3, 1, ON_CPU)
    prompt = [5, 6, 7, 8, 9, 10, 11, 12]
    runner.prefill(0, prompt, 0)
    block = runner.save(0, 0, 8)
    assert all(part.dtype == np.int8 for part in block.parts)
    runner.move(0, 1, 8)
    runner.load(2, 0, block)
    rows = runner.decode([13, 13, 13], [8, 8, 8])
    assert (rows[0] == rows[1]).all() and (rows[0] == rows[2]).all()
    expected = SlotRuntime(made.path / "model.onnx", 1, threads=1)
    expected.prefill(0, prompt, 0)
    np.testing.assert_array_equal(rows[0], expected.decode([13], [8])[0])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_int8_slots_are_for_what_rounds_already(precision: str, llama: Path, tmp_path: Path) -> None:
    """A precision that keeps what it computes refuses them before anything is read."""
    with pytest.raises(ExportError, match="--kv-cache-dtype int8 is for int8 and int4"):
        export_model(ExportOptions(str(llama), tmp_path, precision=precision, int8_cache=True))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "mistral", "qwen3", "bloom"])
def test_families_with_int8_slots(family: str, tmp_path: Path) -> None:
    """Soft-capped scores, sliding windows, normalised keys and position biases stay within int8's bound too."""
    folder = write_family(tmp_path / "model", next(known for known in FAMILIES if known.name == family))
    options = ExportOptions(str(folder), tmp_path / "models", precision="int8", max_len=96, int8_cache=True)
    assert 0 < export_model(options).parity["rms_over_std"] <= 0.06
