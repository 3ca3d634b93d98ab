"""The graph of standard operators computes what the cached attention computes, whatever a reused slot still holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from export.decoder import trace
from export.loading import load_model
from export.optimize import optimize, save
from export.pipeline import Exported
from export.probe import probe
from export.reference import Reference, make_prompts, run_reference
from export.runtime import SlotRuntime
from export.source import resolve
from export.verify import verify
from tests.export.checkpoints import VOCAB_SIZE, write_family
from tests.export.families import FAMILIES

MAX_LEN = 64


def references(checkpoint: Path) -> list[Reference]:
    model = load_model(resolve(str(checkpoint)))
    return run_reference(model, make_prompts((1, 7, 16, 17, 40, MAX_LEN - 4), VOCAB_SIZE, []), 4)


def prove(graph: Path, expected: list[Reference]) -> None:
    """Chunked, padded and mixed-length runs in slots full of what an overflow may leave behind."""
    runtime = SlotRuntime(graph, 6)
    for cache in runtime._cache.values():
        cache.array[:] = np.nan
    parity = verify(runtime, expected, "fp32", chunk=16)
    assert parity["max_abs_logit_diff"] <= 2e-5 and parity["greedy_agreement"] == 1.0 and parity["nonfinite"] == 0
    assert parity["longest"] == MAX_LEN


def test_dead_positions_are_never_seen(published_tensorrt: Exported, llama: Path) -> None:
    """Logits are transformers' in slots full of NaN: what a position held before it is written reaches nobody."""
    prove(published_tensorrt.path / "model.onnx", references(llama))


def test_the_contract_without_operators_of_our_own(published_tensorrt: Exported) -> None:
    """Inputs and outputs are those of the other graph, and only at its edge is the cache written."""
    model = onnx.load(published_tensorrt.path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    names = [value.name for value in model.graph.input]
    assert names[:5] == ["input_ids", "position_ids", "seqlens_k", "total_sequence_length", "last_index"]
    outputs = [value.name for value in model.graph.output]
    assert outputs == ["logits", *(name.replace("past", "present") for name in names[5:])]
    # So that everything before can be one engine.
    assert {node.output[0] for node in model.graph.node if node.op_type == "ScatterElements"} == set(outputs[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2", "bloom", "mimo_v2_flash"])
def test_families(tmp_path: Path, name: str) -> None:
    """Windows, soft-capped scores, ALiBi, sinks and mixed caches too have transformers' logits in slots full of NaN."""
    checkpoint = write_family(tmp_path / name, next(family for family in FAMILIES if family.name == name))
    expected = references(checkpoint)
    model = load_model(resolve(str(checkpoint)))
    graph = trace(model, probe(model, MAX_LEN), MAX_LEN, standard_operators=True)
    optimize(graph)
    save(graph, tmp_path)
    prove(tmp_path / "model.onnx", expected)
