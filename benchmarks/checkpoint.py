"""The model that engines are measured with: GPT-2-small's shape, random weights, seed 0, and a tokenizer to suit it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FIRST_WORD = 256  # ids below are single bytes
_WORD = re.compile(r" w(\d+)")


def write(folder: Path, layers: int = 12, width: int = 768, heads: int = 12) -> None:
    """Write the checkpoint. It has no end token, so every answer has its full length.

    Its tokens are the bytes and words, " w0", " w1", …, each of which is one pre-token, so that text and tokens are
    one to one. Rows of bytes are small in the embedding, which is the output too: the most likely token is a word.
    """
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight[:FIRST_WORD] *= 0.01
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġw{number}" for number in range(config.vocab_size - len(alphabet))]
    vocabulary = {token: number for number, token in enumerate([*alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" ?[^ ]+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def ids_of(text: str) -> list[int]:
    """The tokens of an answer's text. Raises ValueError for a text that is not made of words."""
    found = [int(number) + FIRST_WORD for number in _WORD.findall(text)]
    if "".join(f" w{token - FIRST_WORD}" for token in found) != text:
        raise ValueError(f"not words of the checkpoint: {text[:80]!r}")
    return found


def export(
    checkpoint: Path, repository: Path, name: str, precision: str, slots: int, max_len: int, *options: str
) -> None:
    """`truthgpt export` as a process of its own. Raises RuntimeError with what it said."""
    argv = [
        sys.executable, "-m", "export", str(checkpoint), "--name", name, "--precision", precision,
        "--repository", str(repository), "--slots", str(slots), "--max-len", str(max_len), *options,
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"export {precision}: {(done.stderr or done.stdout)[-2000:]}")


def weight_bytes(model: Path) -> int:
    """Bytes of an exported graph's weights that a decode step reads: all but tables of which it gathers a row."""
    import math

    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    gathered = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    read = {name for node in graph.node for at, name in enumerate(node.input) if (node.op_type, at) != ("Gather", 0)}
    bits = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4}
    total = 0
    for tensor in graph.initializer:
        if tensor.name in gathered - read:
            continue
        each = bits.get(tensor.data_type) or onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
        total += math.prod(tensor.dims) * each // 8
    return total
