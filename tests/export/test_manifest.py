"""What an entry says about itself is true."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from export.manifest import Serving, config_pbtxt
from export.pipeline import Exported


def _manifest(exported: Exported) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((exported.path / "manifest.json").read_text(encoding="utf-8"))
    return loaded


def test_every_file_is_listed_with_its_hash(published: Exported, published_llama: Exported) -> None:
    """The manifest names every other file of the version folder with its true size and SHA-256."""
    for exported in (published, published_llama):
        files = _manifest(exported)["files"]
        assert isinstance(files, dict)
        assert set(files) == {path.name for path in exported.path.iterdir()} - {"manifest.json"}
        for name, entry in files.items():
            content = (exported.path / name).read_bytes()
            assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        assert {"model.onnx", "tokenizer.json"} <= set(files)


def test_manifest_fields(published: Exported, published_llama: Exported) -> None:
    """Identity, graph, tokens, limits and parity are those of the model."""
    manifest = _manifest(published)
    expected = {
        "format": 1,
        "name": "tiny-gpt2",
        "version": "1",
        "task": "text_generation",
        "architecture": "gpt2",
        "precision": "fp32",
        "chat_template": None,
        "limits": {"max_len": 128},
        "parity": published.parity,
        "graph": {
            "layers": 2,
            "kv_heads": 4,
            "head_dim": 16,
            "caches": {f"past_{kind}_{layer}": [4, 128, 16] for layer in range(2) for kind in ("key", "value")},
            "kv_dtype": "float32",
            "vocab_size": 384,
            "max_len": 128,
        },
        "tokens": {"eos": [0], "bos": 0, "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"},
    }
    assert {key: manifest[key] for key in expected} == expected
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", str(manifest["created"]))
    tools = manifest["tools"]
    assert isinstance(tools, dict)
    assert set(tools) == {"truthgpt", "python", "torch", "transformers", "onnx", "onnxruntime"}
    other = _manifest(published_llama)
    assert (other["architecture"], other["precision"], other["limits"]) == ("llama", "int8", {"max_len": 96})
    assert other["chat_template"] == "chat_template.jinja"


def test_the_sources_hash_is_that_of_its_weights(published: Exported, gpt2: Path) -> None:
    """The source block identifies the very weight file."""
    source = _manifest(published)["source"]
    weights = hashlib.sha256((gpt2 / "model.safetensors").read_bytes())
    assert source == {"id": str(gpt2), "revision": None, "sha256": weights.hexdigest()}


def test_triton_reads_the_configuration(published_llama: Exported) -> None:
    """config.pbtxt parses with Triton's own schema and carries the serving options."""
    text = (published_llama.path.parent / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("llama-int8", "inflight", 0)
    assert config.model_transaction_policy.decoupled
    assert {key: value.string_value for key, value in config.parameters.items()} == {
        "task": "text_generation",
        "chat": "true",
        "precision": "int8",
        "max_len": "96",
        "slots": "4",
        "prefill_chunk": "16",
        "max_queue": "7",
        "threads": "0",
        "device": "cpu",
        "prefix_reuse": "true",
        "prefix_cache_mb": "256",
        "token_target_ms": "150",
        "speculation": "auto",
        "default_max_tokens": "",
    }
    required = [tensor.name for tensor in config.input if not tensor.optional]
    assert required == ["text_input"]
    assert {tensor.name: list(tensor.dims) for tensor in config.output} == {
        "text_output": [-1],
        "finish_reason": [-1],
        "logprobs": [-1],
        "num_input_tokens": [1],
        "num_output_tokens": [-1],
        "num_cached_tokens": [1],
    }
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU


@pytest.mark.parametrize("chat", [True, False])
def test_chat_is_a_parameter(chat: bool) -> None:
    """Whether the entry can chat is said in the configuration too."""
    config = text_format.Parse(config_pbtxt("m", "fp32", 64, chat, Serving()), model_config_pb2.ModelConfig())
    assert config.parameters["chat"].string_value == str(chat).lower()
    assert config.parameters["slots"].string_value == "16"
