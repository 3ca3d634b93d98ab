"""The target tensorrt: what an export writes, and how an engine is built, on TensorRT's documented interface."""

from __future__ import annotations

import json
import os
import stat
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from export import tensorrt
from export.cli import _summary
from export.errors import ExportError
from export.pipeline import Exported, ExportOptions, export_model
from export.tensorrt import EngineError, Shapes, build_plan
from tests.export.encoder_checkpoints import write_encoder

PROFILE = {"input_ids": Shapes((1, 1), (8, 64), (64, 512))}


class Recorded:
    """Stands for the `tensorrt` module, which has no wheel for machines without a GPU: remembers what it is asked."""

    def __init__(self, parses: bool = True, builds: bool = True, fp16: bool = True) -> None:
        self.asked: list[tuple[Any, ...]] = []
        ask = self.asked.append

        class OnnxParser:
            num_errors = 1

            def __init__(self, network: object, logger: object) -> None:
                pass

            def parse_from_file(self, path: str) -> bool:
                ask(("parse", path))
                return parses

            def get_error(self, index: int) -> str:
                return f"In node {index}: no importer for Mystery"

        class Config:
            def set_memory_pool_limit(self, pool: object, size: int) -> None:
                ask(("limit", pool, size))

            def set_flag(self, flag: object) -> None:
                ask(("flag", flag))

            def add_optimization_profile(self, profile: object) -> None:
                ask(("profile",))

        class Profile:
            def set_shape(self, *shapes: object) -> None:
                ask(("shape", *shapes))

        class Builder:
            def __init__(self, logger: object) -> None:
                pass

            def create_network(self, flags: int) -> object:
                return object()

            def create_builder_config(self) -> Config:
                return Config()

            def create_optimization_profile(self) -> Profile:
                return Profile()

            def build_serialized_network(self, network: object, config: Config) -> bytes | None:
                return b"engine" if builds else None

        class Logger:
            WARNING = 2

            def __init__(self, level: int) -> None:
                pass

        self.module = types.ModuleType("tensorrt")
        parts = {"Builder": Builder, "OnnxParser": OnnxParser, "Logger": Logger, "__version__": "10.13.3.9"}
        parts["MemoryPoolType"] = types.SimpleNamespace(WORKSPACE="workspace")
        parts["BuilderFlag"] = types.SimpleNamespace(FP16="fp16") if fp16 else types.SimpleNamespace()
        vars(self.module).update(parts)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvidia-smi that knows one GPU."""
    write_smi(tmp_path / "bin", "NVIDIA A100-SXM4-40GB, 8.0, 580.95.05")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")


def write_smi(folder: Path, *rows: str) -> None:
    folder.mkdir(exist_ok=True)
    script = folder / "nvidia-smi"
    script.write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in rows))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


def install(monkeypatch: pytest.MonkeyPatch, **parts: bool) -> Recorded:
    recorded = Recorded(**parts)
    monkeypatch.setitem(sys.modules, "tensorrt", recorded.module)
    return recorded


def test_an_entry_for_tensorrt(published_tensorrt: Exported) -> None:
    """It holds the graph that was verified in fp32, promises fp16, and says that no GPU has seen it yet."""
    manifest = json.loads((published_tensorrt.path / "manifest.json").read_text())
    assert (manifest["target"], manifest["precision"], manifest["engine"]) == ("tensorrt", "fp16", None)
    assert manifest["status"] == "TensorRT: not yet verified on hardware"
    assert manifest["graph"]["kv_dtype"] == "float32"
    names = [f"past_{kind}_{layer}" for layer in range(2) for kind in ("key", "value")]
    assert manifest["graph"]["caches"] == dict.fromkeys(names, [2, 64, 16])
    assert manifest["parity"]["max_abs_logit_diff"] <= 1e-4 and manifest["parity"]["greedy_agreement"] == 1.0
    assert (manifest["parity"]["of"], manifest["parity"]["device"]) == (tensorrt.MEASURED, "cpu")
    assert (manifest["device"], "measured: the graph in fp32" in _summary(published_tensorrt)) == ("auto", True)


def test_a_precision_that_the_target_has_not_is_refused(tmp_path: Path) -> None:
    """Before the checkpoint is looked at, with the precisions that there are."""
    with pytest.raises(ExportError, match="int8") as caught:
        export_model(ExportOptions(str(tmp_path / "none"), tmp_path, "x", "int8", target="tensorrt"))
    assert caught.value.hint and "--precision fp" in caught.value.hint


def test_without_tensorrt_the_error_names_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Building an engine where TensorRT is not installed says which image has it and how to run the export there."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match="not installed") as caught:
        build_plan(tmp_path / "model.onnx", tmp_path / "model.plan", PROFILE)
    assert tensorrt.CONTAINER in str(caught.value) and caught.value.hint
    assert f"--gpus all -v $PWD:/work -w /work {tensorrt.CONTAINER}" in caught.value.hint
    assert "--target tensorrt --serve-with native" in caught.value.hint  # a decoder's engine is built elsewhere


def test_without_a_gpu_no_engine_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine belongs to a GPU: on a machine without one nothing is begun."""
    recorded = install(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match="no NVIDIA GPU here"):
        build_plan(tmp_path / "model.onnx", tmp_path / "model.plan", PROFILE)
    assert recorded.asked == []


@pytest.mark.usefixtures("gpu")
def test_a_plan_is_built_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parser, workspace, fp16 and profile are set, and the block names the GPU and TensorRT."""
    recorded = install(monkeypatch)
    plan = tmp_path / "model.plan"
    engine = build_plan(tmp_path / "model.onnx", plan, PROFILE)
    assert recorded.asked == [
        ("parse", str(tmp_path / "model.onnx")),
        ("limit", "workspace", tensorrt.WORKSPACE_BYTES),
        ("flag", "fp16"),
        ("shape", "input_ids", (1, 1), (8, 64), (64, 512)),
        ("profile",),
    ]
    assert plan.read_bytes() == b"engine"
    assert {key: engine[key] for key in ("gpu", "compute_capability", "driver", "tensorrt")} == {
        "gpu": "NVIDIA A100-SXM4-40GB",
        "compute_capability": "8.0",
        "driver": "580.95.05",
        "tensorrt": "10.13.3.9",
    }


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
def test_an_encoder_becomes_a_plan_that_triton_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its graph is verified an engine takes its place, for Triton's own backend, and the manifest says whose."""
    install(monkeypatch)
    checkpoint = write_encoder(tmp_path / "checkpoint")
    options = ExportOptions(
        str(checkpoint),
        tmp_path / "repository",
        "mood",
        "fp16",
        target="tensorrt",
        task="embeddings",
        serve_with="native",
    )
    export_model(options)
    engine = tmp_path / "repository" / "mood--engine"
    assert {path.name for path in (engine / "1").iterdir()} == {"model.plan", "manifest.json"}
    assert 'backend: "tensorrt"' in (engine / "config.pbtxt").read_text()
    manifest = json.loads((engine / "1" / "manifest.json").read_text())
    assert (manifest["engine"]["gpu"], manifest["status"]) == ("NVIDIA A100-SXM4-40GB", tensorrt.STATUS)
    assert manifest["parity"]["of"] == tensorrt.MEASURED
    assert {path.name for path in (tmp_path / "repository" / "mood" / "1").iterdir()} == {
        "tokenizer.json",
        "manifest.json",
    }


def test_an_encoder_for_tensorrt_without_it_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before weights are read, with the container that has TensorRT; and served by our backend it has no TensorRT."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    checkpoint = write_encoder(tmp_path / "checkpoint")
    for serve_with, word in (("native", "not installed"), ("backend", "inside Triton itself")):
        options = ExportOptions(
            str(checkpoint), tmp_path / "repository", "mood", "fp16", target="tensorrt", task="embeddings",
            serve_with=serve_with,
        )  # fmt: skip
        with pytest.raises(ExportError, match=word):
            export_model(options)
        assert not (tmp_path / "repository").exists()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ({"parses": False}, "no importer for Mystery"),
        ({"builds": False}, "could not build"),
        ({"fp16": False}, "no fp16 engine"),
    ],
)
def test_what_tensorrt_refuses_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: dict[str, bool], word: str
) -> None:
    """A graph it cannot read, an engine it cannot build and an fp16 it no longer makes are errors with a way out."""
    install(monkeypatch, **parts)
    with pytest.raises(EngineError, match=word) as caught:
        build_plan(tmp_path / "model.onnx", tmp_path / "model.plan", PROFILE)
    assert caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {"bin"}
