"""A model's manifest and batching settings in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.models import Version


def lines(version: Version, manifest: Mapping[str, Any], parameters: Mapping[str, str], state: str) -> list[str]:
    """What `truthgpt models show` prints. What the manifest does not say is left out."""
    rows: list[tuple[str, str]] = [
        ("state", state),
        ("task", f"{manifest.get('task')}, {_apis(manifest)}"),
        ("model", f"{manifest.get('architecture')}, {manifest.get('precision')}{_shape(_part(manifest, 'graph'))}"),
        ("source", _source(_part(manifest, "source"))),
        ("length", f"{_part(manifest, 'limits').get('max_len', '?')} tokens, prompt and answer together"),
        ("parity", _parity(_part(manifest, "parity"))),
        ("batching", _batching(parameters)),
        ("files", _files(_part(manifest, "files"))),
        ("exported", _exported(manifest)),
        ("path", str(version.folder)),
    ]
    title = f"{version.name} version {version.number}"
    return [title, *(f"  {name:<9} {text}" for name, text in rows if text)]


def _part(manifest: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = manifest.get(key)
    return value if isinstance(value, dict) else {}


def _apis(manifest: Mapping[str, Any]) -> str:
    return "chat and completions" if manifest.get("chat_template") else "completions only"


def _shape(graph: Mapping[str, Any]) -> str:
    named = {"layers": "layers", "kv_heads": "key/value heads", "head_dim": "wide each", "vocab_size": "tokens known"}
    return "".join(f", {graph[key]} {words}" for key, words in named.items() if key in graph)


def _source(source: Mapping[str, Any]) -> str:
    if not source:
        return ""
    revision = f", revision {source['revision']}" if source.get("revision") else ""
    digest = f", weights SHA-256 {str(source['sha256'])[:16]}…" if source.get("sha256") else ""
    return f"{source.get('id', 'unknown')}{revision}{digest}"


def _parity(parity: Mapping[str, Any]) -> str:
    parts = []
    if "max_abs_logit_diff" in parity:
        parts.append(f"logits differ from transformers' by at most {_number(parity['max_abs_logit_diff'])}")
    if "rms_over_std" in parity:
        parts.append(f"by {_number(parity['rms_over_std'])} of their spread on average")
    if "greedy_agreement" in parity:
        parts.append(f"{float(parity['greedy_agreement']):.1%} of greedy tokens are the same")
    if "batch_effect" in parity:
        parts.append(f"what else is in the batch moves them by {_number(parity['batch_effect'])}")
    return ", ".join(parts)


def _batching(parameters: Mapping[str, str]) -> str:
    slots, queue = parameters.get("slots") or "16", parameters.get("max_queue") or "256"
    chunk = parameters.get("prefill_chunk") or "128"
    threads = parameters.get("threads") or "0"
    cores = "all cores" if threads == "0" else f"{threads} threads"
    return (
        f"{slots} sequences at once, {queue} more may wait, prompts are read {chunk} tokens a step, on {cores} "
        "(parameters of config.pbtxt)"
    )


def _files(files: Mapping[str, Any]) -> str:
    if not files:
        return ""
    total = sum(int(facts.get("bytes", 0)) for facts in files.values() if isinstance(facts, dict))
    return f"{', '.join(sorted(files))}; {total / 1e6:.1f} MB"


def _exported(manifest: Mapping[str, Any]) -> str:
    tools = _part(manifest, "tools")
    parts = [str(manifest["created"])] if "created" in manifest else []
    return ", ".join([*parts, *(f"{name} {version}" for name, version in tools.items())])


def _number(value: object) -> str:
    return f"{value:.1e}" if isinstance(value, (int, float)) else str(value)
