"""Prompts: each another one, as long as wanted by the server's count, or from a file."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.bench import prompts
from orchestrator.bench.plan import PlanError, Prompt
from orchestrator.bench.prompts import MOST_WORDS, WORDS, Given, Prompts, Sizing, read_file, size


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=20), st.integers(5, 300))
def test_no_two_prompts_are_alike_and_a_seed_gives_the_same_ones(seed: str, words: int) -> None:
    """As long as wanted, none begins as another does, and who repeats a run sends the same."""
    one, other = Prompts(seed, words), Prompts(seed, words)
    texts = [one.take().text for _ in range(300)]
    assert texts == [other.take().text for _ in range(300)]
    assert len({tuple(text.split()[:5]) for text in texts}) == 300
    assert {len(text.split()) for text in texts} == {words}
    assert len({text.split()[0] for text in texts[: len(WORDS)]}) == len(set(WORDS)) == len(WORDS)


def test_other_seeds_give_other_prompts() -> None:
    """Two runs of a sweep share no prompt."""
    first, second = ({Prompts(seed, 12).take().text for _ in range(1)} for seed in ("0 1", "0 8"))
    assert not first & second


def test_very_short_prompts_and_very_long_ones() -> None:
    """One word is one; 100,000 words are as many."""
    assert len(Prompts("a", 1).take().text.split()) == 1
    assert len(Prompts("a", 100_000).take().text.split()) == 100_000


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20_000), st.floats(0.8, 3), st.integers(0, 60))
async def test_a_size_is_found_in_a_few_questions(wanted: int, per_word: float, template: int) -> None:
    """Whatever a tokeniser makes of a word and a template adds, a few questions come within 2 % where that can be."""
    asked: list[int] = []

    async def ask(words: int) -> int:
        asked.append(words)
        return template + round(per_word * words)

    sizing = await size(wanted, ask)
    assert len(asked) <= prompts.ATTEMPTS and sizing.tokens == template + round(per_word * sizing.words)
    least = template + per_word
    if wanted > least:
        assert abs(sizing.tokens - wanted) <= max(per_word / 2 + 1, prompts.NEAR * wanted)
    else:
        assert sizing.tokens == min(template + round(per_word * words) for words in asked)
    longest = template + per_word * max(asked)  # one that is much longer than wanted might not fit the model
    assert longest <= max(template + per_word * asked[0], 1.25 * wanted + 12)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**6), st.lists(st.integers(0, 10**18), min_size=1, max_size=8))
async def test_a_server_that_counts_nonsense_gets_no_endless_prompt(wanted: int, counts: list[int]) -> None:
    """Whatever it counts, the questions are few and their prompts bounded."""
    asked: list[int] = []

    async def ask(words: int) -> int:
        asked.append(words)
        return counts[len(asked) % len(counts)]

    sizing = await size(wanted, ask)
    assert len(asked) <= prompts.ATTEMPTS and all(1 <= words <= MOST_WORDS * wanted for words in asked)
    assert sizing.words in asked


async def test_where_nobody_counts_a_word_is_a_token() -> None:
    """One question shows it."""

    async def ask(words: int) -> None:
        return None

    assert await size(300, ask) == Sizing(300, None)


def test_prompts_of_a_file_come_in_order_and_again(tmp_path: Path) -> None:
    """Texts, prompts and conversations; empty lines are none."""
    path = tmp_path / "prompts.jsonl"
    turns = {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "¿qué?"}]}
    path.write_text(f'"plain \u2028 text"\n\n{{"prompt": "named"}}\r\n{json.dumps(turns)}', encoding="utf-8")
    found = read_file(path)
    assert found == (Prompt("plain \u2028 text"), Prompt("named"), Prompt(turns=(("system", ""), ("user", "¿qué?"))))
    given = Given(found)
    assert [given.take() for _ in range(7)] == [*found, *found, found[0]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'"a"\n{broken', "line 2: not JSON"), (b'{"messages": []}', "line 1: no prompt"), (b"[1]", "no prompt"),
        (b'{"prompt": ""}', "no prompt"), (b'{"prompt": 3}', "no prompt"),
        (b'{"messages": [{"role": "user"}]}', "no prompt"),
        (b'{"messages": [{"role": 1, "content": "a"}]}', "no prompt"), (b'{"messages": ["a"]}', "no prompt"),
        (b'"\\ud800"', "no prompt"), (b"\xff\xfe", "not UTF-8"), (b"", "0 prompts"), (b"\n \n", "0 prompts"),
        (b"[" * 100_000, "not JSON"), (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "no prompt"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_prompts_is_refused_by_its_line(tmp_path: Path, text: bytes, said: str) -> None:
    """The message names file and line, and the hint the form."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(text)
    with pytest.raises(PlanError, match=said) as caught:
        read_file(path)
    assert "prompts.jsonl" in str(caught.value) and caught.value.hint


def test_a_file_without_end_is_not_read_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that never ends, and a pipe, whose size nobody knows."""
    monkeypatch.setattr(prompts, "MAX_FILE_BYTES", 100_000)
    with pytest.raises(PlanError, match="larger than"):
        read_file(Path("/dev/zero"))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b'"from a pipe"\n',))
    writer.start()
    assert read_file(pipe) == (Prompt("from a pipe"),)
    writer.join()


def test_more_prompts_than_a_file_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted, and how many there may be is said."""
    monkeypatch.setattr(prompts, "MAX_FILE_PROMPTS", 2)
    path: Any = tmp_path / "prompts.jsonl"
    path.write_text('"a"\n' * 3)
    with pytest.raises(PlanError, match="3 prompts"):
        read_file(path)
