"""Which device runs which precision, asked of ONNX Runtime's providers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import onnxruntime
import pytest

from backends.inflight.devices import place
from export import precision, runtime
from export.precision import CUDA, PRECISIONS, DeviceError, check_device, serves_on
from export.runtime import SlotRuntime

CPU = ["CPUExecutionProvider"]
GPU = [CUDA, "CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("name", "device", "providers", "expected"),
    [
        ("fp32", "auto", CPU, "cpu"),
        ("fp32", "auto", GPU, "cpu"),  # float32 slots have no CUDA kernel
        ("fp16", "cpu", GPU, "cpu"),
        ("fp16", "cuda", CPU, "cpu"),  # the same file runs on both
        ("fp16", "auto", GPU, "cuda"),
        ("bf16", "auto", GPU, "cuda"),
        ("int4", "auto", GPU, "cpu"),
        ("int8", "auto", GPU, "cpu"),
    ],
)
def test_where_it_is_verified(
    monkeypatch: pytest.MonkeyPatch, name: str, device: str, providers: list[str], expected: str
) -> None:
    """The artefact is verified on the GPU where there is one that runs it, else on the processor."""
    monkeypatch.setattr(precision, "compute_capability", lambda: (9, 0))
    assert check_device(name, device, providers) == expected


@pytest.mark.parametrize(
    ("name", "device", "providers", "capability", "reason"),
    [
        ("bf16", "auto", CPU, None, "8.0 or newer with onnxruntime-gpu"),
        ("bf16", "cuda", CPU, None, "8.0 or newer with onnxruntime-gpu"),
        ("bf16", "cpu", GPU, (9, 0), "8.0 or newer"),
        ("bf16", "auto", GPU, (7, 5), "GPU here has 7.5"),
        ("int8", "cuda", GPU, (9, 0), "int8 runs on a CPU"),
        ("fp32", "cuda", GPU, (9, 0), "fp32 runs on a CPU: it keeps float32 slots"),
        ("int4", "cuda", CPU, None, "int4 runs on a CPU: it keeps float32 slots"),
    ],
)
def test_what_the_device_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    device: str,
    providers: list[str],
    capability: tuple[int, int] | None,
    reason: str,
) -> None:
    """A precision that the device lacks is refused with what has it and what to take instead."""
    monkeypatch.setattr(precision, "compute_capability", lambda: capability)
    with pytest.raises(DeviceError, match=reason) as caught:
        check_device(name, device, providers)
    assert "--precision fp" in str(caught.value.hint) and "int4" not in str(caught.value.hint)


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_what_is_published_is_not_refused_by_the_backend(
    monkeypatch: pytest.MonkeyPatch, name: str, device: str
) -> None:
    """What the exporter lets through the backend opens, on the device that its configuration asks for."""
    monkeypatch.setattr(precision, "compute_capability", lambda: (9, 0))
    try:
        check_device(name, device, GPU)
    except DeviceError:
        return
    asked = serves_on(name, device)
    placed = place(asked, precision.TABLE[name].kv_dtype, fault=lambda _: None)
    assert placed.device == ("cuda" if asked == "auto" else asked)


def test_bf16_is_not_known_here(tmp_path: Path) -> None:
    """This machine's ONNX Runtime really has no bf16 product on the CPU, which is why bf16 is refused there."""
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [2, 2]) for name in "xyz"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "y"], ["z"])], "one", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        onnxruntime.InferenceSession(model.SerializeToString(), providers=CPU)


def test_the_entry_asks_for_its_device() -> None:
    """Float32 slots stay on the processor and bf16 on the GPU wherever they are served; fp16 follows the option."""
    assert [serves_on(name, "auto") for name in ("fp32", "int8", "int4")] == ["cpu", "cpu", "cpu"]
    assert serves_on("bf16", "auto") == "cuda"
    assert serves_on("fp16", "auto") == "auto" and serves_on("fp16", "cuda") == "cuda"


@pytest.mark.parametrize(
    ("output", "expected"), [("8.9\n", (8, 9)), ("9.0\n7.5\n", (9, 0)), ("", None), ("N/A\n", None)]
)
def test_compute_capability(monkeypatch: pytest.MonkeyPatch, output: str, expected: tuple[int, int] | None) -> None:
    """nvidia-smi's first GPU counts, and no answer is no knowledge."""
    done = subprocess.CompletedProcess([], 0, output, "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert precision.compute_capability() == expected


def test_a_cuda_session_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA provider that cannot open the graph is one sentence with the next step, not ONNX Runtime's."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA failure 35: driver too old\nmore")

    monkeypatch.setattr(runtime.onnxruntime, "InferenceSession", fail)
    with pytest.raises(DeviceError, match="driver too old") as caught:
        SlotRuntime(Path("model.onnx"), 1, device="cuda")
    assert "--device cpu" in str(caught.value.hint)
