"""A model's manifest and batching settings in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator import engines
from orchestrator.cli.batching import Setting
from orchestrator.models import Version


def lines(
    version: Version,
    manifest: Mapping[str, Any],
    parameters: Mapping[str, str],
    state: str,
    settings: Sequence[Setting],
) -> list[str]:
    """What `truthgpt models show` prints. What the manifest does not say is left out."""
    rows: list[tuple[str, str]] = [
        ("state", state),
        ("task", f"{manifest.get('task')}, {_apis(manifest)}"),
        ("model", f"{manifest.get('architecture')}, {manifest.get('precision')}{_shape(_part(manifest, 'graph'))}"),
        ("answers", _answers(manifest)),
        ("precision", _precision(manifest)),
        ("graph", _graph(manifest)),
        ("target", _target(version)),
        ("source", _source(_part(manifest, "source"))),
        ("length", _length(manifest)),
        ("parity", _parity(_part(manifest, "parity"))),
        ("batching", "" if version.graph_only else _batching(manifest, parameters)),
        ("files", _files(_part(manifest, "files"))),
        ("exported", _exported(manifest)),
        ("path", str(version.folder)),
    ]
    title = f"{version.name} version {version.number}"
    shown = []
    for name, text in rows:
        shown += [f"  {name:<9} {text}"] if text else []
        if name == "batching":
            shown += [f"  {'':<9} {each.name} {each.value or '(none)'}: {each.words}" for each in settings]
    return [title, *shown]


def _part(manifest: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = manifest.get(key)
    return value if isinstance(value, dict) else {}


def _apis(manifest: Mapping[str, Any]) -> str:
    if manifest.get("graph_only"):
        return "asked by another entry only"
    if _encodes(manifest):
        return f"asked at /v1/{'classify' if 'classes' in manifest else 'embeddings'}"
    return "chat and completions" if manifest.get("chat_template") else "completions only"


def _encodes(manifest: Mapping[str, Any]) -> bool:
    return "embedding" in manifest or "classes" in manifest


def _answers(manifest: Mapping[str, Any]) -> str:
    """What an encoder makes of a text."""
    classes, embedding = _part(manifest, "classes"), _part(manifest, "embedding")
    if classes:
        problems = {"multi_label": "each by itself", "regression": "a number as it is", "single_label": "one of them"}
        labels = ", ".join(str(label) for label in classes.get("labels", ()))
        return f"{labels} ({problems.get(str(classes.get('problem')), classes.get('problem'))})"
    if not embedding:
        return ""
    head = [f"{' and '.join(embedding.get('pooling', ())) or 'no'} pooling", *map(str, embedding.get("head", ()))]
    length = ", of length 1" if embedding.get("normalized") else ""
    return f"{_part(manifest, 'graph').get('width', '?')} numbers{length} ({', '.join(head)})"


def _precision(manifest: Mapping[str, Any]) -> str:
    """What a number format does not say by its name; empty where there is nothing."""
    parts, layers, quantization = [], manifest.get("fp32_layers"), _part(manifest, "quantization")
    if isinstance(layers, list) and layers:
        parts.append(f"{len(layers)} layers stay fp32: {', '.join(str(layer) for layer in layers)}")
    if quantization.get("bits"):
        calibrated = "calibrated by a text" if quantization.get("calibration") else "not calibrated"
        parts.append(f"weights of {quantization['bits']} bits, {calibrated}")
    if "allowed_drift" in quantization:
        parts.append(f"published up to a drift of {float(quantization['allowed_drift']):.0%}")
    return "; ".join(parts)


def _graph(manifest: Mapping[str, Any]) -> str:
    served_by = _part(manifest, "served_by")
    if manifest.get("graph_only"):
        return "this is it alone, run by Triton itself for the entry in front, with which it is loaded"
    return f"{served_by.get('name')} version {served_by.get('version')}, run by Triton itself" if served_by else ""


def _target(version: Version) -> str:
    """For whom an entry was made, and the engine that it has; empty for ONNX Runtime."""
    target = version.fact("target")
    try:
        found = engines.engine_of(version)
    except engines.ForeignEngine as error:
        return f"{target}, {error}"
    if target in (None, "onnx") and found is None:
        return ""
    if found is None:
        return f"{target}, its engine is built by the first load"
    made = ", ".join(f"{name} {found[0][name]}" for name in ("tensorrt", "onnxruntime") if name in found[0])
    capability = found[0].get("compute_capability", "unknown")
    return f"{target}, engine for {found[0].get('gpu')} (compute capability {capability}) made by {made or 'unknown'}"


def _length(manifest: Mapping[str, Any]) -> str:
    what = "a text" if _encodes(manifest) else "prompt and answer together"
    return f"{_part(manifest, 'limits').get('max_len', '?')} tokens, {what}"


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
    parts = [f"of {parity['of']}"] if "of" in parity else []
    if "max_abs_logit_diff" in parity:
        parts.append(f"logits differ from transformers' by at most {_number(parity['max_abs_logit_diff'])}")
    if parity.get("max_abs_diff") is not None:
        parts.append(f"numbers differ from transformers' by at most {_number(parity['max_abs_diff'])}")
    if "rms_over_std" in parity:
        parts.append(f"by {_number(parity['rms_over_std'])} of their spread on average")
    if "greedy_agreement" in parity:
        parts.append(f"{float(parity['greedy_agreement']):.1%} of greedy tokens are the same")
    if "batch_effect" in parity:
        parts.append(_company(parity["batch_effect"]))
    return ", ".join(parts)


def _company(effect: object) -> str:
    if effect == 0:
        return "what else is in the batch changes nothing"
    return f"what else is in the batch moves them by up to {_number(effect)}"


def _batching(manifest: Mapping[str, Any], parameters: Mapping[str, str]) -> str:
    if _encodes(manifest):
        tokens = parameters.get("max_tokens_per_batch") or "16384"
        return f"texts of all requests together, up to {tokens} tokens a run, padding included (config.pbtxt)"
    slots, queue = parameters.get("slots") or "16", parameters.get("max_queue") or "256"
    chunk = parameters.get("prefill_chunk") or "128"
    threads = parameters.get("threads") or "0"
    cores = "all cores" if threads == "0" else f"{threads} threads"
    return (
        f"in flight, {slots} sequences at once, {queue} more may wait, prompts are read {chunk} tokens a step, on "
        f"{cores}: each request joins at the next step and leaves at its own end (parameters of config.pbtxt)"
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
