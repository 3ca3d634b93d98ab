"""A model with a three-token vocabulary that counts: one two three one two three …, as a real entry for the real
backend.

Its graph has no layers and so no cache: the next token is a table look-up. `step_delay_ms` makes its steps as slow as
a large model's.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ("one", "two", "three")
CONFIG = """name: "{name}"
backend: "inflight"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
input [
  {{ name: "text_input" data_type: TYPE_STRING dims: [1] }},
  {{ name: "stream" data_type: TYPE_BOOL dims: [1] optional: true }},
  {{ name: "sampling_parameters" data_type: TYPE_STRING dims: [1] optional: true }},
  {{ name: "exclude_input_in_output" data_type: TYPE_BOOL dims: [1] optional: true }},
  {{ name: "return_finish_reason" data_type: TYPE_BOOL dims: [1] optional: true }},
  {{ name: "return_logprobs" data_type: TYPE_BOOL dims: [1] optional: true }},
  {{ name: "return_num_input_tokens" data_type: TYPE_BOOL dims: [1] optional: true }},
  {{ name: "return_num_output_tokens" data_type: TYPE_BOOL dims: [1] optional: true }},
  {{ name: "return_num_cached_tokens" data_type: TYPE_BOOL dims: [1] optional: true }}
]
output [
  {{ name: "text_output" data_type: TYPE_STRING dims: [-1] }},
  {{ name: "finish_reason" data_type: TYPE_STRING dims: [-1] }},
  {{ name: "logprobs" data_type: TYPE_STRING dims: [-1] }},
  {{ name: "num_input_tokens" data_type: TYPE_UINT32 dims: [1] }},
  {{ name: "num_output_tokens" data_type: TYPE_UINT32 dims: [-1] }},
  {{ name: "num_cached_tokens" data_type: TYPE_UINT32 dims: [1] }}
]
instance_group [{{ kind: KIND_CPU count: 1 }}]
"""
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


def write_entry(
    repository: Path, name: str = "counting", max_len: int = 4096, nan_after: str | None = None,
    words: tuple[str, str, str] = WORDS, number: int = 1, **parameters: object,
) -> Path:  # fmt: skip
    """Write the entry and return its folder. It counts with `words`; with `nan_after` the row after that one is NaN;
    `number` is its version, which may be added to others; `parameters` go to config.pbtxt.
    """
    folder = repository / name
    version = folder / str(number)
    version.mkdir(parents=True)
    onnx.save(_graph(None if nan_after is None else words.index(nan_after)), version / "model.onnx")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(version / "tokenizer.json"))
    (version / "chat_template.jinja").write_text(TEMPLATE)
    files = {
        f.name: {"sha256": hashlib.sha256(f.read_bytes()).hexdigest(), "bytes": f.stat().st_size}
        for f in version.iterdir()
    }
    manifest = {
        "format": 1, "name": name, "version": str(number), "task": "text_generation", "architecture": "counting",
        "precision": "fp32", "files": files,
        "graph": {"layers": 0, "kv_heads": 0, "head_dim": 0, "vocab_size": len(WORDS), "max_len": max_len},
        "tokens": {"eos": [], "bos": None}, "chat_template": "chat_template.jinja", "limits": {"max_len": max_len},
    }  # fmt: skip
    (version / "manifest.json").write_text(json.dumps(manifest))
    given = {
        "task": "text_generation",
        "chat": "true",
        "precision": "fp32",
        "max_len": max_len,
        "slots": 4,
        **parameters,
    }
    rows = "".join(f'parameters {{ key: "{k}" value {{ string_value: "{v}" }} }}\n' for k, v in given.items())
    (folder / "config.pbtxt").write_text(CONFIG.format(name=name) + rows)
    return folder


def _graph(nan_after: int | None) -> onnx.ModelProto:
    table = np.eye(len(WORDS), dtype=np.float32)[[1, 2, 0]] * 50  # so sure of itself that sampling counts, too
    if nan_after is not None:
        table[nan_after] = np.nan
    constants = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1]), "axis")]
    nodes = [
        helper.make_node("Unsqueeze", ["last_index", "axis"], ["index"]),
        helper.make_node("GatherElements", ["input_ids", "index"], ["last"], axis=1),
        helper.make_node("Squeeze", ["last", "axis"], ["token"]),
        helper.make_node("Gather", ["table", "token"], ["logits"]),
    ]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["rows", "seq"]),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["rows", "seq"]),
        helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["rows"]),
        helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, []),
        helper.make_tensor_value_info("last_index", TensorProto.INT64, ["rows"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", len(WORDS)])]
    graph = helper.make_graph(nodes, "counting", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
