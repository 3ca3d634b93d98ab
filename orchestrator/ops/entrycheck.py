"""Whether one model repository entry can be served: files, manifest and config.pbtxt say the same. Needs no server."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from orchestrator import pbtxt
from orchestrator.models import Entry, ModelsError, Version, parameters

FORMAT = 1
BACKEND = "inflight"
CHUNK_BYTES = 1 << 20
REQUIRED_FILES = ("model.onnx", "tokenizer.json")
# The tensor contract: docs/protocol.md.
INPUTS = {
    "text_input": "TYPE_STRING", "stream": "TYPE_BOOL", "sampling_parameters": "TYPE_STRING",
    "exclude_input_in_output": "TYPE_BOOL", "return_finish_reason": "TYPE_BOOL", "return_logprobs": "TYPE_BOOL",
    "return_num_input_tokens": "TYPE_BOOL", "return_num_output_tokens": "TYPE_BOOL",
}  # fmt: skip
OUTPUTS = {
    "text_output": "TYPE_STRING", "finish_reason": "TYPE_STRING", "logprobs": "TYPE_STRING",
    "num_input_tokens": "TYPE_UINT32", "num_output_tokens": "TYPE_UINT32",
}  # fmt: skip
# Declared by entries whose engine keeps what it has read of prompts; both or neither.
CACHED = ("return_num_cached_tokens", "num_cached_tokens")
INPUTS_MAY = {CACHED[0]: "TYPE_BOOL"}
OUTPUTS_MAY = {CACHED[1]: "TYPE_UINT32"}
ENCODER = "encoder"  # the backend of models that embed or classify, whose texts Triton itself batches
ENCODER_INPUTS = {"text_input": "TYPE_STRING"}
NATIVE = ("onnxruntime", "tensorrt")  # Triton's own backends, which run an encoder's graph for the entry in front
_OF_ENCODERS = {"num_input_tokens": "TYPE_UINT32", "heartbeat": "TYPE_STRING"}
ENCODER_OUTPUTS: dict[str | None, dict[str, str]] = {
    "embeddings": {"embedding": "TYPE_FP32", **_OF_ENCODERS},
    "sentiment_analysis": {"scores": "TYPE_FP32", "label": "TYPE_STRING", **_OF_ENCODERS},
}
_RANGES = {
    "slots": (1, 1024), "prefill_chunk": (1, 65_536), "max_queue": (1, 100_000), "threads": (0, 1024),
    "gpu_memory_limit_mb": (0, 1 << 24), "prefix_cache_mb": (0, 1 << 24),
}  # fmt: skip
DEVICES = ("auto", "cpu", "cuda")


def problems(entry: Entry, version: Version | None = None) -> list[str]:
    """A sentence for everything that is wrong with an entry (its newest version unless another is given)."""
    version = version or entry.newest
    if version.manifest is None:
        return [f"{version.folder / 'manifest.json'} cannot be read: {version.fault}"]
    manifest = version.manifest
    return [*of_manifest(entry, version, manifest), *of_files(version.folder, manifest), *of_config(entry, manifest)]


def of_manifest(entry: Entry, version: Version, manifest: Mapping[str, Any]) -> list[str]:
    path = version.folder / "manifest.json"
    found = []
    if manifest.get("format") != FORMAT:
        found.append(f"{path} has format {manifest.get('format')!r}, this version of truthgpt reads {FORMAT}")
    for key, expected in (("name", entry.name), ("version", str(version.number))):
        if str(manifest.get(key)) != expected:
            found.append(f"{path} is about {key} {manifest.get(key)!r}, its folder about {expected!r}")
    return found


def of_files(
    folder: Path, manifest: Mapping[str, Any], advance: Callable[[int], object] = lambda count: None
) -> list[str]:
    """What is damaged, missing or there without being listed. `advance` is told of the bytes that have been hashed.

    `generated` in a manifest names the files and folders that a backend makes by itself beside the listed ones.
    """
    files = manifest.get("files")
    if not isinstance(files, dict):
        return [f"{folder / 'manifest.json'} lists no files"]
    missing = [name for name in _required(manifest) if name not in files]
    found = [f"{folder / 'manifest.json'} does not list {name}" for name in missing]
    template = manifest.get("chat_template")
    if template is not None and template not in files:
        found.append(f"{folder / 'manifest.json'} does not list its chat template {template!r}")
    for name, facts in files.items():
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            found.append(f"{folder / 'manifest.json'} lists {name!r}, which leads out of the folder")
            continue
        expected = facts.get("sha256") if isinstance(facts, dict) else None
        try:
            digest = _sha256(folder / name, advance)
        except OSError as error:
            found.append(f"{folder / name} cannot be read: {error.strerror}")
            continue
        if digest != expected:
            found.append(f"{folder / name} is damaged: its SHA-256 is not the manifest's")
    generated = manifest.get("generated")
    known = {"manifest.json", *files, *(generated if isinstance(generated, list) else ())}
    return found + [f"{folder / name} is not in the manifest" for name in _present(folder) if not _among(name, known)]


def _required(manifest: Mapping[str, Any]) -> list[str]:
    # An encoder that Triton itself runs is two entries: one has the graph, the other, which it serves, the tokenizer.
    spared = {"model.onnx": manifest.get("served_by"), "tokenizer.json": manifest.get("graph_only")}
    planned = manifest.get("graph_only") and manifest.get("target") == "tensorrt"
    return ["model.plan"] if planned else [name for name in REQUIRED_FILES if not spared[name]]


def _sha256(path: Path, advance: Callable[[int], object]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            digest.update(data)
            advance(len(data))
    return digest.hexdigest()


def _present(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def _among(name: str, known: Collection[str]) -> bool:
    """Whether a file or one of the folders that it lies in is known."""
    path = PurePosixPath(name)
    return any(str(one) in known for one in (path, *path.parents))


def of_config(entry: Entry, manifest: Mapping[str, Any]) -> list[str]:
    """Whether config.pbtxt can be read, and agrees with the manifest and with what its backend can do."""
    try:
        config = entry.config()
    except ModelsError as error:
        return [str(error)]
    return [f"{entry.config_path}: {what}" for what in _config(entry, config, manifest)]


def _config(entry: Entry, config: pbtxt.Message, manifest: Mapping[str, Any]) -> list[str]:
    backend = _last(config, "backend", None)
    if backend == ENCODER:
        return _encoder_config(entry, config, manifest)
    if backend in NATIVE:  # its tensors are the graph's, which Triton checks
        return [] if _last(config, "name", entry.name) == entry.name else [f"name must be {entry.name!r}"]
    found = []
    for key, expected in (("name", entry.name), ("backend", BACKEND), ("max_batch_size", 0)):
        value = _last(config, key, entry.name if key == "name" else None)
        if value != expected:
            found.append(f"{key} is {value!r} and must be {expected!r}")
    policy = _last(config, "model_transaction_policy", {})
    if not isinstance(policy, dict) or _last(policy, "decoupled", False) is not True:
        found.append("model_transaction_policy must say decoupled: true")
    found += [*_tensors(config, "input", INPUTS, INPUTS_MAY), *_tensors(config, "output", OUTPUTS, OUTPUTS_MAY)]
    has = [name in _names(config, field) for name, field in zip(CACHED, ("input", "output"), strict=True)]
    if any(has) and not all(has):
        found.append(f"input {CACHED[0]} and output {CACHED[1]} must be there both or neither")
    return found + _parameters(parameters(config), manifest)


def _encoder_config(entry: Entry, config: pbtxt.Message, manifest: Mapping[str, Any]) -> list[str]:
    given, found = parameters(config), []
    name, size, policy = (_last(config, key, None) for key in ("name", "max_batch_size", "model_transaction_policy"))
    if name not in (None, entry.name):
        found.append(f"name is {name!r} and must be {entry.name!r}")
    if not isinstance(size, int) or size < 1:
        found.append(f"max_batch_size is {size!r} and must be at least 1")
    if isinstance(policy, dict) and _last(policy, "decoupled", False):
        found.append("model_transaction_policy must not say decoupled: true")
    outputs = ENCODER_OUTPUTS.get(given.get("task"))
    if outputs is None:
        tasks = " or ".join(str(task) for task in ENCODER_OUTPUTS)
        return [*found, f"parameter task is {given.get('task')!r} and must be {tasks}"]
    found += [*_tensors(config, "input", ENCODER_INPUTS), *_tensors(config, "output", outputs)]
    return found + _parameters(given, manifest)


def _tensors(
    config: pbtxt.Message, field: str, tensors: Mapping[str, str], may: Mapping[str, str] | None = None
) -> list[str]:  # fmt: skip
    """What is wrong with the tensors of a field, of which some `may` be there and the others must."""
    have = _names(config, field)
    wanted = {**tensors, **{name: kind for name, kind in (may or {}).items() if name in have}}
    found = [f"{field} {name} must be {kind}" for name, kind in wanted.items() if have.get(name) != kind]
    return found + [f"{field} {name} is not known" for name in have if name not in wanted]


def _names(config: pbtxt.Message, field: str) -> dict[str, str]:
    """The data type of each tensor of a field, by its name."""
    rows = [row for row in config.get(field, []) if isinstance(row, dict)]
    return {str(_last(row, "name", "")): str(_last(row, "data_type", "")) for row in rows}


def _parameters(given: Mapping[str, str], manifest: Mapping[str, Any]) -> list[str]:
    found = []
    chat = "true" if manifest.get("chat_template") else "false"
    for key, expected in (("task", manifest.get("task")), ("precision", manifest.get("precision")), ("chat", chat)):
        if key in given and given[key] != expected:
            found.append(f"parameter {key} is {given[key]!r}, the manifest says {expected!r}")
    if given.get("device", "auto") not in DEVICES:
        found.append(f"parameter device is {given['device']!r} and must be one of {', '.join(DEVICES)}")
    if given.get("prefix_reuse", "true") not in ("true", "false"):
        found.append(f"parameter prefix_reuse is {given['prefix_reuse']!r} and must be true or false")
    graph = manifest.get("graph")
    length = graph.get("max_len") if isinstance(graph, dict) else None
    ranges = _RANGES | ({"max_len": (1, length)} if isinstance(length, int) else {})
    for key, (low, high) in ranges.items():
        text = given.get(key, "")
        if text and not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            found.append(f"parameter {key} is {text!r} and must be a whole number from {low} to {high}")
    return found


def _last(message: Mapping[str, list[Any]], key: str, default: Any) -> Any:
    values = message.get(key)
    return values[-1] if values else default
