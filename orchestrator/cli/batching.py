"""What the batching settings of an entry's config.pbtxt mean, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_CHUNK = (
    "tokens of prompts that a step reads beside the running answers: more reads long prompts sooner, fewer keeps the "
    "pauses short that they make"
)
ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}  # of `graph.kv_dtype`


@dataclass(frozen=True)
class Setting:
    """One setting, its value as it is in config.pbtxt (or its default), and what it does."""

    name: str
    value: str
    words: str


def settings(config: Mapping[str, Any], manifest: Mapping[str, Any], parameters: Mapping[str, str]) -> list[Setting]:
    """Those of an entry. `config` is config.pbtxt as pbtxt.model_config gives it."""
    if manifest.get("graph_only"):
        return []
    if "embedding" in manifest or "classes" in manifest:
        return _encoder(config, parameters)
    return _decoder(manifest, parameters)


def slot_bytes(manifest: Mapping[str, Any]) -> int | None:
    """Memory of one slot's keys and values at full length; None where the manifest does not say."""
    graph = manifest.get("graph")
    if not isinstance(graph, dict):
        return None
    try:
        caches = graph.get("caches") or {}
        elements = sum(math.prod(int(size) for size in shape) for shape in caches.values())
        if not caches:  # of an older export: all layers alike
            wide = int(graph["kv_heads"]) * int(graph["head_dim"])
            elements = 2 * int(graph["layers"]) * wide * int(graph["max_len"])
        return elements * ELEMENT_BYTES[str(graph.get("kv_dtype") or "float32")]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _decoder(manifest: Mapping[str, Any], parameters: Mapping[str, str]) -> list[Setting]:
    given = {name: value for name, value in parameters.items() if value}
    slots, chunk = given.get("slots", "16"), given.get("prefill_chunk", "128")
    queue, threads, default = (given.get(name, "") for name in ("max_queue", "threads", "default_max_tokens"))
    rows = [
        Setting(
            "slots", slots, f"requests that run at once, a token of each in every step; {_memory(manifest, slots)}"
        ),
        Setting("prefill_chunk", chunk, _CHUNK),
        Setting(
            "max_queue", queue or "256", "requests that wait for a slot; one more is refused and may come back (503)"
        ),
        Setting("threads", threads or "0", _threads(threads or "0")),
        Setting("default_max_tokens", default, _default(default, manifest)),
    ]
    # Those that newer exports have; an entry without them runs as its backend does by default.
    if "token_target_ms" in given:
        rows.append(Setting("token_target_ms", given["token_target_ms"], _target(given["token_target_ms"])))
    if "prefix_reuse" in given:
        bound = given.get("prefix_cache_mb")
        rows.append(Setting("prefix_reuse", given["prefix_reuse"], _prefix(given["prefix_reuse"], bound)))
        if bound:
            rows.append(Setting("prefix_cache_mb", bound, "MiB that remembered prompts may take beside the slots"))
    if "speculation" in given:
        rows.append(Setting("speculation", given["speculation"], _speculation(given["speculation"])))
    return rows


def _memory(manifest: Mapping[str, Any], slots: str) -> str:
    one = slot_bytes(manifest)
    if one is None or not slots.isdecimal():
        return "each takes memory for keys and values of the whole length"
    if one == 0:
        return "this model keeps no keys and values"
    return f"their keys and values take {_size(one * int(slots))} when all are full, {_size(one)} each"


def _threads(value: str) -> str:
    return "threads of ONNX Runtime: as many as there are cores" if value == "0" else "threads of ONNX Runtime"


def _default(value: str, manifest: Mapping[str, Any]) -> str:
    if value not in ("", "0"):
        return "new tokens of a request that does not say how many it wants"
    limits = manifest.get("limits")
    length = limits.get("max_len", "?") if isinstance(limits, dict) else "?"
    return f"a request that does not say how many tokens it wants may fill what its prompt leaves of {length}"


def _target(value: str) -> str:
    if value == "0":
        return "no target: a step always reads a whole prefill_chunk"
    return "milliseconds that a token of a running answer may take: a step reads fewer tokens of prompts where it must"


def _prefix(value: str, bound: str | None) -> str:
    if value == "false" or bound == "0":
        return "every prompt is read from its beginning"
    return "the beginning that a prompt shares with an earlier one is taken from its keys and values, not read again"


def _speculation(value: str) -> str:
    if value == "off":
        return "one token a step"
    return (
        "while few requests run, tokens are guessed from the text so far and checked in one step: same answers, sooner"
    )


def _encoder(config: Mapping[str, Any], parameters: Mapping[str, str]) -> list[Setting]:
    rows = []
    if _number(config.get("max_batch_size")):
        rows.append(
            Setting("max_batch_size", str(config["max_batch_size"]), "texts of a request, and of a batch, at most")
        )
    dynamic = config.get("dynamic_batching")
    if isinstance(dynamic, Mapping):
        rows += _dynamic(dynamic)
    tokens = parameters.get("max_tokens_per_batch")
    if tokens:
        rows.append(
            Setting("max_tokens_per_batch", tokens, "tokens of a run, padding included: a larger batch is several runs")
        )
    groups = config.get("instance_group")
    count = sum(_number(group.get("count")) or 1 for group in groups) if isinstance(groups, list) else 0
    if count:
        rows.append(Setting("instance_group", str(count), "batches at once, where the kind is a GPU on each of them"))
    if "threads" in parameters:
        rows.append(Setting("threads", parameters["threads"] or "0", _threads(parameters["threads"] or "0")))
    return rows


def _dynamic(dynamic: Mapping[str, Any]) -> list[Setting]:
    sizes = dynamic.get("preferred_batch_size") or []
    delay = _number(dynamic.get("max_queue_delay_microseconds"))
    policy = dynamic.get("default_queue_policy")
    policy = policy if isinstance(policy, Mapping) else {}
    rows = []
    if sizes:
        words = "texts with which a batch of several requests starts without waiting for more"
        rows.append(Setting("preferred_batch_size", ", ".join(map(str, sizes)), words))
    waits = f"a text waits {delay / 1000:g} ms for others at most" if delay else "no text waits for others to come"
    rows.append(Setting("max_queue_delay_microseconds", str(delay), waits))
    if _number(policy.get("max_queue_size")):
        rows.append(
            Setting("max_queue_size", str(policy["max_queue_size"]), "requests that wait; one more is refused (503)")
        )
    timeout = _number(policy.get("default_timeout_microseconds"))
    if timeout:
        words = f"who waited for {timeout / 1e6:g} s is refused"
        rows.append(Setting("default_timeout_microseconds", str(timeout), words))
    return rows


def _number(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
