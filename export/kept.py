"""What a new version keeps of the config.pbtxt that it takes the place of.

The file is a model's, not a version's. Values that `truthgpt tune` has found, or people have written, would be lost by
every export; so those that are about speed alone stay, unless the command says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from export.encoder_config import INSTANCES, MAX_TEXTS, NATIVE_INSTANCES, EncoderServing
from export.manifest import Serving
from export.repository import CONFIG

DECODER = {"slots": (1, 1024), "prefill_chunk": (1, 8192), "threads": (0, 1024),
           "prefix_cache_mb": (0, 1 << 20), "token_target_ms": (0, 60_000)}  # fmt: skip
ENCODER = {"max_tokens_per_batch": (64, 1_000_000), "threads": (0, 1024), "instances": (1, 1024),
           "queue_delay_us": (0, 60_000_000), "max_texts": (1, 4096)}  # fmt: skip

_S = TypeVar("_S", Serving, EncoderServing)
_COMMENT = re.compile(r"\"(?:[^\"\\\n]|\\.)*\"|#[^\n]*")
_PARAMETER = r'key\s*:\s*"%s"\s*[,;]?\s*value\s*:?\s*\{\s*string_value\s*:\s*"(\d{1,9})"'
_FIELDS = {
    "instances": r"\binstance_group\s*:?\s*\[\s*\{[^{}\]]*?\bcount\s*:\s*(\d{1,9})[^{}\]]*\}\s*\]",
    "queue_delay_us": r"\bmax_queue_delay_microseconds\s*:\s*(\d{1,9})\b",
    "max_texts": r"\bmax_batch_size\s*:\s*(\d{1,9})\b",
}
_PREFERRED = r"\bpreferred_batch_size\s*:\s*\[\s*(\d{1,4}(?:\s*,\s*\d{1,4})*)\s*\]"


def decoder(root: Path, name: str, serving: Serving, given: Collection[str]) -> tuple[Serving, str]:
    """The settings with what is kept, and a sentence about that. ``given``: fields that the command names."""
    return _kept(_numbers(_text(root / name / CONFIG, "inflight"), DECODER), serving, Serving(), given)


def encoder(
    root: Path, name: str, serving: EncoderServing, given: Collection[str], native: bool
) -> tuple[EncoderServing, str]:
    """The same for an encoder. ``native``: its graph is run by another entry, with which it shares its batch size."""
    text = _text(root / name / CONFIG, "encoder")
    found: dict[str, Any] = _numbers(text, ENCODER)
    if native:
        found.pop("max_texts", None)
    if found.get("instances") == (NATIVE_INSTANCES if native else INSTANCES):
        del found["instances"]
    preferred = re.search(_PREFERRED, text)
    if preferred is not None:
        sizes = tuple(int(size) for size in preferred[1].split(","))
        if all(1 <= size <= found.get("max_texts", MAX_TEXTS) for size in sizes):
            found["preferred"] = sizes
    return _kept(found, serving, EncoderServing(), given)


def _kept(found: Mapping[str, Any], serving: _S, default: _S, given: Collection[str]) -> tuple[_S, str]:
    kept = {
        field: value for field, value in found.items()
        if field not in given and getattr(serving, field) == getattr(default, field) != value
    }  # fmt: skip
    if not kept:
        return serving, ""
    told = ", ".join(f"{field} {' '.join(map(str, v)) if isinstance(v, tuple) else v}" for field, v in kept.items())
    return replace(serving, **kept), f"kept from the former {CONFIG}: {told}"


def _text(path: Path, backend: str) -> str:
    """The file without its comments; empty where it is not there, cannot be read or is another backend's."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    text = _COMMENT.sub(lambda match: "" if match[0].startswith("#") else match[0], text)
    return text if re.search(rf'\bbackend\s*:\s*"{backend}"', text) else ""


def _numbers(text: str, ranges: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Those values that are there and within their limits."""
    found = {}
    for field, (low, high) in ranges.items():
        match = re.search(_FIELDS.get(field, _PARAMETER % field), text)
        if match is not None and low <= int(match[1]) <= high:
            found[field] = int(match[1])
    return found
