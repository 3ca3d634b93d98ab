"""A TensorRT engine of another machine is refused before anything reads it, with the way to one that runs here."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator import engines, models
from orchestrator.engines import ForeignEngine, Gpu, Machine
from orchestrator.local import preflight
from orchestrator.models import Version
from orchestrator.settings import Settings

A100 = Gpu("NVIDIA A100-SXM4-40GB", "8.0", "580.95.05")
H100 = Gpu("NVIDIA H100 80GB HBM3", "9.0", "580.95.05")
HERE = Machine((A100,), "10.13.3", "1.31.1")


def write(repository: Path, engine: dict[str, Any] | None = None, **changes: Any) -> Version:
    """A version for TensorRT, with a cached engine of the A100 machine, or with an engine block in its manifest."""
    folder = repository / "model" / "1"
    folder.mkdir(parents=True)
    (repository / "model" / "config.pbtxt").write_text("")
    (folder / "manifest.json").write_text(json.dumps({"target": "tensorrt", "engine": engine}))
    if engine is None:
        (folder / "engine").mkdir()
        (folder / "engine" / "a.engine").write_bytes(b"kernels")
        record = {"gpu": A100.name, "compute_capability": "8.0", "driver": "580.1", "tensorrt": "10.13.3"}
        record |= {"onnxruntime": "1.31.1", "files": {"a.engine": hashlib.sha256(b"kernels").hexdigest()}, **changes}
        (folder / "engine" / "engine.json").write_text(json.dumps(record))
    return models.read(repository)[0].newest


def refused(version: Version, machine: Machine) -> ForeignEngine:
    with pytest.raises(ForeignEngine) as caught:
        engines.require(version, machine)
    return caught.value


def test_an_engine_of_this_machine_may_be_loaded(tmp_path: Path) -> None:
    """The same GPU and versions are let through, also beside another GPU and under another driver."""
    version = write(tmp_path)
    engines.require(version, HERE)
    engines.require(version, Machine((H100, A100)))


def test_an_entry_without_an_engine_is_no_concern(tmp_path: Path) -> None:
    """What has no engine may be loaded anywhere: the first load builds one."""
    version = write(tmp_path)
    (version.folder / "engine" / "engine.json").unlink()
    engines.require(version, Machine(()))


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (Machine((H100,), "10.13.3", "1.31.1"), ("for NVIDIA A100", "this machine has NVIDIA H100")),
        (Machine((Gpu(A100.name, "8.6", ""),)), ("compute capability 8.0", "8.6")),
        (Machine(()), ("this machine has no NVIDIA GPU",)),
        (Machine((A100,), "10.9.0", "1.31.1"), ("tensorrt 10.13.3", "tensorrt 10.9.0")),
        (Machine((A100,), "10.13.3", "1.30.0"), ("onnxruntime 1.31.1", "onnxruntime 1.30.0")),
    ],
)
def test_an_engine_of_another_machine_is_refused(tmp_path: Path, machine: Machine, words: tuple[str, ...]) -> None:
    """Another GPU, TensorRT or ONNX Runtime, or none: both are named, and so is the folder to remove."""
    error = refused(write(tmp_path), machine)
    assert all(word in str(error) for word in words), str(error)
    assert f"rm -r '{tmp_path / 'model' / '1' / 'engine'}'" in error.hint


def test_a_plan_of_another_machine_is_exported_again(tmp_path: Path) -> None:
    """An engine that was built at export is compared by the manifest; the hint is the command that builds another."""
    block = {"gpu": A100.name, "compute_capability": "8.0", "driver": "1", "tensorrt": "10.13.3.9", "cuda": "13.0"}
    version = write(tmp_path, block)
    engines.require(version, HERE)
    assert "--name model --target tensorrt" in refused(version, Machine((H100,))).hint


@pytest.mark.parametrize("fault", ["changed", "missing", "record"])
def test_a_damaged_engine_is_refused(tmp_path: Path, fault: str) -> None:
    """A changed or missing engine file and a record that is no JSON are named."""
    version = write(tmp_path)
    path = version.folder / "engine" / ("engine.json" if fault == "record" else "a.engine")
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(b"{kernel")
    error = refused(version, HERE)
    assert str(path) in str(error) and "rm -r" in error.hint


def test_up_refuses_before_triton_starts(tmp_path: Path) -> None:
    """The preflight of a stack raises its own error with the hint, for the version that is wanted and no other; what is
    not there is not its matter.
    """
    write(tmp_path, gpu="NVIDIA Another 1")
    settings = Settings.load({"model_repository": tmp_path})
    preflight.check_engine(settings, "missing", 1)
    with pytest.raises(preflight.StartError, match="NVIDIA Another 1") as caught:
        preflight.check_engine(settings, "model", 1)
    assert "rm -r" in caught.value.hint
    preflight.check_engine(settings, "model", 2)
    shutil.copytree(tmp_path / "model" / "1", tmp_path / "model" / "2")
    shutil.rmtree(tmp_path / "model" / "1" / "engine")
    preflight.check_engine(settings, "model", 1)
    with pytest.raises(preflight.StartError, match="model version 2"):
        preflight.check_engine(settings, "model", 2)


def test_the_machine_is_asked_within_a_deadline() -> None:
    """nvidia-smi's rows are read; where it hangs, fails or is missing there is no GPU, and nobody waits for it."""
    says = ["printf", "%s, %s, %s\n", A100.name, "8.0", "580.95.05", H100.name, "9.0", "580.95.05"]
    assert engines.this_machine(says).gpus == (A100, H100)
    began = time.monotonic()
    for query in (["sleep", "60"], [sys.executable, "-c", "raise SystemExit(9)"], ["/no/such/program"]):
        assert engines.this_machine(query, deadline_s=0.2).gpus == ()
    assert time.monotonic() - began < 30
