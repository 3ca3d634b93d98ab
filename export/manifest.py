"""What an entry says about itself: ``config.pbtxt`` for Triton and ``manifest.json`` for everybody else."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"
TASK = "text_generation"

# Tensor names and types are those of Triton's vLLM backend (CONTRIBUTING explains why): name, type, dims, optional.
_INPUTS = (
    ("text_input", "TYPE_STRING", 1, False),
    ("stream", "TYPE_BOOL", 1, True),
    ("sampling_parameters", "TYPE_STRING", 1, True),
    ("exclude_input_in_output", "TYPE_BOOL", 1, True),
    ("return_finish_reason", "TYPE_BOOL", 1, True),
    ("return_logprobs", "TYPE_BOOL", 1, True),
    ("return_num_input_tokens", "TYPE_BOOL", 1, True),
    ("return_num_output_tokens", "TYPE_BOOL", 1, True),
    ("return_num_cached_tokens", "TYPE_BOOL", 1, True),
)
_OUTPUTS = (
    ("text_output", "TYPE_STRING", -1),
    ("finish_reason", "TYPE_STRING", -1),
    ("logprobs", "TYPE_STRING", -1),
    ("num_input_tokens", "TYPE_UINT32", 1),
    ("num_output_tokens", "TYPE_UINT32", -1),
    ("num_cached_tokens", "TYPE_UINT32", 1),
)


@dataclass(frozen=True)
class Serving:
    """How the backend shall run the model: concurrent sequences, tokens a prefill step, queued requests, threads (0: as
    many as there are cores), memory for prefixes that prompts share, milliseconds that a token of a running answer
    should take at most while prompts are read (0: no target), and whether answers may be guessed ahead (auto or off).
    """

    slots: int = 16
    prefill_chunk: int = 512
    max_queue: int = 256
    threads: int = 0
    prefix_cache_mb: int = 256
    token_target_ms: int = 150
    speculation: str = "auto"


def config_pbtxt(
    name: str, precision: str, max_len: int, chat: bool, serving: Serving, device: str = "auto"
) -> str:
    """Triton's model configuration (https://github.com/triton-inference-server/common, model_config.proto)."""
    parameters = {
        "task": TASK,
        "chat": str(chat).lower(),
        "precision": precision,
        "max_len": str(max_len),
        "slots": str(serving.slots),
        "prefill_chunk": str(serving.prefill_chunk),
        "max_queue": str(serving.max_queue),
        "threads": str(serving.threads),
        "device": device,
        "prefix_reuse": str(serving.prefix_cache_mb > 0).lower(),
        "prefix_cache_mb": str(serving.prefix_cache_mb),
        "token_target_ms": str(serving.token_target_ms),
        "speculation": serving.speculation,
        "default_max_tokens": "",
    }
    inputs = [
        f'  {{ name: "{tensor}" data_type: {kind} dims: [ {dims} ]{" optional: true" if optional else ""} }}'
        for tensor, kind, dims, optional in _INPUTS
    ]
    outputs = [f'  {{ name: "{tensor}" data_type: {kind} dims: [ {dims} ] }}' for tensor, kind, dims in _OUTPUTS]
    return "\n".join(
        [
            f'name: "{name}"',
            'backend: "inflight"',
            "max_batch_size: 0",
            "model_transaction_policy { decoupled: true }",
            "input [",
            ",\n".join(inputs),
            "]",
            "output [",
            ",\n".join(outputs),
            "]",
            "instance_group [ { kind: KIND_CPU count: 1 } ]",
            *(f'parameters {{ key: "{key}" value: {{ string_value: "{text}" }} }}' for key, text in parameters.items()),
            "",
        ]
    )


def write_manifest(folder: Path, body: dict[str, Any]) -> None:
    """Write ``manifest.json`` over the version folder's other files, whose hashes and sizes it records."""
    files = {
        path.name: {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    manifest = {
        "format": FORMAT,
        **body,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": files,
        "tools": tool_versions(),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tool_versions() -> dict[str, str]:
    """Versions of what made the entry."""
    names = ("truthgpt", "torch", "transformers", "onnx", "onnxruntime")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
