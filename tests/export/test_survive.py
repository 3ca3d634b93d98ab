"""Checkpoints that are damaged or not to be trusted, full disks and kills: one clear error, nothing half-written."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import export.pipeline
from export.errors import RepositoryError, SourceError, UnsupportedModel
from export.loading import load_model
from export.pipeline import ExportOptions, export_model
from export.repository import Repository
from export.resources import Needs
from export.source import Source, Trust, resolve
from tests.disks import small_disk
from tests.export.checkpoints import edit_config, write_gpt2, write_llama
from tests.export.test_cli import _KILLED, _refused, _run
from tests.export.test_repository import _publish, snapshot


def _change(folder: Path, name: str, tensor: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    assert name in weights
    save_file(weights | {name: tensor}, path, metadata={"format": "pt"})


class _Malicious:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(self._marker),)


def test_pickles_run_no_code(tmp_path: Path) -> None:
    """A pickle is refused by name; where pickles are allowed, one with code in it is refused too, and runs nothing."""
    folder, marker = write_gpt2(tmp_path / "evil"), tmp_path / "marker"
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"weight": _Malicious(marker)}, file)
    refused = _run(folder, "--repository", tmp_path / "r")
    assert "pytorch_model.bin, which could run code" in _refused(refused) and "--allow-pickle" in refused.stderr
    assert "pytorch_model.bin is damaged or holds more" in _refused(
        _run(folder, "--allow-pickle", "--repository", tmp_path / "r")
    )
    torch.save({"transformer.wte.weight": torch.zeros(2), "x": _Malicious(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match="holds more than weights"):
        _ = resolve(str(folder), trust=Trust(pickle=True)).tensors
    with pytest.raises(SourceError, match="cannot be loaded"):
        load_model(resolve(str(folder), trust=Trust(pickle=True)))
    assert not marker.exists() and not (tmp_path / "r").exists()
    with (folder / "pytorch_model.bin").open("rb") as file:  # it would have
        torch.load(file, weights_only=False)
    assert marker.is_dir()


def test_allowed_pickles_load(tmp_path: Path) -> None:
    """With --allow-pickle the same weights come out of pytorch_model.bin, whole or in shards, as of safetensors."""
    folder = write_llama(tmp_path / "m")
    expected = load_model(resolve(str(folder))).state_dict()
    elements = resolve(str(folder)).parameters()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    source = resolve(str(folder), trust=Trust(pickle=True))
    assert source.pickled and source.parameters() == elements
    loaded = load_model(source).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    (folder / "pytorch_model.bin").unlink()
    shards = {name: f"pytorch_model-0000{index % 2 + 1}-of-00002.bin" for index, name in enumerate(weights)}
    for shard in set(shards.values()):
        torch.save({name: weights[name] for name in weights if shards[name] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    source = resolve(str(folder), trust=Trust(pickle=True))
    assert len(source.weights) == 2 and source.parameters() == elements


_CONFIGURATION = """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own"
"""
_MODELLING = """
from pathlib import Path
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
Path({marker!r}).touch()
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_custom_code_runs_only_when_trusted(tmp_path: Path) -> None:
    """A checkpoint's own Python is refused by name and never imported; with --trust-remote-code it makes the model."""
    folder, marker = write_llama(tmp_path / "own"), tmp_path / "ran"
    (folder / "configuration_own.py").write_text(_CONFIGURATION)
    (folder / "modeling_own.py").write_text(_MODELLING.format(marker=str(marker)))
    auto = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit_config(folder, model_type="own", architectures=["OwnForCausalLM"], auto_map=auto)
    refused = _run(folder, "--repository", tmp_path / "r")
    assert "needs code of its own" in _refused(refused) and "--trust-remote-code" in refused.stderr
    with pytest.raises(UnsupportedModel):
        resolve(str(folder))
    assert not marker.exists()
    code = (
        "import sys; from export.source import Trust, resolve; from export.loading import load_model, limit;"
        "source = resolve(sys.argv[1], trust=Trust(code=True)); print(limit(source, None));"
        "print(type(load_model(source)).__name__)"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=110)
    assert done.stdout.split() == ["128", "OwnForCausalLM"], done.stderr
    assert marker.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_numbers_are_named(tmp_path: Path, value: float) -> None:
    """One NaN or infinity anywhere is found when the weights are read, and the tensor is named."""
    folder = write_llama(tmp_path / "m")
    name = "model.layers.1.mlp.up_proj.weight"
    broken = load_file(folder / "model.safetensors")[name].clone()
    broken[7, 11] = value
    _change(folder, name, broken)
    with pytest.raises(SourceError, match=rf"NaN or infinite values in the weight {name}"):
        load_model(resolve(str(folder)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_weights_of_other_types_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    """Integer and 8-bit float matrices are somebody's quantisation: refused by the file's header, with the type."""
    folder = write_llama(tmp_path / "m")
    name = "model.layers.0.mlp.up_proj.weight"
    _change(folder, name, load_file(folder / "model.safetensors")[name].to(dtype))
    with pytest.raises(SourceError, match=rf"stores the weight {name} as \w+, not as floating"):
        resolve(str(folder)).parameters()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_load_as_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    """bf16, fp16 and fp64 checkpoints are read, in fp32, and their size counts as loaded."""
    folder = write_llama(tmp_path / "m")
    elements = resolve(str(folder)).parameters()
    weights = load_file(folder / "model.safetensors")
    typed = {name: tensor.to(dtype) for name, tensor in weights.items()}
    save_file(typed, folder / "model.safetensors", metadata={"format": "pt"})
    source = resolve(str(folder))
    assert source.parameters() == elements
    assert {weight.dtype for weight in load_model(source).parameters()} == {torch.float32}


def test_damaged_files_are_named(tmp_path: Path) -> None:
    """A byte too few or too many, a header that lies, and an index that points out of the folder are refused."""
    folder = write_llama(tmp_path / "m")
    path = folder / "model.safetensors"
    good = path.read_bytes()
    for damaged in (good[:-1], good + b"\0", good[:4], b"\xff" * 8 + good[8:], good[:8] + b"[" + good[9:], b""):
        path.write_bytes(damaged)
        with pytest.raises(SourceError, match=r"model\.safetensors is damaged"):
            resolve(str(folder)).parameters()
    index = folder / "model.safetensors.index.json"
    for names, sentence in (
        ({"a": "../m/model.safetensors"}, "outside the folder"),
        ({"a": "gone.safetensors"}, "lacks the weight file gone"),
        ({}, "names no weight files"),
    ):
        index.write_text(json.dumps({"weight_map": names}))
        with pytest.raises(SourceError, match=sentence):
            resolve(str(folder))


def test_a_file_that_is_not_the_hubs(tmp_path: Path) -> None:
    """A blob in the Hub's cache whose content is not that of its name is refused, and the file to remove named."""
    good = hashlib.sha256(b"weights").hexdigest()
    blob, snapshot_ = tmp_path / "blobs" / good, tmp_path / "snapshots" / "c0ffee"
    blob.parent.mkdir()
    snapshot_.mkdir(parents=True)
    blob.write_bytes(b"weights")
    (snapshot_ / "model.safetensors").symlink_to(blob)
    assert Source("org/m", snapshot_, "c0ffee").sha256 == good
    blob.write_bytes(b"Weights")
    with pytest.raises(SourceError, match="its SHA-256 is another") as caught:
        _ = Source("org/m", snapshot_, "c0ffee").sha256
    assert str(blob) in str(caught.value.hint)


# A tiny export writes 0.6 MB of graph and then a tokenizer of 20 KB, a manifest and a configuration.
@pytest.mark.parametrize(
    "size", [16_384, *(pytest.param(size, marks=pytest.mark.slow) for size in (4096, 131_072, 400_000))]
)
@pytest.mark.parametrize("external", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_full_disk(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, external: bool) -> None:
    """A disk that fills up in the middle gives one sentence and leaves nothing, also with weights beside the graph."""
    monkeypatch.setattr(export.pipeline, "needs", lambda *_, **__: Needs(0, 0))  # as if others had taken the space
    monkeypatch.setattr("export.optimize.EXTERNAL_DATA_BYTES", 0 if external else 1 << 40)
    with small_disk(tmp_path / "disk", str(size)) as disk:
        with pytest.raises(RepositoryError, match="no space left"):
            export_model(ExportOptions(str(gpt2), disk, name="m"))
        assert list(disk.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_every_stage_of_a_later_version(gpt2: Path, tmp_path: Path) -> None:
    """kill -9 while version 2 is made leaves version 1 alone or version 2 complete, and the next one cleans up."""
    stages = ["load", "trace", "optimise", "quantise", "verify", "publish", "renaming", "configuring"]
    for stage in stages:
        _publish(tmp_path, stage, content="one")
    before = snapshot(tmp_path)
    command = [sys.executable, "-c", _KILLED, str(gpt2), str(tmp_path), *stages]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=550)
    assert done.returncode == 0, done.stderr
    after = snapshot(tmp_path)
    assert {path: content for path, content in after.items() if path in before} == before
    assert all(path.startswith("configuring/2") for path in after.keys() - before.keys())  # behind the commit point
    manifest = json.loads((tmp_path / "configuring" / "2" / "manifest.json").read_text())
    for name, facts in manifest["files"].items():
        content = (tmp_path / "configuring" / "2" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == facts["sha256"]
    with Repository(tmp_path).staging("verify"):
        assert len([path for path in (tmp_path / ".staging").iterdir() if path.is_dir()]) == 1
    exported = export_model(ExportOptions(str(gpt2), tmp_path, name="verify"))
    assert exported.version == "2" and not (tmp_path / ".staging").exists()


@pytest.mark.slow
def test_unused_code_is_told(tmp_path: Path) -> None:
    """Code that a checkpoint brings for a family of transformers' is not run, and terminal and manifest say so."""
    folder = write_gpt2(tmp_path / "m")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    (folder / "modeling_own.py").write_text("raise SystemExit('run')")
    result = _run(folder, "--max-len", 32, "--repository", tmp_path / "r")
    assert result.exit_code == 0, result.stderr
    told = "the checkpoint's own code (auto_map) is not used: gpt2 is transformers' own here"
    assert result.stdout.splitlines()[-1] == told
    manifest = json.loads((tmp_path / "r" / "m" / "1" / "manifest.json").read_text())
    assert manifest["source"]["own_code"] == "not used"
