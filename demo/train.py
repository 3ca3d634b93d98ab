"""Train the demo model: ``python -m demo.train --out demo/model`` (CPU, two threads, seeded).

GPT-2 architecture (Radford et al. 2019) in Hugging Face format, a byte-level BPE of its own, chat in DialoGPT's form
(Zhang et al. 2019): every turn is followed by the end-of-text token. The folder is written beside `--out` and renamed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from demo.corpus import Turn, conversations

EOS = "<|endoftext|>"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
MODEL_DIR = Path(__file__).parent / "model"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the checkpoint. Lengths in tokens."""

    seed: int = 20
    steps: int = 1800
    batch_tokens: int = 2304
    vocabulary: int = 2048
    positions: int = 512
    layers: int = 4
    heads: int = 4
    width: int = 256
    dropout: float = 0.1
    learning_rate: float = 1.2e-3
    warmup: int = 150
    weight_decay: float = 0.05
    question_weight: float = 0.1  # weight of a question token's loss, against 1 for an answer token
    decision_weight: float = 6.0  # weight of the first tokens of an answer: they choose the topic, the rest is recital
    decision_tokens: int = 3
    token_noise: float = 0.06  # share of question tokens replaced: the model learns to do without an unknown word
    shifted: float = 0.35  # share of conversations that start at a random position, so that all positions are trained
    threads: int = 2
    bfloat16: bool = True


@dataclass(frozen=True)
class Example:
    """One conversation in tokens; `place[i]` counts token i within its answer from 0, and is -1 in a question."""

    ids: list[int]
    place: list[int]


def train_tokenizer(seed: int, vocabulary: int, samples: int = 20_000) -> Tokenizer:
    """Return a byte-level BPE of `vocabulary` tokens, trained on `samples` conversations. Token 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    turns = itertools.chain.from_iterable(itertools.islice(conversations(seed), samples))
    texts = itertools.chain.from_iterable((turn.question, turn.answer) for turn in turns)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(turns: list[Turn], tokenizer: Tokenizer) -> Example:
    """Return the tokens of a conversation: question, end, answer, end, and so on."""
    ids: list[int] = []
    place: list[int] = []
    for turn in turns:
        for text, is_answer in ((turn.question, False), (turn.answer, True)):
            tokens = [*tokenizer.encode(text, add_special_tokens=False).ids, 0]
            ids += tokens
            place += range(len(tokens)) if is_answer else [-1] * len(tokens)
    return Example(ids, place)


def batches(recipe: Recipe, tokenizer: Tokenizer) -> Iterator[list[Example]]:
    """Yield batches without end: conversations of similar length, about `batch_tokens` tokens with the padding."""
    rng = random.Random(recipe.seed)  # noqa: S311 -- an order of training, not a secret
    source = conversations(recipe.seed)
    while True:
        pool = [encode(turns, tokenizer) for turns in itertools.islice(source, 2048)]
        pool = sorted((e for e in pool if len(e.ids) <= recipe.positions), key=lambda e: len(e.ids))
        groups = []
        while pool:
            # The longest decides; few distinct shapes, because oneDNN prepares (and keeps) its kernels for each one.
            rows = max(1, recipe.batch_tokens // _padded(len(pool[-1].ids)))
            groups.append(pool[-rows:])
            del pool[-rows:]
        rng.shuffle(groups)
        yield from groups


def _padded(length: int) -> int:
    return -(-length // 16) * 16


def collate(batch: list[Example], recipe: Recipe, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Return (input_ids, position_ids, labels, weights), each [batch, length]; padding has weight 0."""
    longest = min(recipe.positions, _padded(max(len(e.ids) for e in batch)))
    labels = torch.zeros(len(batch), longest, dtype=torch.long)
    weights = torch.zeros(len(batch), longest)
    question = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, example in enumerate(batch):
        size = len(example.ids)
        labels[row, :size] = torch.tensor(example.ids)
        place = torch.tensor(example.place)
        weights[row, :size] = torch.where(place < recipe.decision_tokens, recipe.decision_weight, 1.0)
        weights[row, :size][place < 0] = recipe.question_weight
        question[row, :size] = place < 0
    noise = torch.rand(labels.shape, generator=rng) < recipe.token_noise
    noise &= question & (labels != 0)
    random_ids = torch.randint(1, recipe.vocabulary, labels.shape, generator=rng)
    inputs = torch.where(noise, random_ids, labels)
    room = recipe.positions - longest
    starts = (torch.rand(len(batch), 1, generator=rng) * (room + 1)).long()
    starts *= torch.rand(len(batch), 1, generator=rng) < recipe.shifted
    return inputs, starts + torch.arange(longest), labels, weights


def build_model(recipe: Recipe) -> GPT2LMHeadModel:
    """Return the untrained model (fp32), tied embeddings, dropout as in the recipe."""
    config = GPT2Config(
        vocab_size=recipe.vocabulary,
        n_positions=recipe.positions,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        resid_pdrop=recipe.dropout,
        embd_pdrop=recipe.dropout,
        attn_pdrop=recipe.dropout,
        bos_token_id=0,
        eos_token_id=0,
        # No padding token yet: with one, transformers asks for a mask, which rows padded on the right do not need.
        pad_token_id=None,
    )
    return GPT2LMHeadModel(config)


def train(recipe: Recipe, tokenizer: Tokenizer) -> tuple[GPT2LMHeadModel, dict[str, float]]:
    """Return the trained model and its figures: seconds, conversations, turns, tokens, loss (of the last 100 steps)."""
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    rng = torch.Generator().manual_seed(recipe.seed)
    model = build_model(recipe).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98), fused=True
    )
    source = batches(recipe, tokenizer)
    seen = {"conversations": 0, "turns": 0, "tokens": 0}
    losses: list[float] = []
    started = time.monotonic()
    for step in range(recipe.steps):
        batch = next(source)
        seen["conversations"] += len(batch)
        seen["turns"] += sum(e.ids.count(0) for e in batch) // 2
        seen["tokens"] += sum(len(e.ids) for e in batch)
        inputs, positions, labels, weights = collate(batch, recipe, rng)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
            logits = model(input_ids=inputs, position_ids=positions, use_cache=False).logits
        each = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
        )
        flat = weights[:, 1:].flatten()
        loss = (each * flat).sum() / flat.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == recipe.steps:
            spent = time.monotonic() - started
            recent = sum(losses[-50:]) / len(losses[-50:])
            left = spent / (step + 1) * (recipe.steps - step - 1)
            print(f"step {step + 1}/{recipe.steps}  loss {recent:.3f}  {spent:.0f} s, {left:.0f} s left", flush=True)
    last = losses[-100:]
    return model.eval(), {"seconds": time.monotonic() - started, "loss": sum(last) / len(last), **seen}


def _schedule(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.04 + 0.96 * 0.5 * (1 + math.cos(math.pi * done))


def save(model: GPT2LMHeadModel, tokenizer: Tokenizer, recipe: Recipe, figures: dict[str, float], out: Path) -> None:
    """Write the Hugging Face folder `out` (weights fp16), replacing an older one. Raises OSError if it cannot."""
    temporary = out.with_name(f".{out.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=recipe.positions,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    model.config.pad_token_id = model.generation_config.pad_token_id = 0
    model.generation_config.do_sample = False
    model.half().save_pretrained(temporary)
    fast.save_pretrained(temporary)
    record = {"recipe": asdict(recipe), "training": {key: round(value, 3) for key, value in figures.items()}}
    (temporary / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    old = out.with_name(f".{out.name}-old-{os.getpid()}")
    if out.exists():
        card = out / "README.md"
        if card.exists():
            shutil.copy2(card, temporary / "README.md")
        out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    """Train and write the model; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo.train", description="Train the bilingual demo model.")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder to write (default: demo/model)")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--threads", type=int, default=Recipe.threads)
    chosen = parser.parse_args(arguments)
    recipe = Recipe(
        seed=chosen.seed,
        steps=chosen.steps,
        threads=chosen.threads,
        # Without AVX-512 BF16 instructions bfloat16 is emulated and slower than fp32.
        bfloat16=torch.cpu._is_avx512_bf16_supported(),
    )
    print(f"training the tokenizer ({recipe.vocabulary} tokens)", flush=True)
    tokenizer = train_tokenizer(recipe.seed, recipe.vocabulary)
    model, figures = train(recipe, tokenizer)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, recipe, figures, chosen.out)
    print(f"wrote {chosen.out} after {figures['seconds']:.0f} s, {figures['turns']} turns, loss {figures['loss']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
