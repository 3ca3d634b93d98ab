"""Tiny checkpoints with random weights and a real byte-level BPE tokenizer, in the Hugging Face format.

Torch and transformers are imported inside the functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.export.families import Family, random_model

END = "<|endoftext|>"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_CORPUS = (
    "Hola, ¿cómo estás? Estoy muy bien, gracias. ¿Qué tiempo hace hoy en la ciudad?",
    "Hello, how are you? I am fine, thank you. What is the weather like in the city today?",
    "El modelo aprende palabras del corpus y responde en español o en inglés.",
    "The model learns words from the corpus and answers in Spanish or in English.",
    "Por la mañana tomamos café con leche; por la tarde paseamos junto al río.",
    "In the morning we drink coffee with milk; in the afternoon we walk along the river.",
)
VOCAB_SIZE = 384


def write_tokenizer(folder: Path, chat_template: str | None = None) -> None:
    """Train a byte-level BPE tokenizer of `VOCAB_SIZE` tokens on a few sentences and save it into the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END)
    if chat_template is not None:
        fast.chat_template = chat_template
    fast.save_pretrained(folder)


def write_checkpoint(
    folder: Path, family: str, chat_template: str | None = None, seed: int = 0, **overrides: Any
) -> Path:
    """Save a tiny random model of a family (``gpt2``, ``llama``, ``mistral``, ``qwen2``, …) with its tokenizer.

    ``overrides`` are configuration fields. Returns the folder, which is made if it does not exist.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.1,
    }
    if family != "gpt2":
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 128, "pad_token_id": None}
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        config = AutoConfig.for_model(family, **(sizes | overrides))
        model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.random.set_rng_state(state)
    model.save_pretrained(folder)
    write_tokenizer(folder, chat_template)
    return folder


def write_family(folder: Path, family: Family) -> Path:
    """Save a tiny random model of any exported family with its tokenizer; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    random_model(family).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_gpt2(folder: Path, chat_template: str | None = None, **overrides: Any) -> Path:
    """A tiny random GPT-2; see `write_checkpoint`."""
    return write_checkpoint(folder, "gpt2", chat_template, **overrides)


def write_llama(folder: Path, chat_template: str | None = TEMPLATE, **overrides: Any) -> Path:
    """A tiny random Llama with a chat template and grouped key/value heads; see `write_checkpoint`."""
    return write_checkpoint(folder, "llama", chat_template, **overrides)


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of a saved config.json (None removes one)."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def greedy_texts(checkpoint: Path, prompts: Sequence[Sequence[int]], count: int, **loading: Any) -> list[str]:
    """What transformers' `generate` makes of prompts of token ids in fp32, one at a time, `count` tokens at most."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, **loading).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, pad_token_id=0
            )
        texts.append(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))
    return texts
