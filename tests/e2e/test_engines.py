"""TensorRT engines in entries, through the real Triton."""

from __future__ import annotations

import json
import shutil

from tests.counting import write_entry

from .stack import Stack


def test_triton_itself_refuses_a_foreign_engine(stack: Stack):
    """Loaded past the preflight, an engine of another GPU is refused by the backend, in words; the stack goes on."""
    entry = write_entry(stack.repository, "foreign")
    engine = entry / "1" / "engine"
    engine.mkdir()
    record = {"gpu": "NVIDIA Tesla P4", "compute_capability": "6.1", "tensorrt": "8.0.1", "onnxruntime": "1.9.0"}
    (engine / "engine.json").write_text(json.dumps({**record, "files": {}}))
    try:
        status, _, body = stack.request("POST", "/v2/repository/models/foreign/load", {}, "TRITON_HTTP", timeout=30)
    finally:
        shutil.rmtree(entry)
    assert status == 400 and b"engines for NVIDIA Tesla P4 (6.1)" in body and b"the next load builds" in body
    assert stack.ready()
