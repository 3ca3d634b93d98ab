"""TensorRT's options for an entry, and the record of the engines that it keeps there."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime as ort
import pytest

from backends.inflight.entry import EntryError
from backends.inflight.trt import (
    PROVIDER,
    Machine,
    check_engine,
    is_for_tensorrt,
    place_for_tensorrt,
    record_engine,
    tensorrt_fault,
    tensorrt_provider,
    this_machine,
)

HERE = Machine((("NVIDIA A100-SXM4-40GB", "8.0", "580.95.05"),), "10.13.3", "1.31.1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The version folder of an entry for TensorRT, with a second layer whose cache has another shape."""
    shapes = {"past_key_0": [4, 128, 16], "past_value_0": [4, 128, 16]}
    shapes |= {"past_key_1": [2, 128, 32], "past_value_1": [2, 128, 32]}
    write_manifest(tmp_path, target="tensorrt", precision="fp16", graph={"caches": shapes})
    return tmp_path


def write_manifest(folder: Path, **manifest: object) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest))


def built(folder: Path) -> Path:
    """What the first load leaves: the provider has kept an engine, its profile and timings."""
    _, options = tensorrt_provider(folder, 8, 32)
    engine = Path(options["trt_engine_cache_path"])
    for name in ("graph_1.engine", "graph_1.profile", "cache_sm80.timing"):
        (engine / name).write_text(name)
    record_engine(folder, machine=HERE)
    return engine


def test_the_profile_covers_what_the_runner_does(folder: Path) -> None:
    """From one row of one token to all slots with a whole chunk, tuned for a full decode step, caches included."""
    name, options = tensorrt_provider(folder, slots=8, prefill_chunk=32)
    assert name == "TensorrtExecutionProvider"
    shapes = [
        dict(part.split(":") for part in options[f"trt_profile_{kind}_shapes"].split(","))
        for kind in ("min", "opt", "max")
    ]
    assert [given["input_ids"] for given in shapes] == ["1x1", "8x1", "8x32"]
    assert [given["position_ids"] for given in shapes] == ["1x1", "8x1", "8x32"]
    assert [given["seqlens_k"] for given in shapes] == ["1", "8", "8"]
    assert [given["last_index"] for given in shapes] == ["1x1", "8x1", "8x1"]
    assert [given["past_key_0"] for given in shapes] == ["1x4x128x16", "8x4x128x16", "8x4x128x16"]
    assert [given["past_value_1"] for given in shapes] == ["1x2x128x32", "8x2x128x32", "8x2x128x32"]


def test_options_keep_the_engine_in_the_entry(folder: Path) -> None:
    """fp16 as the manifest says, caches in the entry's folder, and the scatters left to CUDA, which writes in place."""
    _, options = tensorrt_provider(folder, 8, 32, device_id=1)
    assert options["device_id"] == "1"
    assert options["trt_fp16_enable"] == options["trt_layer_norm_fp32_fallback"] == "1"
    assert options["trt_op_types_to_exclude"] == "ScatterElements"
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "1"
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(folder / "engine")
    assert all(isinstance(value, str) for value in options.values())
    manifest = json.loads((folder / "manifest.json").read_text())
    write_manifest(folder, **{**manifest, "precision": "fp32"})
    assert tensorrt_provider(folder, 8, 32)[1]["trt_fp16_enable"] == "0"


def test_where_nothing_can_be_written_nothing_is_kept(folder: Path) -> None:
    """An entry whose engine folder cannot be made is served all the same, its engines built at each load."""
    (folder / "engine").write_text("in the way")
    _, options = tensorrt_provider(folder, 8, 32)
    assert options["trt_engine_cache_enable"] == "0" and "trt_engine_cache_path" not in options


def test_an_entry_says_whether_it_is_for_tensorrt(folder: Path) -> None:
    """By its manifest's target; one without the shapes of its caches is told to be exported again."""
    assert is_for_tensorrt(folder)
    write_manifest(folder, precision="fp32", graph={"layers": 2})
    assert not is_for_tensorrt(folder)
    with pytest.raises(EntryError, match="caches.*export the model again"):
        tensorrt_provider(folder, 8, 32)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(EntryError, match="cannot be read"):
        is_for_tensorrt(folder)


def test_the_record_names_the_machine_and_every_file(folder: Path) -> None:
    """It is written once, and accepted by the machine that it names."""
    engine = built(folder)
    record = json.loads((engine / "engine.json").read_text())
    assert (record["gpu"], record["compute_capability"]) == ("NVIDIA A100-SXM4-40GB", "8.0")
    assert (record["driver"], record["tensorrt"], record["onnxruntime"]) == ("580.95.05", "10.13.3", "1.31.1")
    assert set(record["files"]) == {"graph_1.engine", "graph_1.profile", "cache_sm80.timing"}
    check_engine(folder, HERE)
    before = (engine / "engine.json").read_bytes()
    record_engine(folder, machine=Machine((("Other", "9.0", "1"),), None, "1"))
    assert (engine / "engine.json").read_bytes() == before


@pytest.mark.parametrize(
    ("machine", "word"),
    [
        (Machine((("NVIDIA H100", "9.0", "580"),), "10.13.3", "1.31.1"), "this machine has NVIDIA H100"),
        (Machine((), None, "1.31.1"), "no NVIDIA GPU"),
        (Machine(HERE.gpus, "10.9.0", "1.31.1"), "tensorrt 10.13.3, here is 10.9.0"),
        (Machine(HERE.gpus, "10.13.3", "1.32.0"), "onnxruntime 1.31.1, here is 1.32.0"),
    ],
)
def test_a_foreign_engine_is_an_entry_error(folder: Path, machine: Machine, word: str) -> None:
    """A plain Triton, without the gateway's preflight, refuses as well and says which folder to remove."""
    engine = built(folder)
    with pytest.raises(EntryError, match=word) as caught:
        check_engine(folder, machine)
    assert f"remove {engine}" in str(caught.value)


@pytest.mark.parametrize("fault", ["changed", "missing", "record", "incomplete record"])
def test_a_damaged_engine_is_an_entry_error(folder: Path, fault: str) -> None:
    """TensorRT never reads a file that is not the recorded one."""
    engine = built(folder)
    path = engine / ("engine.json" if "record" in fault else "graph_1.engine")
    path.unlink() if fault == "missing" else path.write_text("{}" if "incomplete" in fault else "{torn")
    with pytest.raises(EntryError, match="damaged|cannot be read"):
        check_engine(folder, HERE)


def test_what_a_killed_first_load_left_is_removed(folder: Path) -> None:
    """Engines that no record names may be torn: they go, and the load begins anew; recorded ones stay."""
    (folder / "engine").mkdir()
    (folder / "engine" / "graph_1.engine").write_text("torn")
    check_engine(folder, HERE)
    assert list((folder / "engine").iterdir()) == []
    engine = built(folder)
    (engine / "graph_2.engine").write_text("torn")
    check_engine(folder, HERE)
    assert {path.name for path in engine.iterdir()} == {
        "graph_1.engine", "graph_1.profile", "cache_sm80.timing", "engine.json",
    }  # fmt: skip


def test_no_record_without_engines(folder: Path) -> None:
    """Where the CPU ran the graph, or no GPU can be named, nothing is recorded."""
    record_engine(folder, machine=HERE)
    (folder / "engine").mkdir()
    record_engine(folder, machine=HERE)
    (folder / "engine" / "graph_1.engine").write_text("x")
    record_engine(folder, machine=Machine((), None, "1"))
    assert not (folder / "engine" / "engine.json").exists()


@pytest.mark.parametrize("fault", ["write_text", "replace"])
def test_a_record_that_cannot_be_written_fails_no_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """On a full disk nothing is recorded and no half of a record is left; the next load records what it builds."""

    def full(path: Path, *_: object, **__: object) -> None:
        if fault == "write_text":
            path.write_bytes(b'{"gpu"')
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, fault, full)
        (folder / "engine").mkdir()
        (folder / "engine" / "graph_1.engine").write_bytes(b"kernels")
        record_engine(folder, machine=HERE)
    assert [path.name for path in (folder / "engine").iterdir()] == ["graph_1.engine"]
    check_engine(folder, HERE)
    built(folder)
    assert (folder / "engine" / "engine.json").exists()


A100, H100 = ("NVIDIA A100-SXM4-40GB", "8.0", "580.95.05"), ("NVIDIA H100 80GB HBM3", "9.0", "580.95.05")


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (None, (A100, H100, A100)), ("1", (H100,)), ("2, 1", (A100, H100)), ("GPU-bb", (H100,)), ("", ()), ("-1", ()),
        ("GPU-bb22,0", (H100, A100)), ("GPU-aa", ()), ("1,7,0", (H100,)), ("MIG-11", ()),
    ],
)  # fmt: skip
def test_gpus_are_numbered_as_cuda_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None, expected: tuple[tuple[str, str, str], ...]
) -> None:
    """A process that is shown some of the GPUs records and compares those, not nvidia-smi's first ones."""
    uuids = ("GPU-aa11", "GPU-bb22", "GPU-aa33")
    lines = [", ".join((*gpu, uuid)) for gpu, uuid in zip((A100, H100, A100), uuids, strict=True)]
    monkeypatch.setenv("PATH", str(nvidia_smi(tmp_path, lines)), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert this_machine().gpus == expected


def test_a_mig_instance_is_of_the_only_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi does not list it by its UUID; where all GPUs are alike there is no doubt."""
    monkeypatch.setenv("PATH", str(nvidia_smi(tmp_path, [", ".join((*A100, "GPU-aa11"))])), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-0a1b")
    assert this_machine().gpus == (A100,)


def nvidia_smi(folder: Path, lines: list[str]) -> Path:
    """A folder with one that says these lines."""
    script = folder / "nvidia-smi"
    script.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + "\nEND\n")
    script.chmod(0o755)
    return folder


@pytest.mark.skipif(PROVIDER in ort.get_available_providers(), reason="this ONNX Runtime has TensorRT")
def test_an_onnx_runtime_without_tensorrt_is_told_apart() -> None:
    """The processor's package has no such provider, and the sentence names the one that has."""
    assert "onnxruntime-gpu" in str(tensorrt_fault())


def test_tensorrt_is_placed_before_cuda_and_the_cpu(folder: Path) -> None:
    """With a GPU and TensorRT the slots are on the device whatever their type, and CUDA does what TensorRT leaves."""
    where = place_for_tensorrt(folder, "auto", 8, 32, device_id=1, fault=lambda _: None)
    assert (where.device, where.memory, where.device_id) == ("tensorrt", "cuda", 1)
    assert [name for name, _ in where.providers] == [PROVIDER, "CUDAExecutionProvider", "CPUExecutionProvider"]
    assert {options["device_id"] for _, options in where.providers[:2]} == {"1"}


def test_without_tensorrt_auto_is_the_cpu_and_cuda_an_error(folder: Path) -> None:
    """What is missing is said either way; asked for the CPU, nobody looks for a GPU."""
    where = place_for_tensorrt(folder, "auto", 8, 32, fault=lambda _: "there is none")
    assert (where.device, where.note) == ("cpu", "there is none")
    with pytest.raises(EntryError, match="device is cuda, but there is none"):
        place_for_tensorrt(folder, "cuda", 8, 32, fault=lambda _: "there is none")
    assert place_for_tensorrt(folder, "cpu", 8, 32, fault=lambda _: pytest.fail("looked")).note == ""
