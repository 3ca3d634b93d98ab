"""OpenVINO GenAI's continuous batching, run by the interpreter of its own environment.

Settings: `weights` fp32 or int8 (NNCF's 8 bits a weight, one scale a row, as optimum-intel makes them), `inference`
f32 or bf16 (INFERENCE_PRECISION_HINT), `prefix_cache`; two threads, PERFORMANCE_HINT of its own choice, the
scheduler's defaults but for the size of its cache.
"""

from __future__ import annotations

import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers import serving


class ContinuousBatching:
    def __init__(self, asked: dict[str, Any]) -> None:
        folder = converted(Path(asked["checkpoint"]), Path(asked["converted"]), asked["weights"])
        config = openvino_genai.SchedulerConfig()
        config.cache_size = asked["cache_gb"]
        config.enable_prefix_caching = asked["prefix_cache"]
        for name, value in asked.get("scheduler", {}).items():
            setattr(config, name, value)
        properties = {
            "INFERENCE_NUM_THREADS": asked["threads"],
            "INFERENCE_PRECISION_HINT": asked["inference"],
            **asked.get("properties", {}),
        }
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(folder, config, "CPU", properties)
        self._handles: dict[int, Any] = {}
        self._requests = 0
        self._about = {
            "version": version("openvino-genai"), "weights": asked["weights"], "scheduler": config.to_string(),
            "properties": properties,
        }  # fmt: skip

    def about(self) -> dict[str, Any]:
        return self._about

    def add(self, conversation: int, prompt: list[int], new: int, last: bool) -> None:
        how = openvino_genai.GenerationConfig()
        how.max_new_tokens = how.min_new_tokens = new
        how.ignore_eos, how.do_sample = True, False
        self._requests += 1
        ids = openvino.Tensor(np.array([prompt], np.int64))
        self._handles[conversation] = self._pipeline.add_request(self._requests, ids, how)

    def step(self) -> list[serving.Event]:
        self._pipeline.step()
        at = time.perf_counter()
        found = []
        for conversation, handle in [*self._handles.items()]:
            ids: list[int] = []
            while handle.can_read():
                for output in handle.read().values():
                    ids += output.generated_ids
            if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                del self._handles[conversation]
                if handle.get_status() != openvino_genai.GenerationStatus.FINISHED:
                    raise RuntimeError(f"a request ended as {handle.get_status()}")
            if ids:
                found.append((conversation, ids, at))
        return found


def converted(checkpoint: Path, folder: Path, weights: str) -> Path:
    """The checkpoint in OpenVINO's format, made once."""
    target = folder / f"openvino-{version('openvino')}-{weights}"
    if target.exists():
        return target
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM

    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = OVModelForCausalLM.from_pretrained(
        checkpoint, export=True, compile=False, load_in_8bit=weights == "int8", trust_remote_code=False
    )
    model.save_pretrained(partial)
    parts = convert_tokenizer(_any_tokenizer(), with_detokenizer=True)
    for part, name in zip(parts, ("tokenizer", "detokenizer"), strict=True):
        openvino.save_model(part, partial / f"openvino_{name}.xml")
    partial.rename(target)
    return target


def _any_tokenizer() -> Any:
    """The pipeline does not load without one; token ids go in and out, so it is never asked. That of the checkpoint,
    which has no merges and no special token, does not convert.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<end>"]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, [("a", "b")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")  # noqa: S106


if __name__ == "__main__":
    serving.serve(ContinuousBatching)
