"""The target tensorrt: what an export promises of it, and engines that are built at export time.

A decoder's engine is built where it runs, by ONNX Runtime's TensorRT provider when the entry is loaded first; the
exporter only writes a graph that TensorRT takes (`export.standard_attention`) and proves it on the processor. An
encoder that Triton's own TensorRT backend serves needs its engine in the entry: `build_plan`.

Not yet verified on hardware: written against the documented API of TensorRT 10.
Source: https://docs.nvidia.com/deeplearning/tensorrt/10.13.3/inference-library/python-api-docs.html
"""

from __future__ import annotations

import importlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.errors import ExportError

STATUS = "TensorRT: not yet verified on hardware"
# The manifest's ``parity.of``: the figures are those of the file that was verified, not of what TensorRT makes of it.
MEASURED = "the graph in fp32; the engine has not been run"
PRECISIONS = ("fp16", "fp32")
# CUDA 13 and TensorRT 10, as onnxruntime-gpu 1.31 is linked against:
# https://docs.nvidia.com/deeplearning/frameworks/support-matrix/index.html
CONTAINER = "nvcr.io/nvidia/tensorrt:25.10-py3"
WORKSPACE_BYTES = 4 << 30
_SMI_S = 10.0


class EngineError(ExportError):
    """No TensorRT engine can be built here, or TensorRT did not build one."""


@dataclass(frozen=True)
class Shapes:
    """Dimensions of one input of an engine: the smallest, those it is tuned for, and the largest."""

    smallest: Sequence[int]
    usual: Sequence[int]
    largest: Sequence[int]


def check_precision(target: str, precision: str) -> None:
    """Raise `ExportError` unless the target has the precision."""
    if target == "tensorrt" and precision not in PRECISIONS:
        raise ExportError(f"The target tensorrt has no {precision}.", f"Give --precision {' or '.join(PRECISIONS)}.")


def graph_precision(target: str, precision: str) -> str:
    """Precision of the graph in the file: TensorRT makes its own fp16 of an fp32 graph when it builds the engine."""
    return "fp32" if target == "tensorrt" else precision


def require_tensorrt() -> None:
    """Raise `EngineError`, which names the container that has it, where no engine can be built."""
    _tensorrt()
    _gpu()


def manifest(engine: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The manifest's keys about TensorRT. ``engine``: what `build_plan` returned, None where the first load builds."""
    return {"status": STATUS, "engine": engine, "generated": [] if engine else ["engine"]}


def build_plan(
    onnx_path: Path,
    plan_path: Path,
    profile: Mapping[str, Shapes],
    fp16: bool = True,
) -> dict[str, str]:
    """Build a TensorRT engine for this machine's GPU, as Triton's ``tensorrt_plan`` models need it.

    Args:
        onnx_path: a graph of standard operators; its external data is read from beside it.
        plan_path: where the serialized engine goes (``model.plan``), under a temporary name until it is whole.
        profile: every input with a dimension that is not fixed.
        fp16: let TensorRT choose fp16 kernels for a graph in fp32.

    Returns:
        The manifest's ``engine`` block: gpu, compute_capability, driver, tensorrt and cuda as text.

    Raises:
        EngineError: no TensorRT, no GPU, or TensorRT refuses the graph; the message says which and what to do.
    """
    trt = _tensorrt()
    gpu = _gpu()
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(0)  # the batch has been explicit in every network since TensorRT 10
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        reasons = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise EngineError(f"TensorRT {trt.__version__} cannot read the graph: {reasons}.", "Export with --target onnx.")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    if fp16:
        _allow_fp16(trt, config)
    shapes = builder.create_optimization_profile()
    for name, given in profile.items():
        shapes.set_shape(name, tuple(given.smallest), tuple(given.usual), tuple(given.largest))
    config.add_optimization_profile(shapes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(
            f"TensorRT {trt.__version__} could not build an engine; it has said why above.",
            "Free memory on the GPU or give a smaller --max-len, or export with --target onnx.",
        )
    _write(plan_path, plan)
    return {**gpu, "tensorrt": str(trt.__version__), "cuda": _cuda_version()}


def _tensorrt() -> Any:
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise EngineError(
            f"Building an engine needs TensorRT, which is not installed here; the container {CONTAINER} has it.",
            f"Run there: docker run --rm --gpus all -v $PWD:/work -w /work {CONTAINER} bash -c "
            "\"pip install '.[export]' && truthgpt export MODEL --target tensorrt --serve-with native\"",
        ) from error


def _allow_fp16(trt: Any, config: Any) -> None:
    flag = getattr(trt.BuilderFlag, "FP16", None)
    if flag is None:  # since TensorRT 11 a graph itself says which tensors are fp16
        raise EngineError(
            f"TensorRT {trt.__version__} makes no fp16 engine of an fp32 graph.",
            f"Use TensorRT 10, as in {CONTAINER}, or export with --precision fp32.",
        )
    config.set_flag(flag)


def _gpu() -> dict[str, str]:
    """The first GPU's name, compute capability and driver."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_S, check=True)  # noqa: S603 (no shell)
        name, capability, driver = (part.strip() for part in done.stdout.splitlines()[0].rsplit(",", 2))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
        raise EngineError(
            "An engine is built for the GPU that runs it, and there is no NVIDIA GPU here.",
            "Export on the machine that will serve, with the GPU visible (docker run --gpus all).",
        ) from error
    return {"gpu": name, "compute_capability": capability, "driver": driver}


def _cuda_version() -> str:
    import torch

    return str(torch.version.cuda or "unknown")


def _write(path: Path, data: Any) -> None:
    fresh = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        fresh.write_bytes(data)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
