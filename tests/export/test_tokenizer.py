"""tokenizer.json, special tokens and chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import GPT2Tokenizer

from export.chat import DIALOGPT, chat_template, render
from export.errors import ExportError, SourceError
from export.pipeline import Exported
from export.source import resolve
from export.tokenizer import SAMPLE, load_tokenizer, special_tokens, write_tokenizer
from tests.export.checkpoints import END, TEMPLATE, VOCAB_SIZE, edit_config, write_gpt2

TURNS = [{"role": "user", "content": "Hola"}, {"role": "assistant", "content": "¡Buenas!"}]


def _chosen(folder: Path, given: Path | None = None) -> str | None:
    source = resolve(str(folder))
    tokenizer = load_tokenizer(source)
    return chat_template(source, tokenizer, given, special_tokens(source, tokenizer, VOCAB_SIZE))


def test_tokenizer_encodes_as_the_original(published: Exported, gpt2: Path) -> None:
    """The published tokenizer.json alone gives the ids of transformers' tokenizer, accents and emoji included."""
    ours = Tokenizer.from_file(str(published.path / "tokenizer.json"))
    theirs = load_tokenizer(resolve(str(gpt2)))
    for text in (SAMPLE, "", " ", END, "ñandú\n\n\t€ 漢字", "a" * 500):
        assert ours.encode(text).ids == theirs.encode(text)
    assert ours.decode(ours.encode(SAMPLE).ids) == SAMPLE


def test_a_checkpoint_without_tokenizer_json_is_converted(tmp_path: Path) -> None:
    """Old checkpoints hold vocab.json and merges.txt only: tokenizer.json is made from them."""
    folder = write_gpt2(tmp_path / "old")
    fast = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(fast["vocab"]))
    merges = (" ".join(pair) if isinstance(pair, list) else pair for pair in fast["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    write_tokenizer(load_tokenizer(resolve(str(folder))), tmp_path / "tokenizer.json")
    original = GPT2Tokenizer.from_pretrained(folder)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(SAMPLE).ids == original.encode(SAMPLE)


def test_truncation_and_padding_are_left_behind(tmp_path: Path) -> None:
    """A tokenizer saved with truncation or padding would silently cut prompts: the entry's does neither."""
    folder = write_gpt2(tmp_path / "cut")
    cut = Tokenizer.from_file(str(folder / "tokenizer.json"))
    cut.enable_truncation(4)
    cut.enable_padding(length=8)
    cut.save(str(folder / "tokenizer.json"))
    write_tokenizer(load_tokenizer(resolve(str(folder))), tmp_path / "tokenizer.json")
    assert len(Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(SAMPLE).ids) > 50
    assert len(Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a").ids) == 1


def test_no_tokenizer_is_an_error(tmp_path: Path) -> None:
    """A checkpoint without any tokenizer is refused by a sentence about it."""
    folder = write_gpt2(tmp_path / "mute")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(SourceError, match="tokenizer"):
        load_tokenizer(resolve(str(folder)))


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 7, 5]}, 3, (5, 7)),
        ({"eos_token_id": 5}, 3, (5,)),
        ({}, 3, (3,)),
        ({}, 50256, (0,)),
        (None, None, (0,)),
    ],
)
def test_where_the_end_of_text_comes_from(
    tmp_path: Path, generation: dict[str, object] | None, config: int | None, expected: tuple[int, ...]
) -> None:
    """generation_config.json, then config.json, then the tokenizer; an id outside the vocabulary is nobody's token."""
    folder = write_gpt2(tmp_path / "ends")
    edit_config(folder, eos_token_id=config)
    path = folder / "generation_config.json"
    if generation is None:
        path.unlink()
    else:
        path.write_text(json.dumps(generation))
    source = resolve(str(folder))
    tokens = special_tokens(source, load_tokenizer(source), VOCAB_SIZE)
    assert tokens.eos == expected
    assert tokens.eos_token == END


def test_the_checkpoints_own_template(llama: Path) -> None:
    """The tokenizer's template is taken, and the plain sandbox renders it as transformers does."""
    template = _chosen(llama)
    assert template == TEMPLATE
    source = resolve(str(llama))
    tokenizer = load_tokenizer(source)
    tokens = special_tokens(source, tokenizer, VOCAB_SIZE)
    for prompt in (True, False):
        expected = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=prompt)
        assert render(template, TURNS, tokens, prompt) == expected


def test_a_given_template_wins(llama: Path, tmp_path: Path) -> None:
    """--chat-template FILE replaces the checkpoint's own."""
    given = tmp_path / "mine.jinja"
    given.write_text("{{ messages[0]['content'] }}")
    assert _chosen(llama, given) == "{{ messages[0]['content'] }}"


def test_no_template_is_invented(gpt2: Path) -> None:
    """A GPT-2 that is no DialoGPT cannot chat."""
    assert _chosen(gpt2) is None


@pytest.mark.parametrize("sign", ["folder", "_name_or_path", "task_specific_params"])
def test_dialogpt_ends_every_turn(tmp_path: Path, sign: str) -> None:
    """A DialoGPT, known by its name or its configuration, gets each turn followed by the end-of-text token."""
    folder = write_gpt2(tmp_path / ("DialoGPT-tiny" if sign == "folder" else "gpt"))
    if sign == "_name_or_path":
        edit_config(folder, _name_or_path="microsoft/DialoGPT-small")
    elif sign == "task_specific_params":
        edit_config(folder, task_specific_params={"conversational": {"max_length": 1000}})
    assert _chosen(folder) == DIALOGPT
    source = resolve(str(folder))
    tokens = special_tokens(source, load_tokenizer(source), VOCAB_SIZE)
    assert render(DIALOGPT, TURNS, tokens) == f"Hola{END}¡Buenas!{END}"


@pytest.mark.parametrize("broken", ["{% if %}", "{{ raise_exception('never') }}", "{{ messages.pop() }}"])
def test_a_template_that_does_not_render_is_refused(gpt2: Path, tmp_path: Path, broken: str) -> None:
    """Syntax errors, refusals and attempts to change the conversation are found at export, not at the first chat."""
    given = tmp_path / "broken.jinja"
    given.write_text(broken)
    with pytest.raises(ExportError, match="does not render"):
        _chosen(gpt2, given)
