"""TensorRT under ONNX Runtime: the provider's options for an entry, and whose engines lie in its folder `engine/`.

Engines are built when an entry is loaded first, which takes minutes, and kept with their timings in the entry. They
belong to the GPU, the TensorRT and the ONNX Runtime that built them: `engine/engine.json` says which, with every
file's SHA-256, and engines of another machine are refused before TensorRT reads them.

Not yet verified on hardware: written against the provider's documentation and the options that onnxruntime-gpu 1.31
names. Source: https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime as ort

from .devices import CPU, CUDA, CUDA_PROVIDER, ON_CPU, Placement, cuda_fault, cuda_options
from .entry import EntryError

PROVIDER = "TensorrtExecutionProvider"
TENSORRT = "tensorrt"  # what the heartbeat calls it
FOLDER, RECORD = "engine", "engine.json"
WORKSPACE_BYTES = 4 << 30
_SMI_S = 10.0
_LIBRARIES = ("libnvinfer.so.10", "libnvinfer.so.11")  # onnxruntime-gpu 1.31 is linked against the first
CONTAINER = "nvcr.io/nvidia/tritonserver:25.10-py3"


@dataclass(frozen=True)
class Machine:
    """What an engine depends on. `gpus`: (name, compute capability, driver) of each that CUDA shows, by its device ids;
    None: not to be found out.
    """

    gpus: tuple[tuple[str, str, str], ...]
    tensorrt: str | None
    onnxruntime: str


def this_machine() -> Machine:
    """Asks nvidia-smi (10 s at most; without an answer there is no GPU) and TensorRT's library."""
    return Machine(_gpus(), _tensorrt_version(), ort.__version__)


def tensorrt_fault() -> str | None:
    """Why TensorRT cannot be used here, with what to do about it; None when its provider and its library are here."""
    if PROVIDER not in ort.get_available_providers():
        return "this ONNX Runtime has no TensorRT provider: install onnxruntime-gpu in place of onnxruntime"
    if _tensorrt_version() is None:
        return (
            f"TensorRT is not found ({' or '.join(_LIBRARIES)}): put its folder on LD_LIBRARY_PATH, or use {CONTAINER}"
        )
    return None


def is_for_tensorrt(folder: Path) -> bool:
    """Whether the version folder of an entry was exported for TensorRT."""
    return _manifest(folder).get("target") == "tensorrt"


def tensorrt_provider(folder: Path, slots: int, prefill_chunk: int, device_id: int = 0) -> tuple[str, dict[str, str]]:
    """The provider's name and options for the version folder of an entry that is for TensorRT.

    One profile covers decode steps (up to `slots` rows of one token, which it is tuned for) and chunks of prefill: a
    shape outside it would have the engine built anew in the middle of a request. Raises EntryError when the manifest
    does not say what the graph's caches are.
    """
    manifest = _manifest(folder)
    try:
        # past_* inputs and their dimensions behind the rows: [kv_heads, max_len, head_dim]
        caches = {str(name): [int(size) for size in shape] for name, shape in manifest["graph"]["caches"].items()}
        fp16 = manifest["precision"] == "fp16"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EntryError(f"{folder / 'manifest.json'} lacks {error!r} for TensorRT; export the model again") from error
    engine = folder / FOLDER
    with contextlib.suppress(OSError):  # a read-only repository: built at each load
        engine.mkdir(exist_ok=True)
    keep = "1" if os.access(engine, os.W_OK | os.X_OK) or (engine / RECORD).exists() else "0"
    options = {
        "device_id": str(device_id),
        "trt_fp16_enable": str(int(fp16)),
        "trt_layer_norm_fp32_fallback": str(int(fp16)),  # the squares of a norm overflow fp16
        "trt_max_workspace_size": str(WORKSPACE_BYTES),
        # The scatters stay outside: the CUDA provider writes the cache in place, an engine would copy all of it.
        "trt_op_types_to_exclude": "ScatterElements",
        "trt_engine_cache_enable": keep,
        "trt_timing_cache_enable": keep,
        "trt_profile_min_shapes": _shapes(caches, 1, 1),
        "trt_profile_opt_shapes": _shapes(caches, slots, 1),
        "trt_profile_max_shapes": _shapes(caches, slots, prefill_chunk),
    }
    if keep == "1":
        options |= {"trt_engine_cache_path": str(engine), "trt_timing_cache_path": str(engine)}
    return PROVIDER, options


def place_for_tensorrt(
    folder: Path,
    device: str,
    slots: int,
    prefill_chunk: int,
    device_id: int = 0,
    memory_limit_mb: int = 0,
    fault: Callable[[int], str | None] | None = None,
) -> Placement:
    """Where an entry for TensorRT runs whose config.pbtxt says `device`: by TensorRT where a GPU and it are here.

    What TensorRT leaves out, the scatters into the cache, CUDA runs. The same graph runs on the CPU too: slowly, and
    right. Raises EntryError where cuda was asked for and cannot be had.
    """
    if device == CPU:
        return ON_CPU
    why = (fault or _fault)(device_id)
    if why is None:
        providers = (
            tensorrt_provider(folder, slots, prefill_chunk, device_id),
            (CUDA_PROVIDER, cuda_options(device_id, memory_limit_mb)),
            *ON_CPU.providers,
        )
        return Placement(TENSORRT, CUDA, device_id, providers)
    if device == "auto":
        return replace(ON_CPU, note=why)
    raise EntryError(f"config.pbtxt: parameter device is cuda, but {why}; or set device to auto or cpu")


def _fault(device_id: int) -> str | None:
    return tensorrt_fault() or cuda_fault(device_id)


def check_engine(folder: Path, machine: Machine | None = None) -> None:
    """Refuse engines of another machine and damaged ones; remove what a load that did not end has left.

    Raises EntryError, which says how to have engines built here.
    """
    engine = folder / FOLDER
    if not engine.is_dir():
        return
    again = f"remove {engine}: the next load builds engines for this machine"
    files: dict[str, Any] = {}
    if (engine / RECORD).exists():
        try:
            record = json.loads((engine / RECORD).read_text(encoding="utf-8"))
            files, built = dict(record["files"]), {key: str(record[key]) for key in ("gpu", "compute_capability")}
            versions = {key: str(record[key]) for key in ("tensorrt", "onnxruntime")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EntryError(f"{engine / RECORD} cannot be read ({error!r}); {again}") from error
        machine = machine or this_machine()
        if (built["gpu"], built["compute_capability"]) not in [gpu[:2] for gpu in machine.gpus]:
            have = ", ".join(f"{name} ({capability})" for name, capability, _ in machine.gpus) or "no NVIDIA GPU"
            raise EntryError(
                f"{engine} holds engines for {built['gpu']} ({built['compute_capability']}), this machine has {have}; "
                + again
            )
        for name, here in (("tensorrt", machine.tensorrt), ("onnxruntime", machine.onnxruntime)):
            if here is not None and versions[name] != here:
                raise EntryError(f"{engine} holds engines made by {name} {versions[name]}, here is {here}; {again}")
    for name, digest in files.items():
        try:
            good = _sha256(engine / name) == digest
        except OSError:
            good = False
        if not good:
            raise EntryError(f"{engine / name} is missing or damaged: its SHA-256 is not the record's; {again}")
    with contextlib.suppress(OSError):
        for path in engine.iterdir():
            if path.name not in files and path.name != RECORD:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def record_engine(folder: Path, device_id: int = 0, machine: Machine | None = None) -> None:
    """Write `engine/engine.json` once a session has been made and run, so that its engines are complete.

    Does nothing where engines are recorded already, where none were kept, where the GPU cannot be named, or where
    nothing can be written: the next load builds them again.
    """
    engine = folder / FOLDER
    if (engine / RECORD).exists() or not engine.is_dir():
        return
    try:
        files = {path.name: _sha256(path) for path in sorted(engine.iterdir()) if path.is_file()}
    except OSError:
        return
    machine = machine or this_machine()
    if not files or len(machine.gpus) <= device_id:
        return
    name, capability, driver = machine.gpus[device_id]
    record = {
        "gpu": name,
        "compute_capability": capability,
        "driver": driver,
        "tensorrt": machine.tensorrt or "unknown",
        "onnxruntime": machine.onnxruntime,
        "cuda": _cuda_version(),
        "files": files,
    }
    fresh = engine / f".{RECORD}-{os.getpid()}"
    try:
        fresh.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        fresh.replace(engine / RECORD)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise EntryError(f"{folder / 'manifest.json'} cannot be read ({error}); export the model again") from error


def _shapes(caches: Mapping[str, Sequence[int]], rows: int, seq: int) -> str:
    shapes = {"input_ids": (rows, seq), "position_ids": (rows, seq), "seqlens_k": (rows,), "last_index": (rows, 1)}
    shapes |= {name: (rows, *shape) for name, shape in caches.items()}
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def _gpus() -> tuple[tuple[str, str, str], ...]:
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version,uuid", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_S, check=True)  # noqa: S603 (no shell)
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [tuple(part.strip() for part in line.rsplit(",", 3)) for line in done.stdout.splitlines()]
    return visible([(row[0], row[1], row[2], row[3]) for row in rows if len(row) == 4])


def visible(gpus: Sequence[tuple[str, str, str, str]]) -> tuple[tuple[str, str, str], ...]:
    """Of nvidia-smi's (name, compute capability, driver, UUID) those that CUDA_VISIBLE_DEVICES shows, in its order.

    It has numbers or beginnings of UUIDs; what it says behind one that is none is not read. A MIG instance, which has
    a UUID of its own, is of the GPU that there is, where all are alike.
    Source: https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html#env-vars
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return tuple(gpu[:3] for gpu in gpus)
    found = []
    for wanted in (part.strip() for part in chosen.split(",")):
        if wanted.isdecimal():
            matching = list(gpus[int(wanted) : int(wanted) + 1])
        elif wanted.startswith("MIG-"):
            matching = list(gpus[:1]) if len({gpu[:3] for gpu in gpus}) == 1 else []
        else:
            matching = [gpu for gpu in gpus if wanted and gpu[3].startswith(wanted)]
        if len(matching) != 1:
            break
        found.append(matching[0][:3])
    return tuple(found)


def _tensorrt_version() -> str | None:
    for name in _LIBRARIES:
        try:
            number = int(ctypes.CDLL(name).getInferLibVersion())
        except (OSError, AttributeError):
            continue
        return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"
    return None


def _cuda_version() -> str:
    from onnxruntime.capi import build_and_package_info as info

    return str(getattr(info, "cuda_version", "unknown"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
