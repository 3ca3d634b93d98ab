"""The calibration text: what is read of it, what is measured with it, and that it helps."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from export import calibrate
from export.calibrate import Calibration, CalibrationError, CalibrationText, read_text
from export.int4 import quantize_int4
from export.pipeline import ExportOptions, export_model
from tests.export.drafts import MAX_LEN, Draft


def _bytes(text: str) -> list[int]:
    return list(text.encode())


def _draws(count: int, length: int, seed: int) -> CalibrationText:
    random = np.random.default_rng(seed)
    windows = tuple(tuple(int(token) for token in random.integers(0, 384, length)) for _ in range(count))
    return CalibrationText(windows, "0" * 64)


def test_windows_cover_the_whole_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short text is read wholly, a long one in windows spread from its beginning to its end."""
    path = tmp_path / "text"
    path.write_text("".join(chr(33 + index % 90) for index in range(1000)))
    text = read_text(path, _bytes, 384, MAX_LEN)
    assert text.tokens == 1000 // MAX_LEN * MAX_LEN
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(calibrate, "MAX_TOKENS", 4 * MAX_LEN)
    text = read_text(path, _bytes, 384, MAX_LEN)
    content = _bytes(path.read_text())
    assert len(text.windows) == 4 and text.tokens == 4 * MAX_LEN
    assert list(text.windows[0]) == content[:MAX_LEN] and list(text.windows[-1]) == content[14 * 64 : 15 * 64]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "0 tokens"),
        (b"short", "5 tokens; at least 128"),
        (b"x" * 500 + b"\xff", "not UTF-8 .byte 500"),
        (b"x" * 2001, "larger than"),
    ],
)
def test_texts_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, reason: str) -> None:
    """Too little, too much and no text are refused with the file's name and the limit."""
    monkeypatch.setattr(calibrate, "MAX_BYTES", 2000)
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=reason) as caught:
        read_text(path, _bytes, 384, MAX_LEN)
    assert str(path) in str(caught.value)


def test_moments_are_those_of_the_activations(
    gpt2_draft: Draft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In however many groups, every matrix gets its input's mean xxᵀ, the last one included, and nothing is left."""
    graph = gpt2_draft.graph.clone()
    sources = [node.inputs[0] for node in graph.graph if node.op_type == "MatMul"]
    before = [value.name for value in graph.graph.outputs]
    text = _draws(3, 20, seed=0)

    def measured() -> list[dict[str, np.ndarray]]:
        return list(Calibration(text, tmp_path / "c").moments(graph, [source for source in sources if source]))

    (together,) = measured()
    monkeypatch.setattr(calibrate, "MOMENT_BYTES", 40_000)
    groups = measured()
    assert len(groups) > 1 and sum(len(group) for group in groups) == len(together) == 9
    for group in groups:
        for name, moments in group.items():
            np.testing.assert_allclose(moments, together[name], rtol=1e-3, atol=1e-5)
            assert (np.linalg.eigvalsh(moments.astype(np.float64)) > -1e-4).all() and moments.any()
    # What enters the output embeddings has gone through the last LayerNorm: mean square 1.
    last = together[str(sources[-1].name)]  # type: ignore[union-attr]
    assert np.trace(last) / len(last) == pytest.approx(1.0, rel=0.01)
    assert [value.name for value in graph.graph.outputs] == before
    assert list(tmp_path.iterdir()) == []


def test_calibration_lowers_int4s_drift(gpt2_draft: Draft, tmp_path: Path) -> None:
    """On prompts that the calibration text does not hold, the logits of a calibrated int4 graph drift less."""
    drifts = []
    for name, text in (("plain", None), ("calibrated", _draws(24, 48, seed=5))):
        graph = gpt2_draft.graph.clone()
        quantize_int4(graph, Calibration(text, tmp_path / "c") if text else None)
        drifts.append(gpt2_draft.drift(graph, tmp_path / name).rms_over_std)
    assert drifts[1] < 0.9 * drifts[0]


@pytest.mark.slow
def test_the_manifest_says_what_calibrated(gpt2: Path, tmp_path: Path) -> None:
    """The entry records the text's hash and how many tokens were read of it, and none of its words."""
    path = tmp_path / "secret.txt"
    path.write_text("A perfectly private sentence. " * 100)
    options = ExportOptions(
        str(gpt2), tmp_path / "r", name="tiny", precision="int4", calibrate=path, allow_drift=0.6, max_len=96
    )
    exported = export_model(options)
    manifest = json.loads((exported.path / "manifest.json").read_text())
    told = manifest["quantization"]["calibration"]
    assert told["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and told["tokens"] >= 128
    assert b"private" not in b"".join(file.read_bytes() for file in exported.path.iterdir())
    assert set(file.name for file in exported.path.iterdir()) == {"manifest.json", "model.onnx", "tokenizer.json"}
