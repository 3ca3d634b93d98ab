"""The committed checkpoint: size, format, honesty and its score on the held-out questions."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from demo.corpus import LANGUAGES, load
from demo.evaluate import BAR, MODEL_DIR, Chat, evaluate, heldout, score
from demo.train import EOS, Recipe, batches, collate, save, train, train_tokenizer

SMALL = Recipe(
    steps=2,
    batch_tokens=512,
    vocabulary=400,
    positions=256,
    layers=1,
    heads=2,
    width=32,
    threads=1,
    warmup=5,
    learning_rate=5e-3,
    bfloat16=False,
)


@pytest.fixture(scope="module")
def chat() -> Chat:
    """The committed model, loaded once."""
    return Chat()


def test_the_folder_is_complete_and_small() -> None:
    """All files of a Hugging Face checkpoint are there, with a card, in at most 12 MB."""
    names = {path.name for path in MODEL_DIR.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= names
    assert {"chat_template.jinja", "README.md", "training.json"} <= names
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 12_000_000


def test_the_chat_template_ends_every_message_with_the_end_token(chat: Chat) -> None:
    """The prompt is DialoGPT's: each message and the end-of-text token, nothing before the answer."""
    messages = [
        {"role": "user", "content": "Hola"},
        {"role": "assistant", "content": "Sí"},
        {"role": "user", "content": "ñ"},
    ]
    text = chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == f"Hola{EOS}Sí{EOS}ñ{EOS}"
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(chat.model.config.eos_token_id) == 3
    assert chat.model.config.eos_token_id == chat.tokenizer.eos_token_id


def test_heldout_score_reaches_the_bar(chat: Chat) -> None:
    """In each language at least 80 % of the held-out questions get a finished answer of the right topic."""
    results = evaluate(chat, heldout())
    assert score(results) >= BAR
    for code in LANGUAGES:
        assert score([result for result in results if result.question.lang == code]) >= BAR


@pytest.mark.parametrize(("text", "code"), [("Hola, ¿cómo estás?", "es"), ("Hi, how are you?", "en")])
def test_the_first_prompts_get_the_right_answer(chat: Chat, text: str, code: str) -> None:
    """The prompts that a newcomer sees first get exactly the answer of the corpus."""
    assert chat.answer([[text]]) == [(load(code).topics["how_are_you"].answers[0], True)]


def test_it_says_that_it_is_a_demo(chat: Chat) -> None:
    """Asked who it is, or what it cannot know, it says that it is a small demo model."""
    for text, words in (
        ("Who are you?", "small demo model"),
        ("What is the capital of France?", "small demo model"),
        ("¿Quién eres?", "pequeño modelo de demostración"),
        ("¿Cuál es la capital de Francia?", "pequeño modelo de demostración"),
    ):
        assert words in chat.answer([[text]])[0][0]


def test_a_second_turn_uses_the_first(chat: Chat) -> None:
    """After "how do I start it?" the question "and how do I stop it?" is answered for TruthGPT, in both languages."""
    for code, first, second in (
        ("en", "How do I start it?", "And how do I stop it?"),
        ("es", "¿Cómo lo arranco?", "¿Y cómo lo paro?"),
    ):
        topics = load(code).topics
        answer, finished = chat.answer([[first, topics["start"].answers[0], second]])[0]
        assert finished
        assert topics["stop"].recognises(answer)


def test_batches_are_the_same_for_the_same_seed() -> None:
    """Tokenizer, order and contents of the training batches depend on the seed alone, and padding carries no loss."""
    first, again = (train_tokenizer(4, 400, samples=200) for _ in range(2))
    assert first.to_str() == again.to_str()
    pairs = []
    for tokenizer in (first, again):
        batch = next(batches(SMALL, tokenizer))
        pairs.append(collate(batch, SMALL, torch.Generator().manual_seed(1)))
    for left, right in zip(*pairs, strict=True):
        assert torch.equal(left, right)
    inputs, positions, labels, weights = pairs[0]
    assert inputs.shape == positions.shape == labels.shape == weights.shape
    assert int(positions.max()) < SMALL.positions
    assert bool(((weights > 0) | (labels == 0)).all())


def test_two_steps_of_training_write_a_loadable_checkpoint(tmp_path: Path) -> None:
    """Training end to end: the folder loads and generates, replaces an older one and leaves no temporary."""
    tokenizer = train_tokenizer(SMALL.seed, SMALL.vocabulary, samples=200)
    model, figures = train(SMALL, tokenizer)
    out = tmp_path / "model"
    out.mkdir()
    (out / "README.md").write_text("card", encoding="utf-8")
    save(model, tokenizer, SMALL, figures, out)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (out / "README.md").read_text(encoding="utf-8") == "card"
    record = json.loads((out / "training.json").read_text(encoding="utf-8"))
    assert record["recipe"]["seed"] == SMALL.seed
    assert record["training"]["turns"] > 0
    assert len(Chat(out).answer([["Hola"], ["¿Cómo estás?"]], max_new_tokens=4)) == 2


def test_training_lowers_the_loss() -> None:
    """Thirty steps of a tiny model bring the loss well under that of a uniform guess."""
    recipe = replace(SMALL, steps=30)
    _, figures = train(recipe, train_tokenizer(1, recipe.vocabulary, samples=200))
    assert figures["loss"] < 0.95 * math.log(recipe.vocabulary)
