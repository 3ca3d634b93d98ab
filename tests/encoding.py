"""Encoders without a network in them, as real entries for the real Triton and for the fake one: a text's vector and
scores follow from its SHA-256, its tokens are its words and two more.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import struct
from pathlib import Path
from typing import Any

EMBEDS = {"task": "embeddings", "max_len": "16", "dim": "8", "normalized": "true"}
CLASSIFIES = {
    "task": "sentiment_analysis", "max_len": "16", "labels": '["negative", "positive"]', "problem": "single_label",
}  # fmt: skip


def vector(text: str, dim: int) -> list[float]:
    """Of length 1, as float32 values."""
    digest = hashlib.sha256(text.encode()).digest()
    values = [digest[i % 32] - 127.5 for i in range(dim)]
    length = math.hypot(*values)
    return [struct.unpack("<f", struct.pack("<f", value / length))[0] for value in values]


def scores(text: str, labels: int) -> list[float]:
    """They are positive and their sum is 1; float32 values."""
    digest = hashlib.sha256(text.encode()).digest()
    values = [digest[i] + 1 for i in range(labels)]
    return [struct.unpack("<f", struct.pack("<f", value / sum(values)))[0] for value in values]


def tokens(text: str) -> int:
    """A token a word, and one at each end."""
    return len(text.split()) + 2


def too_long(index: int, has: int, max_len: int) -> str:
    """The refusal of a text, as Triton carries it."""
    message = f"text_input[{index}] has {has} tokens; the model reads at most {max_len} (set truncate to cut)"
    return f"invalid_argument: {message}"


def outputs(texts: list[str], parameters: dict[str, Any], truncate: bool) -> dict[str, Any] | str:
    """Name -> (datatype, columns, elements or floats), or the error's text."""
    limit = int(parameters["max_len"])
    counts = [tokens(text) for text in texts]
    for index, count in enumerate(counts):
        if count > limit and not truncate:
            return too_long(index, count, limit)
    found: dict[str, Any] = {"num_input_tokens": ("UINT32", 1, [min(count, limit) for count in counts])}
    if parameters["task"] == "embeddings":
        dim = int(parameters["dim"])
        return found | {"embedding": ("FP32", dim, [x for text in texts for x in vector(text, dim)])}
    labels = json.loads(parameters["labels"])
    rows = [scores(text, len(labels)) for text in texts]
    best = [labels[row.index(max(row))].encode() for row in rows]
    return found | {"scores": ("FP32", len(labels), [x for row in rows for x in row]), "label": ("BYTES", 1, best)}


def texts_of(data: bytes) -> list[str]:
    """The elements of a BYTES tensor's binary form."""
    found = []
    while data:
        (size,) = struct.unpack_from("<I", data)
        found.append(data[4 : 4 + size].decode())
        data = data[4 + size :]
    return found


def reply(name: str, given: dict[str, Any], version: str = "1") -> tuple[bytes, int]:
    """Triton's answer with binary tensors, and the length of its JSON."""
    rows, blobs = [], []
    for output, (kind, columns, values) in given.items():
        if kind == "BYTES":
            blobs.append(b"".join(struct.pack("<I", len(value)) + value for value in values))
        else:
            blobs.append(struct.pack(f"<{len(values)}{'I' if kind == 'UINT32' else 'f'}", *values))
        shape, sized = [len(values) // columns, columns], {"binary_data_size": len(blobs[-1])}
        rows.append({"name": output, "datatype": kind, "shape": shape, "parameters": sized})
    head = json.dumps({"model_name": name, "model_version": version, "outputs": rows}).encode()
    return b"".join([head, *blobs]), len(head)


def config_json(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """What Triton tells of the entry."""
    kinds = ("embedding",) if parameters["task"] == "embeddings" else ("scores", "label")
    return {
        "name": name,
        "backend": "encoder",
        "max_batch_size": int(parameters.get("max_batch_size", 64)),
        "output": [{"name": output} for output in (*kinds, "num_input_tokens", "heartbeat")],
        "parameters": {key: {"string_value": str(value)} for key, value in parameters.items()},
    }


CONFIG = """name: "{name}"
backend: "python"
max_batch_size: 64
dynamic_batching {{
  preferred_batch_size: [8, 16, 32, 64]
  max_queue_delay_microseconds: 1000
  priority_levels: 2
  default_priority_level: 2
  default_queue_policy {{ max_queue_size: {max_queue} timeout_action: REJECT }}
}}
input [{{ name: "text_input" data_type: TYPE_STRING dims: [1] }}]
output [
  {outputs},
  {{ name: "num_input_tokens" data_type: TYPE_UINT32 dims: [1] }},
  {{ name: "heartbeat" data_type: TYPE_STRING dims: [1] }}
]
instance_group [{{ kind: KIND_CPU count: 1 }}]
"""
OF_EMBEDDINGS = '{{ name: "embedding" data_type: TYPE_FP32 dims: [{dim}] }}'
OF_LABELS = (
    '{{ name: "scores" data_type: TYPE_FP32 dims: [{labels}] }}, {{ name: "label" data_type: TYPE_STRING dims: [1] }}'
)
CODE = """
import hashlib, json, math, struct, time
from typing import Any
import numpy as np
import triton_python_backend_utils as pb_utils

{functions}

class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.parameters = {{name: value["string_value"] for name, value in config["parameters"].items()}}

    def execute(self, requests):
        asked = [json.loads(request.parameters()) for request in requests]
        if not all(parameters.get("heartbeat") for parameters in asked):
            time.sleep(float(self.parameters.get("pause_s", "0")))
        return [self._one(request, parameters) for request, parameters in zip(requests, asked)]

    def _one(self, request, asked):
        if asked.get("heartbeat"):
            beat = {{"busy": False, "step_age_s": 0.0, "running": 0, "waiting": 0, "slots": 64, "digest": "d" * 32}}
            beat.update(device="cpu", fallback=False)
            row = np.array([[json.dumps(beat).encode()]], dtype=object)
            return pb_utils.InferenceResponse([pb_utils.Tensor("heartbeat", row)])
        given = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy()
        texts = [text.decode() for text in given.reshape(-1)]
        found = outputs(texts, self.parameters, bool(asked.get("truncate")))
        if isinstance(found, str):
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(found))
        kinds = {{"FP32": np.float32, "UINT32": np.uint32, "BYTES": object}}
        return pb_utils.InferenceResponse([
            pb_utils.Tensor(name, np.array(values, dtype=kinds[kind]).reshape(-1, columns))
            for name, (kind, columns, values) in found.items()
        ])
"""


def write_encoder(repository: Path, name: str, parameters: dict[str, str], max_queue: int = 256) -> Path:
    """Write an entry with the encoders' contract, in Triton's own Python backend, and return its folder."""
    folder = repository / name
    (folder / "1").mkdir(parents=True)
    own = OF_EMBEDDINGS if parameters["task"] == "embeddings" else OF_LABELS
    own = own.format(dim=parameters.get("dim"), labels=len(json.loads(parameters.get("labels", "[]"))))
    rows = "".join(
        f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(value)} }} }}\n'
        for key, value in parameters.items()
    )
    (folder / "config.pbtxt").write_text(CONFIG.format(name=name, outputs=own, max_queue=max_queue) + rows)
    functions = "\n\n".join(inspect.getsource(each) for each in (vector, scores, tokens, too_long, outputs))
    (folder / "1" / "model.py").write_text(CODE.format(functions=functions))
    return folder
