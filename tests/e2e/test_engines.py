"""TensorRT engines in entries, through the real Triton."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.counting import write_entry

from .stack import Stack, wait_until


def write_foreign(repository: Path) -> Path:
    """An entry with the engine of a machine that this one is not."""
    entry = write_entry(repository, "foreign")
    engine = entry / "1" / "engine"
    engine.mkdir()
    record = {"gpu": "NVIDIA Tesla P4", "compute_capability": "6.1", "tensorrt": "8.0.1", "onnxruntime": "1.9.0"}
    (engine / "engine.json").write_text(json.dumps({**record, "files": {}}))
    return entry


def test_triton_itself_refuses_a_foreign_engine(stack: Stack):
    """Loaded past the preflight, an engine of another GPU is refused by the backend, in words; the stack goes on."""
    entry = write_foreign(stack.repository)
    try:
        status, _, body = stack.request("POST", "/v2/repository/models/foreign/load", {}, "TRITON_HTTP", timeout=30)
    finally:
        shutil.rmtree(entry)
    assert status == 400 and b"engines for NVIDIA Tesla P4 (6.1)" in body and b"the next load builds" in body
    wait_until(stack.ready, 10, "the stack is ready")


def test_up_refuses_before_triton_is_started(tmp_path: Path):
    """`truthgpt up` says whose engine it is and what to remove, and nothing is left running."""
    write_foreign(tmp_path / "repository")
    stack = Stack(tmp_path / "home", tmp_path / "repository", "foreign")
    done = stack.cli("up", "--detach")
    assert done.returncode == 1 and "has a TensorRT engine for NVIDIA Tesla P4" in done.stderr
    assert f"rm -r '{tmp_path / 'repository' / 'foreign' / '1' / 'engine'}'" in done.stderr
    assert not (tmp_path / "home" / "logs" / "triton.log").exists()
    assert stack.leftovers() == []
