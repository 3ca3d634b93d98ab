import hashlib
import json
from pathlib import Path

import pytest

from backends.encoder.entry import load
from backends.inflight.entry import EntryError

PARAMETERS = {"task": "sentiment_analysis", "labels": '["no", "sí"]', "problem": "multi_label"}


def write(folder: Path, **changes) -> Path:
    (folder / "model.onnx").write_bytes(b"graph")
    files = {"model.onnx": {"sha256": hashlib.sha256(b"graph").hexdigest(), "bytes": 5}}
    graph = {"inputs": ["input_ids", "attention_mask"], "output": "logits", "width": 2, "max_len": 12}
    manifest = {"format": 1, "task": "sentiment_analysis", "graph": graph, "tokens": {"pad": 1}, "files": files}
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    return folder


def test_an_entry_is_read_whole(tmp_path: Path):
    """Manifest and parameters become one value, with the manifest's digest."""
    entry = load(write(tmp_path), {**PARAMETERS, "device": "cpu", "threads": "3", "max_tokens_per_batch": "99"})
    assert entry.labels == ("no", "sí") and entry.problem == "multi_label" and entry.inputs[1] == "attention_mask"
    assert (entry.width, entry.max_len, entry.pad, entry.threads, entry.max_tokens_per_batch) == (2, 12, 1, 3, 99)
    assert entry.digest == hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()[:32]
    assert entry.engine is None


@pytest.mark.parametrize(
    ("parameters", "changes", "said"),
    [
        ({"task": "fortune_telling"}, {}, "task must be one of"),
        ({"task": "embeddings"}, {}, "config.pbtxt says task embeddings"),
        ({"labels": '["one"]'}, {}, "names 1 labels, the graph has 2"),
        ({"device": "abacus"}, {}, "device must be one of auto, cpu, cuda"),
        ({"max_tokens_per_batch": "none"}, {}, "max_tokens_per_batch must be an integer"),
        ({"engine": "x--engine"}, {}, "export the model again"),
        ({}, {"served_by": {"name": "x--engine", "version": 1}}, "export the model again"),
        ({}, {"graph": {}}, "not an encoder's manifest"),
        ({}, {"format": 99}, "format other than 1"),
        ({}, {"files": {"model.onnx": {"sha256": "0"}}}, "is damaged"),
        ({}, {"files": {"other.onnx": {"sha256": "0"}}}, "missing or unreadable"),
    ],
)
def test_what_is_wrong_with_an_entry_is_said(tmp_path: Path, parameters, changes, said):
    """Each contradiction, damage and bad value is an EntryError that names it."""
    with pytest.raises(EntryError, match=said):
        load(write(tmp_path, **changes), {**PARAMETERS, **parameters})
