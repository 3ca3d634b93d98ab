"""The corpus: Spanish and English dialogues written from the templates in `demo/data`, reproducible from a seed.

A conversation has one to eight turns. Every question may come with an opener or a closer, in lower case, without
accents or punctuation, with a typing slip or a small word missing, as people write; the answers stay as they are.
"""

from __future__ import annotations

import math
import random
import re
import tomllib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from demo.grammar import Node, count, expand_macros, normal, parse, pattern, sample, tidy

DATA = Path(__file__).parent / "data"
LANGUAGES = ("en", "es")
# How many turns a conversation has, and how often: single questions are what the demo is asked most.
_TURNS = ((1, 46), (2, 26), (3, 16), (4, 5), (5, 3), (6, 2), (8, 2))
_SCRIPTED = 0.04  # share of conversations that follow a scripted dialogue ("and how do I stop it?")
_SWITCH = 0.08  # chance that a turn is in the other language


@dataclass(frozen=True)
class Topic:
    """One subject in one language: question trees, canonical answers and the rule that recognises its answers."""

    name: str
    questions: tuple[Node, ...]
    weights: tuple[float, ...]
    answers: tuple[str, ...]
    marker: re.Pattern[str]
    weight: float
    plain: bool  # small talk: takes no opener, a greeting before a greeting would be odd

    def recognises(self, answer: str) -> bool:
        """Return whether `answer` is one of this topic's answers, by its marking words."""
        return self.marker.search(answer.casefold()) is not None


@dataclass(frozen=True)
class Language:
    """Everything the corpus knows in one language."""

    code: str
    openers: tuple[str, ...]
    closers: tuple[str, ...]
    stopwords: frozenset[str]
    topics: dict[str, Topic]
    dialogues: tuple[tuple[tuple[str, Node, str | None], ...], ...]


@dataclass(frozen=True)
class Turn:
    """One question and its answer."""

    language: str
    topic: str
    question: str
    answer: str


@cache
def load(code: str) -> Language:
    """Return the language `code` ("en" or "es") read from `demo/data`. Raises OSError or GrammarError on bad data."""
    raw: dict[str, Any] = tomllib.loads((DATA / f"{code}.toml").read_text(encoding="utf-8"))
    macros: dict[str, str] = raw["macros"]

    def tree(template: str) -> Node:
        return parse(expand_macros(template, macros))

    topics = {}
    for name, entry in raw["topics"].items():
        questions = tuple(tree(line) for line in entry["questions"].splitlines() if line.strip())
        topics[name] = Topic(
            name=name,
            questions=questions,
            # Lines that can write more sentences are drawn more often, but only by the logarithm of their number.
            weights=tuple(1.0 + math.log2(count(question)) for question in questions),
            answers=tuple(entry["answers"]),
            marker=re.compile(entry["marker"]),
            weight=float(entry.get("weight", 1)),
            plain=bool(entry.get("plain", False)),
        )
    dialogues = tuple(
        tuple((turn[0], tree(turn[1]), turn[2] if len(turn) > 2 else None) for turn in dialogue["turns"])
        for dialogue in raw["dialogues"]
    )
    words = frozenset(raw["stopwords"])
    return Language(code, tuple(raw["openers"]), tuple(raw["closers"]), words, topics, dialogues)


def detect_language(text: str) -> str | None:
    """Return the language whose small words are more frequent in `text`, None for a tie."""
    words = re.findall(r"\w+", text.lower())
    scores = {code: sum(word in load(code).stopwords for word in words) for code in LANGUAGES}
    if scores["en"] == scores["es"]:
        return None
    return max(scores, key=lambda code: scores[code])


def could_write(text: str) -> str | None:
    """Return "language/topic" of a template that can write `text` (case, accents, punctuation aside), or None."""
    wanted = normal(text)
    for code in LANGUAGES:
        for topic in load(code).topics.values():
            if _recogniser(code, topic.name).fullmatch(wanted):
                return f"{code}/{topic.name}"
    return None


@cache
def _recogniser(code: str, topic: str) -> re.Pattern[str]:
    language = load(code)
    questions = "|".join(pattern(question) for question in language.topics[topic].questions)
    openers = "|".join(pattern(opener) for opener in language.openers)
    closers = "|".join(pattern(closer) for closer in language.closers)
    return re.compile(rf"\s*(?:{openers})?\s*(?:{questions})\s*(?:{closers})?\s*")


def conversations(seed: int) -> Iterator[list[Turn]]:
    """Yield conversations without end, always the same ones for the same seed."""
    rng = random.Random(seed)  # noqa: S311 -- a corpus, not a secret
    lengths, chances = zip(*_TURNS, strict=True)
    while True:
        language = load(rng.choice(LANGUAGES))
        if rng.random() < _SCRIPTED:
            yield _scripted(language, rng)
            continue
        turns: list[Turn] = []
        for _ in range(rng.choices(lengths, chances)[0]):
            if turns and rng.random() < _SWITCH:
                language = load("es" if language.code == "en" else "en")
            turns.append(_turn(language, rng))
        yield turns


def _scripted(language: Language, rng: random.Random) -> list[Turn]:
    turns = []
    for topic, question, answer in rng.choice(language.dialogues):
        text = vary(tidy(sample(question, rng)), language, rng, plain=True)
        turns.append(Turn(language.code, topic, text, answer or rng.choice(language.topics[topic].answers)))
    return turns


def _turn(language: Language, rng: random.Random) -> Turn:
    topics = list(language.topics.values())
    topic = rng.choices(topics, [topic.weight for topic in topics])[0]
    question = tidy(sample(rng.choices(topic.questions, topic.weights)[0], rng))
    text = vary(question, language, rng, plain=topic.plain)
    return Turn(language.code, topic.name, text, rng.choice(topic.answers))


def vary(text: str, language: Language, rng: random.Random, *, plain: bool = False) -> str:
    """Return `text` as somebody might type it: opener, closer, case, accents, punctuation, slips."""
    if rng.random() < (0.06 if plain else 0.25):
        text = rng.choice(language.openers) + text
    if rng.random() < (0.06 if plain else 0.2):
        text = re.sub(r"([?!.]?)$", lambda end: rng.choice(language.closers) + end.group(1), text, count=1)
    words = text.split(" ")
    if len(words) > 4 and rng.random() < 0.2:
        small = [i for i, word in enumerate(words) if word.lower() in language.stopwords]
        if small:
            words.pop(rng.choice(small))
    if rng.random() < 0.15:
        long = [i for i, word in enumerate(words) if len(word) >= 5 and word.isalpha()]
        if long:
            place = rng.choice(long)
            words[place] = _slip(words[place], rng)
    text = " ".join(words)
    if rng.random() < 0.25:
        text = re.sub(r"[¿?¡!.,]+", "", text)
    elif rng.random() < 0.25:
        text = re.sub(r"[¿¡]", "", text)
    if rng.random() < 0.2:
        text = "".join(c for c in unicodedata.normalize("NFD", text) if c != "\u0301")
        text = unicodedata.normalize("NFC", text)
    if rng.random() < 0.25:
        return text.lower()
    if rng.random() < 0.85:
        # The templates begin in lower case so that openers can stand before them.
        return re.sub(r"[^\W\d_]", lambda letter: letter.group().upper(), text, count=1)
    return text


def _slip(word: str, rng: random.Random) -> str:
    place = rng.randrange(1, len(word) - 1)
    kind = rng.randrange(3)
    if kind == 0:
        return word[:place] + word[place + 1 :]
    if kind == 1:
        return word[:place] + word[place] + word[place:]
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
