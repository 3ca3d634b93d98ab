"""Verification notices what is wrong with an artefact, and only that."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export.errors import ExportError, SourceError, VerificationError
from export.loading import load_model
from export.pipeline import Exported, ExportOptions, export_model
from export.reference import Reference, make_prompts, prompt_lengths, run_reference
from export.runtime import SlotRuntime
from export.source import resolve
from export.verify import FP32_MAX_DIFF, Comparison, judge, verify
from tests.export.checkpoints import VOCAB_SIZE, write_gpt2

GOOD = {"max_abs_logit_diff": 1e-6, "rms_over_std": 1e-6, "greedy_agreement": 1.0, "nonfinite": 0}


@pytest.fixture(scope="module")
def references(gpt2: Path) -> list[Reference]:
    """What transformers says to a few prompts."""
    return run_reference(load_model(resolve(str(gpt2))), make_prompts((1, 2, 9, 33, 60), VOCAB_SIZE, []), 6)


def _spoil(entry: Path, folder: Path, change: float) -> Path:
    model = onnx.load(entry / "model.onnx")
    tensor = max(model.graph.initializer, key=lambda initializer: len(initializer.raw_data))
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0] += change
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def test_one_changed_weight_is_noticed(published: Exported, references: list[Reference], tmp_path: Path) -> None:
    """A single weight that is off by a hundredth blocks publishing."""
    path = _spoil(published.path, tmp_path, 0.01)
    with pytest.raises(VerificationError, match="differ from transformers"):
        verify(SlotRuntime(path, 4), references, "fp32", chunk=8)


def test_one_nan_is_noticed(published: Exported, references: list[Reference], tmp_path: Path) -> None:
    """A single NaN weight blocks publishing in every precision."""
    path = _spoil(published.path, tmp_path, float("nan"))
    with pytest.raises(VerificationError, match="NaN"):
        verify(SlotRuntime(path, 4), references, "int8", chunk=8)


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_any_number_of_slots_and_any_chunk(
    published: Exported, references: list[Reference], slots: int, chunk: int
) -> None:
    """Parity holds for every number of slots and size of prefill chunk, so no boundary is special."""
    parity = verify(SlotRuntime(published.path / "model.onnx", slots), references, "fp32", chunk)
    assert parity["greedy_agreement"] == 1.0
    assert parity["longest"] == 66


@pytest.mark.parametrize(
    ("figures", "precision", "reason"),
    [
        ({"max_abs_logit_diff": 1.1e-4}, "fp32", "differ"),
        ({"max_abs_logit_diff": float("nan")}, "fp32", "differ"),
        ({"rms_over_std": 2e-3}, "fp32", "relative"),
        ({"greedy_agreement": 0.999}, "fp32", "greedy"),
        ({"nonfinite": 1}, "int8", "NaN"),
        ({"rms_over_std": 0.061}, "int8", "spread"),
    ],
)
def test_thresholds(figures: dict[str, float], precision: str, reason: str) -> None:
    """Each figure outside its tolerance fails by itself."""
    with pytest.raises(VerificationError, match=reason):
        judge(GOOD | figures, precision)


def test_good_figures_pass() -> None:
    """Figures within tolerance pass, and int8 may disagree on tokens as long as its drift is small."""
    judge(GOOD, "fp32")
    judge(GOOD | {"max_abs_logit_diff": 0.1, "rms_over_std": 0.05, "greedy_agreement": 0.9}, "int8")


def test_a_tie_is_no_disagreement() -> None:
    """Another token counts as agreeing only while the reference's lead over it is within the tolerance of both."""
    comparison = Comparison()
    expected = np.array([0.0, 1.0, 1.0 - FP32_MAX_DIFF], np.float32)
    comparison.add(np.array([0.0, 1.0 - FP32_MAX_DIFF, 1.0], np.float32), expected, 1)
    assert comparison.greedy_agreement == 1.0
    comparison.add(np.array([0.0, 1.0, 1.5], np.float32), expected - np.array([0, 0, 0.1], np.float32), 2)
    assert comparison.greedy_agreement == 0.5


def test_prompt_lengths_reach_the_end() -> None:
    """The lengths cover both sides of a chunk boundary and the last position, and fit any short model."""
    assert {1, 2, 7, 127, 128, 129, 259, 1016} <= set(prompt_lengths(1024, 128, 8))
    for max_len in range(8, 40):
        lengths = prompt_lengths(max_len, max(1, max_len // 4), max_len // 4)
        assert lengths[0] == 1 and lengths[-1] == max_len - max_len // 4


def test_a_checkpoint_of_nans_is_refused(tmp_path: Path) -> None:
    """A checkpoint that computes NaN in transformers is refused as damaged, and nothing is published."""
    import torch

    checkpoint = write_gpt2(tmp_path / "nan")
    model = load_model(resolve(str(checkpoint)))
    with torch.no_grad():
        model.transformer.h[1].ln_1.weight[3] = float("nan")
    model.save_pretrained(checkpoint)
    with pytest.raises(SourceError, match="NaN"):
        export_model(ExportOptions(str(checkpoint), tmp_path / "repository"))
    assert list((tmp_path / "repository").iterdir()) == []


@pytest.mark.slow
def test_int8_that_drifts_is_not_published(tmp_path: Path) -> None:
    """A model whose activations have outliers loses too much in int8: nothing is published, and fp32 is suggested."""
    import torch

    checkpoint = write_gpt2(tmp_path / "outliers")
    model = load_model(resolve(str(checkpoint)))
    with torch.no_grad():
        for block in model.transformer.h:
            block.ln_2.weight[0] = 300.0
            block.mlp.c_fc.weight[0] = 0.0
    model.save_pretrained(checkpoint)
    repository = tmp_path / "repository"
    with pytest.raises(ExportError, match="int8 moves") as caught:
        export_model(ExportOptions(str(checkpoint), repository, precision="int8"))
    assert "fp32" in str(caught.value.hint)
    assert list(repository.iterdir()) == []
    shutil.rmtree(repository)
