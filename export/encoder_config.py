"""``config.pbtxt`` of an encoder entry, for our backend, and for Triton's own where that runs the graph."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from export.encoder_source import CLASSIFICATION

MAX_TEXTS = 64  # Triton's max_batch_size: texts of a request, and of what its batcher hands over at once
PREFERRED = (8, 16, 32, 64)
MAX_QUEUE_DELAY_US = 100  # under load batches form while others compute; waiting longer costs more than it gives
QUEUE_TIMEOUT_US = 30_000_000
INSTANCES = 2  # one computes while the other gathers texts and answers; they share the cores
NATIVE_INSTANCES = 4  # each asks the engine once at a time, and the engine batches what they ask


@dataclass(frozen=True)
class EncoderServing:
    """How Triton and the backend shall run the model: queued requests, tokens (padding included) of one run, threads of
    an instance (0: its share of the cores), instances (0: as many as usual), microseconds that a batch may wait for
    others, texts of a request or a batch, and the sizes that Triton prefers.
    """

    max_queue: int = 256
    max_tokens_per_batch: int = 16_384
    threads: int = 0
    instances: int = 0
    queue_delay_us: int = MAX_QUEUE_DELAY_US
    max_texts: int = MAX_TEXTS
    preferred: tuple[int, ...] = PREFERRED


def encoder_pbtxt(
    name: str, task: str, width: int, parameters: Mapping[str, str], serving: EncoderServing, native: bool = False
) -> str:
    """The entry that clients ask: texts in, embeddings [``width``] or scores [``width``] out.

    ``native``: the graph runs elsewhere. Such instances only tokenise, so there are more of them, and they are not
    warmed up, for while a server starts no model may ask another. The engine is.
    """
    answer = [("embedding", "TYPE_FP32", width)]
    if task == CLASSIFICATION:
        answer = [("scores", "TYPE_FP32", width), ("label", "TYPE_STRING", 1)]
    outputs = [*answer, ("num_input_tokens", "TYPE_UINT32", 1), ("heartbeat", "TYPE_STRING", 1)]
    warmup = [
        f'  {{ name: "{count} texts" batch_size: {count} inputs {{ key: "text_input" '
        "value { data_type: TYPE_STRING dims: [ 1 ] zero_data: true } } }"
        for count in (1, serving.max_texts)
    ]
    instances = serving.instances or (NATIVE_INSTANCES if native else INSTANCES)
    return _lines(
        f"name: {quoted(name)}",
        'backend: "encoder"',
        f"max_batch_size: {serving.max_texts}",
        _tensors("input", [("text_input", "TYPE_STRING", 1)]),
        _tensors("output", outputs),
        f"instance_group [ {{ kind: KIND_CPU count: {instances} }} ]",
        _batching(serving),
        *([] if native else ["model_warmup [", ",\n".join(warmup), "]"]),
        *(f"parameters {{ key: {quoted(k)} value: {{ string_value: {quoted(v)} }} }}" for k, v in parameters.items()),
    )


def engine_pbtxt(
    name: str,
    platform: str,
    inputs: Sequence[str],
    output: str,
    width: int,
    serving: EncoderServing,
    device: str = "auto",
) -> str:
    """The graph alone, batched by Triton and run by its own backend ``platform`` ("onnxruntime", …) on ``device``.

    Triton batches requests of the same shape, which is why the entry in front pads to length buckets. Two versions stay
    loaded, so that the entry in front, which asks for the version it was exported with, can be switched after it.
    """
    warmup = [
        f'  {{ name: "{count} x 16" batch_size: {count} '
        + " ".join(f'inputs {{ key: "{tensor}" value {{ data_type: TYPE_INT64 dims: [ 16 ] {fill} }} }}'
                   for tensor, fill in ((name, "zero_data: true") for name in inputs))
        + " }"
        for count in (1, MAX_TEXTS)
    ]  # fmt: skip
    kind = {"cpu": " kind: KIND_CPU", "cuda": " kind: KIND_GPU"}.get(device, "")  # else on each GPU, or on the CPU
    return _lines(
        f"name: {quoted(name)}",
        f"backend: {quoted(platform)}",
        f"max_batch_size: {MAX_TEXTS}",
        _tensors("input", [(tensor, "TYPE_INT64", -1) for tensor in inputs]),
        _tensors("output", [(output, "TYPE_FP32", width)]),
        "version_policy { latest { num_versions: 2 } }",
        f"instance_group [ {{ count: 1{kind} }} ]",  # without the count some backends start two
        _batching(serving),
        "model_warmup [",
        ",\n".join(warmup),
        "]",
    )


def quoted(text: str) -> str:
    """A string of protobuf's text format, which takes JSON's escapes."""
    return json.dumps(text, ensure_ascii=False)


def _batching(serving: EncoderServing) -> str:
    preferred = ", ".join(str(size) for size in serving.preferred if size <= serving.max_texts)
    return _lines(
        "dynamic_batching {",
        # Heartbeats come with priority 1: they pass whoever waits.
        "  priority_levels: 2",
        "  default_priority_level: 2",
        f"  preferred_batch_size: [ {preferred} ]",
        f"  max_queue_delay_microseconds: {serving.queue_delay_us}",
        "  default_queue_policy {",
        "    timeout_action: REJECT",
        f"    default_timeout_microseconds: {QUEUE_TIMEOUT_US}",
        "    allow_timeout_override: true",
        f"    max_queue_size: {serving.max_queue}",
        "  }",
        "}",
    ).rstrip("\n")


def _tensors(kind: str, tensors: Sequence[tuple[str, str, int]]) -> str:
    rows = [f'  {{ name: "{name}" data_type: {data} dims: [ {dims} ] }}' for name, data, dims in tensors]
    return _lines(f"{kind} [", ",\n".join(rows), "]").rstrip("\n")


def _lines(*lines: str) -> str:
    return "\n".join(lines) + "\n"
