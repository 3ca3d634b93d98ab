"""What a model repository entry says about itself: config.pbtxt's parameters and the version's manifest.json, checked
before use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
DEVICES = ("auto", "cpu", "cuda")
SPECULATION = ("off", "auto")


class EntryError(Exception):
    """The entry cannot be served; the message says which file or value is wrong and what to do."""


@dataclass(frozen=True)
class Graph:
    """What the engine has to know of the decoder before it is opened; the shapes of the slots are the session's.
    `max_len` counts positions; `kv_dtype` is float32, float16, bfloat16 or int8.
    """

    max_len: int
    vocab_size: int
    kv_dtype: str


@dataclass(frozen=True)
class Entry:
    """One version folder and how to run it. `digest` is the SHA-256 of its manifest, which names every other file's."""

    folder: Path
    digest: str
    graph: Graph
    eos: frozenset[int]
    bos_token: str
    eos_token: str
    chat_template: str | None
    slots: int
    prefill_chunk: int
    max_queue: int
    threads: int
    default_max_tokens: int | None
    step_delay_s: float
    device: str  # auto, cpu or cuda
    precision: str
    prefix_cache_bytes: int  # 0: prefixes are not reused
    token_target_s: float  # 0: none
    speculation: bool
    gpu_memory_limit_mb: int  # of the session's arena, without the slots; 0: no limit


def load(folder: Path, parameters: Mapping[str, str]) -> Entry:
    """Read one version folder. `parameters` are config.pbtxt's. Raises EntryError; every file's SHA-256 is checked."""
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    try:
        graph, tokens = manifest["graph"], manifest["tokens"]
        shape = Graph(int(graph["max_len"]), int(graph["vocab_size"]), str(graph.get("kv_dtype") or "float32"))
        template = manifest.get("chat_template")
        default = integer(parameters, "default_max_tokens", 0, 10_000_000, 0)
        return Entry(
            folder=folder,
            digest=hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()[:32],
            graph=shape,
            eos=frozenset(int(t) for t in tokens["eos"]),
            bos_token=str(tokens.get("bos_token") or ""),
            eos_token=str(tokens.get("eos_token") or ""),
            chat_template=(folder / template).read_text(encoding="utf-8") if template else None,
            slots=integer(parameters, "slots", 1, 1024, 16),
            prefill_chunk=integer(parameters, "prefill_chunk", 1, 65_536, 128),
            max_queue=integer(parameters, "max_queue", 1, 100_000, 256),
            threads=integer(parameters, "threads", 0, 1024, 0),
            default_max_tokens=default or None,
            step_delay_s=integer(parameters, "step_delay_ms", 0, 60_000, 0) / 1000,
            device=_choice(parameters, "device", DEVICES),
            precision=str(manifest.get("precision") or ""),
            prefix_cache_bytes=_prefix_cache_mb(parameters) << 20,
            token_target_s=integer(parameters, "token_target_ms", 0, 60_000, 0) / 1000,
            speculation=_choice(parameters, "speculation", SPECULATION) == "auto",
            gpu_memory_limit_mb=integer(parameters, "gpu_memory_limit_mb", 0, 1 << 24, 0),
        )
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise EntryError(
            f"{folder / 'manifest.json'} is not a manifest this backend can read: {error!r}; export the model again"
        ) from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """A version folder's manifest.json. Raises EntryError unless it is of this format."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EntryError(f"{path} cannot be read ({error}); export the model again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise EntryError(
            f"{path} has a format other than {FORMAT}: export the model again with this version of truthgpt"
        )
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare every file with the SHA-256 that the manifest names. Raises EntryError."""
    for name, facts in dict(manifest.get("files") or {}).items():
        path = folder / name
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise EntryError(f"{path} is missing or unreadable ({error}); export the model again") from error
        if digest != facts.get("sha256"):
            raise EntryError(f"{path} is damaged: its SHA-256 is not the manifest's; export the model again")


def integer(parameters: Mapping[str, str], name: str, low: int, high: int, default: int) -> int:
    """One of config.pbtxt's parameters. Raises EntryError naming it and its limits."""
    raw = parameters.get(name) or str(default)
    try:
        value = int(raw)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise EntryError(f"config.pbtxt: parameter {name} must be an integer from {low} to {high}, not {raw!r}")
    return value


def _prefix_cache_mb(parameters: Mapping[str, str]) -> int:
    size = integer(parameters, "prefix_cache_mb", 0, 1 << 20, 0)
    return size if _choice(parameters, "prefix_reuse", ("false", "true")) == "true" else 0


def _choice(parameters: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    """One of `choices`, the first by default."""
    value = parameters.get(name) or choices[0]
    if value not in choices:
        raise EntryError(f"config.pbtxt: parameter {name} must be one of {', '.join(choices)}, not {value!r}")
    return value
