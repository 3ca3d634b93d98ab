"""What can be set of an entry, and the values of each that are worth a try. docs/tuning.md says what each does."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator import pbtxt
from orchestrator.models import Entry, Version
from orchestrator.ops.entrycheck import BACKEND, ENCODER
from orchestrator.ops.tune import editing
from orchestrator.ops.tune.editing import PARAMETERS, Place
from orchestrator.ops.tune.errors import TuneError
from orchestrator.ops.tune.figures import Workload

Point = Mapping[str, str]  # name of a knob -> its value's text

MAX_SLOTS, MAX_BATCH, MIN_TOKENS = 1024, 1024, 64
DEFAULT_CHUNK = 128  # an exporter makes it smaller where a larger one would not fit (export/rewrites.py)
CHUNK_GROWTH = 4  # steps of prefill may need memory in proportion
KV_SHARE = 0.5  # of the memory that is free, for the caches of a candidate that has more slots
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Knob:
    """One value of config.pbtxt. `values` are in order and have `current` among them."""

    name: str
    place: Place
    values: tuple[str, ...]
    current: str


@dataclass(frozen=True)
class Room:
    """What a candidate has to fit into: cores, and bytes of memory that are free."""

    cores: int
    memory: int


def knobs_of(entry: Entry, version: Version, source: str, workload: Workload, room: Room) -> tuple[Knob, ...]:
    """The knobs of an entry whose config.pbtxt is `source`.

    Raises TuneError for an entry that has none, or whose sequences are too short for the workload.
    """
    config = pbtxt.model_config(_parsed(source))
    backend = config.get("backend")
    _check(entry, version, backend, workload)
    rows_of = _decoder if backend == BACKEND else _encoder
    rows = rows_of(config, version, workload, room)
    found = []
    for name, place, values, default in rows:
        current = editing.current(config, place, default)
        knob = Knob(name, place, _ordered({*values, current}), current)
        if len(knob.values) > 1 and _editable(source, knob):
            found.append(knob)
    if not found:
        raise TuneError(f"{entry.config_path} has nothing that can be tuned", "export the model again")
    return tuple(found)


def encodes(entry: Entry) -> bool:
    """Whether a model answers with vectors or scores, not with text. Raises ModelsError."""
    return pbtxt.model_config(entry.config()).get("backend") == ENCODER


def point_of(knobs: Sequence[Knob]) -> dict[str, str]:
    """What is set now."""
    return {knob.name: knob.current for knob in knobs}


def changes(knobs: Sequence[Knob], point: Point) -> dict[Place, str]:
    """What of a point is to be written into config.pbtxt."""
    return {knob.place: point[knob.name] for knob in knobs if point[knob.name] != knob.current}


def key(point: Point) -> tuple[tuple[str, str], ...]:
    """A point as something that can be looked up."""
    return tuple(sorted(point.items()))


Row = tuple[str, Place, Collection[str], str]  # name, place, values, what stands for a value that is not there


def _decoder(config: Mapping[str, Any], version: Version, workload: Workload, room: Room) -> list[Row]:
    slots = int(editing.current(config, (PARAMETERS, "slots"), "16"))
    chunk = int(editing.current(config, (PARAMETERS, "prefill_chunk"), str(DEFAULT_CHUNK)))
    # more than there are clients are never used, and far fewer only queue
    most = min(MAX_SLOTS, _power_above(workload.concurrency))
    fitting = [n for n in _powers(max(1, most // 4), most) if n <= slots or _fits(version, n - slots, room)]
    # an exporter that made it smaller than usual had its reason
    largest = chunk * CHUNK_GROWTH if chunk >= DEFAULT_CHUNK else chunk
    length = max_len(version) or largest
    return [
        ("slots", (PARAMETERS, "slots"), _texts(fitting), "16"),
        ("prefill_chunk", (PARAMETERS, "prefill_chunk"), _texts(_powers(16, min(largest, length))), str(DEFAULT_CHUNK)),
        ("threads", (PARAMETERS, "threads"), _texts({0, *_powers(1, room.cores), room.cores}), "0"),
    ]


def _encoder(config: Mapping[str, Any], version: Version, workload: Workload, room: Room) -> list[Row]:
    rows: list[Row] = []
    groups = config.get("instance_group")
    if isinstance(groups, list) and len(groups) == 1:
        rows.append(("instances", ("instance_group", "count"), _texts(_powers(1, max(2, 2 * room.cores))), "1"))
    own_graph = version.engine is None
    if own_graph:  # else other processes run it, and this one only makes tokens
        rows.append(("threads", (PARAMETERS, "threads"), _texts({0, *_powers(1, room.cores), room.cores}), "0"))
        at_once = _power_above(workload.concurrency * workload.prompt_tokens)  # more never come together
        tokens = _texts(_powers(max(MIN_TOKENS, at_once // 8), at_once))
        rows.append(("max_tokens_per_batch", (PARAMETERS, "max_tokens_per_batch"), tokens, "16384"))
    if isinstance(config.get("dynamic_batching"), dict):
        delay = ("dynamic_batching", "max_queue_delay_microseconds")
        rows.append(("queue_delay_us", delay, _texts([0, 100, 500, 1000, 2000, 5000]), "0"))
        size = int(config.get("max_batch_size") or 1)
        if own_graph:  # a smaller one would refuse requests that are answered now
            most = max(size, min(MAX_BATCH, _power_above(workload.concurrency)))
            sizes = _texts({size, *(n for n in (2 * size, 4 * size) if n <= most)})
            rows.append(("max_batch_size", ("max_batch_size",), sizes, ""))
        preferred = editing.current(config, ("dynamic_batching", "preferred_batch_size"), "")
        if preferred:
            rows.append(("preferred", ("dynamic_batching", "preferred_batch_size"), {str(size)}, ""))
    return rows


def _check(entry: Entry, version: Version, backend: object, workload: Workload) -> None:
    if version.graph_only:
        raise TuneError(f"{entry.name} is the graph of another model", "tune the model that it belongs to")
    if backend not in (BACKEND, ENCODER):
        raise TuneError(
            f"{entry.name} is served by the backend {backend!r}, of which it is not known what can be tuned",
            f"what `truthgpt export` makes can be tuned: backends {BACKEND} and {ENCODER}",
        )
    if backend == BACKEND and version.fact("target") == "tensorrt":
        raise TuneError(
            f"{entry.name} has TensorRT engines, which are built for its slots and prefill_chunk",
            "export it again with other --slots and --prefill-chunk",
        )
    if (backend == BACKEND) != bool(workload.output_tokens):
        wanted = "at least 1 for a model that generates" if backend == BACKEND else "0 for an encoder"
        raise TuneError(f"output tokens: {workload.output_tokens}, must be {wanted}", "leave --output-tokens out")
    length, needed = max_len(version), workload.prompt_tokens + workload.output_tokens
    if length is not None and needed > length:
        raise TuneError(
            f"{workload} do not fit: {entry.name} takes {length} tokens in all",
            "give fewer --prompt-tokens" + (" or --output-tokens" if workload.output_tokens else ""),
        )


def _fits(version: Version, more: int, room: Room) -> bool:
    """Whether the caches of so many more slots do."""
    graph = (version.manifest or {}).get("graph")
    try:
        facts = dict(graph) if isinstance(graph, dict) else {}
        item = _ITEM_BYTES.get(str(facts.get("kv_dtype") or "float32"), 4)
        row = 2 * int(facts["layers"]) * int(facts["kv_heads"]) * int(facts["head_dim"]) * int(facts["max_len"]) * item
    except (KeyError, TypeError, ValueError):
        return False
    return row * more <= KV_SHARE * room.memory


def max_len(version: Version) -> int | None:
    """Tokens of a sequence, as the manifest says it; None where it does not."""
    limits = (version.manifest or {}).get("limits")
    found = limits.get("max_len") if isinstance(limits, dict) else None
    return found if isinstance(found, int) else None


def _editable(source: str, knob: Knob) -> bool:
    other = next(value for value in knob.values if value != knob.current)
    try:
        editing.edited(source, {knob.place: other})
    except TuneError:
        return False
    return True


def _parsed(source: str) -> pbtxt.Message:
    try:
        return pbtxt.parse(source)
    except ValueError as error:
        raise TuneError(f"config.pbtxt cannot be read: {error}", "export the model again") from error


def _power_above(number: int) -> int:
    return 1 << math.ceil(math.log2(number))


def _powers(least: int, most: int) -> list[int]:
    return [1 << n for n in range(21) if least <= 1 << n <= most]


def _texts(numbers: Collection[int]) -> list[str]:
    return [str(number) for number in numbers]


def _ordered(values: set[str]) -> tuple[str, ...]:
    return tuple(sorted(values, key=lambda value: [int(part) for part in value.split(",")]))
