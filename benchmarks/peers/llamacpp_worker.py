"""llama.cpp, through llama-cpp-python's bindings: parallel sequences in one context, batched as its own server does.

A step is one `llama_decode` of the next token of every running sequence and of as much of the waiting prompts as fits
n_batch. A sequence that ends leaves its cache in its slot, and a new prompt takes the free slot that it has most in
common with (the server's cache_prompt and slot similarity). Settings: `weights` f32, bf16 or q8_0, `flash` attention;
each sequence has its part of the cache to itself (with one for all, a step was half as fast); the rest are defaults.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peers import serving

N_BATCH = 2048


@dataclass
class Slot:
    number: int
    cached: list[int] = field(default_factory=list)
    conversation: int = -1  # none
    waiting: list[int] = field(default_factory=list)  # of the prompt, or the token that was generated last
    missing: int = 0
    used: int = 0  # when, in requests


class Parallel:
    def __init__(self, asked: dict[str, Any]) -> None:
        path = converted(Path(asked["checkpoint"]), Path(asked["converted"]), asked["weights"])
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.use_mmap = False  # tensors that are repacked for the CPU are copied anyway
        model.use_extra_bufts = asked["extra_buffers"]
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model)
        how = llama_cpp.llama_context_default_params()
        how.n_seq_max = asked["slots"]
        how.n_ctx = asked["slots"] * asked["max_len"]
        how.n_batch = N_BATCH
        how.n_threads = how.n_threads_batch = asked["threads"]
        how.kv_unified = False
        how.flash_attn_type = -1 if asked["flash"] else 0  # -1: as it chooses, which is on
        self._context = llama_cpp.llama_init_from_model(self._model, how)
        if not self._model or not self._context:
            raise RuntimeError(f"llama.cpp does not open {path}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(N_BATCH, 0, 1)
        self._slots = [Slot(number) for number in range(asked["slots"])]
        self._queue: list[tuple[int, list[int], int]] = []
        self._requests = 0
        self._reuse = asked["prefix_cache"]
        self._about = {
            "version": version("llama-cpp-python"), "weights": asked["weights"], "flash": asked["flash"],
            "prefix_cache": asked["prefix_cache"], "extra_buffers": asked["extra_buffers"], "n_batch": N_BATCH,
            "system": llama_cpp.llama_print_system_info().decode(),
        }  # fmt: skip

    def about(self) -> dict[str, Any]:
        return self._about

    def add(self, conversation: int, prompt: list[int], new: int, last: bool) -> None:
        self._queue.append((conversation, prompt, new))

    def _admit(self) -> None:
        while self._queue and (free := [slot for slot in self._slots if slot.conversation < 0]):
            conversation, prompt, new = self._queue.pop(0)
            self._requests += 1
            slot = max(free, key=lambda one: (_common(one.cached, prompt) if self._reuse else 0, -one.used))
            kept = _common(slot.cached, prompt) if self._reuse else 0
            llama_cpp.llama_memory_seq_rm(self._memory, slot.number, kept, -1)
            slot.cached, slot.waiting = prompt[:kept], prompt[kept:]
            slot.conversation, slot.missing, slot.used = conversation, new, self._requests

    def step(self) -> list[serving.Event]:
        self._admit()
        batch, rows = self._batch, []
        batch.n_tokens = 0
        running = [slot for slot in self._slots if slot.conversation >= 0]
        for slot in sorted(running, key=lambda one: len(one.waiting) > 1):
            taken, slot.waiting = slot.waiting[: N_BATCH - batch.n_tokens], slot.waiting[N_BATCH - batch.n_tokens :]
            for token in taken:
                at = batch.n_tokens
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, len(slot.cached), 1
                batch.seq_id[at][0], batch.logits[at] = slot.number, False
                slot.cached.append(token)
                batch.n_tokens += 1
            if taken and not slot.waiting:
                batch.logits[batch.n_tokens - 1] = True
                rows.append((slot, batch.n_tokens - 1))
        if code := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        found = []
        for slot, row in rows:
            logits = llama_cpp.llama_get_logits_ith(self._context, row)
            token = int(
                np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self._vocab,)).argmax()
            )
            found.append((slot.conversation, [token]))
            slot.missing -= 1
            slot.waiting = [token]
            if not slot.missing:
                slot.conversation = -1
        at_s = time.perf_counter()
        return [(conversation, ids, at_s) for conversation, ids in found]


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens of `one` `other` begins with; at least one of `other` is left to be computed."""
    count = 0
    for a, b in zip(one, other[:-1], strict=False):
        if a != b:
            break
        count += 1
    return count


def converted(checkpoint: Path, folder: Path, weights: str) -> Path:
    """The checkpoint, a GPT-2, as GGUF, made once; what llama.cpp's own converter writes for it but for the vocabulary,
    of which it has the size only.
    """
    import json

    from gguf import GGMLQuantizationType, GGUFWriter, quants
    from safetensors.numpy import load_file

    target = folder / f"llamacpp-{weights}.gguf"
    if target.exists():
        return target
    config = json.loads((checkpoint / "config.json").read_text())
    kind = {"f32": GGMLQuantizationType.F32, "bf16": GGMLQuantizationType.BF16, "q8_0": GGMLQuantizationType.Q8_0}[
        weights
    ]
    partial = target.with_suffix(".partial")
    writer = GGUFWriter(partial, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    parts = {
        "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    }  # fmt: skip
    for layer in range(config["n_layer"]):
        names |= {f"h.{layer}.{part}": f"blk.{layer}.{name}" for part, name in parts.items()}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        stem, _, suffix = name.removeprefix("transformer.").rpartition(".")
        if stem not in names:
            continue  # the output's weights are the embedding's
        data = tensor.astype(np.float32)
        if ".c_" in f".{stem}" and suffix == "weight":
            data = np.ascontiguousarray(data.T)  # transformers' Conv1D is [in, out]
        stays = data.ndim == 1 or stem == "wpe" or weights == "f32"
        if stays:
            writer.add_tensor(f"{names[stem]}.{suffix}", data)
        else:
            writer.add_tensor(f"{names[stem]}.{suffix}", quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)
    return target


if __name__ == "__main__":
    serving.serve(Parallel)
