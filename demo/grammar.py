"""A tiny template grammar: ``(a|b|)`` picks one alternative, ``{name|text}`` inserts a macro with ``@`` = text.

The same tree serves twice: `sample` writes corpus sentences, `pattern` gives a regular expression that recognises every
sentence the template can write, which is how the tests prove that the held-out questions are not in the corpus.
"""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

_MACRO = re.compile(r"\{(\w+)(?:\|([^{}]*))?\}")
_MAX_DEPTH = 12


class GrammarError(ValueError):
    """A template with unbalanced brackets, an unknown macro or macros that never end."""


@dataclass(frozen=True)
class Sequence:
    """Parts written one after the other."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """Alternatives of which one is written."""

    options: tuple[Node, ...]


Node = str | Sequence | Choice


def expand_macros(template: str, macros: Mapping[str, str]) -> str:
    """Return `template` with every macro replaced, innermost first. Raises GrammarError: one is unknown or endless."""

    def replace(match: re.Match[str]) -> str:
        name, argument = match.group(1), match.group(2)
        if name not in macros:
            raise GrammarError(f"unknown macro {name!r} in {template!r}")
        return macros[name].replace("@", f"({argument})" if argument is not None else "")

    for _ in range(_MAX_DEPTH):
        if "{" not in template:
            return template
        template = _MACRO.sub(replace, template)
    raise GrammarError(f"macros do not end in {template[:80]!r}")


def parse(template: str) -> Node:
    """Return the tree of a template without macros. Raises GrammarError where brackets do not balance."""
    node, end = _parse_choice(template, 0)
    if end != len(template):
        raise GrammarError(f"unbalanced bracket at {end} in {template[:80]!r}")
    return node


def _parse_choice(text: str, start: int) -> tuple[Node, int]:
    options: list[Node] = []
    parts: list[Node] = []
    position = literal = start

    def flush(end: int) -> None:
        if end > literal:
            parts.append(text[literal:end])

    while position < len(text) and text[position] != ")":
        if text[position] == "(":
            flush(position)
            inner, position = _parse_choice(text, position + 1)
            if position >= len(text):
                raise GrammarError(f"a bracket stays open in {text[:80]!r}")
            parts.append(inner)
            position = literal = position + 1
        elif text[position] == "|":
            flush(position)
            options.append(Sequence(tuple(parts)))
            parts = []
            position = literal = position + 1
        else:
            position += 1
    flush(position)
    options.append(Sequence(tuple(parts)))
    return (options[0] if len(options) == 1 else Choice(tuple(options))), position


def count(node: Node) -> int:
    """Return how many sentences (not necessarily distinct) the tree can write."""
    if isinstance(node, str):
        return 1
    if isinstance(node, Sequence):
        return math.prod(count(part) for part in node.parts)
    return sum(count(option) for option in node.options)


def sample(node: Node, rng: random.Random) -> str:
    """Return one sentence of the tree, every alternative equally likely."""
    if isinstance(node, str):
        return node
    if isinstance(node, Sequence):
        return "".join(sample(part, rng) for part in node.parts)
    return sample(rng.choice(node.options), rng)


def tidy(text: str) -> str:
    """Return `text` without the doubled spaces and the spaces before punctuation that empty alternatives leave."""
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r" ([?!,.])", r"\1", text)


def normal(text: str) -> str:
    """Return `text` as comparisons should see it: lower case, no accents, only letters, digits and single spaces."""
    bare = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if not unicodedata.combining(c))
    return " ".join(re.findall(r"[a-z0-9]+", bare))


def pattern(node: Node) -> str:
    """Return a regular expression for `normal(sentence) + " "` of every sentence the tree can write."""
    if isinstance(node, str):
        words = re.findall(r"\S+|\s+", node)
        return "".join(r"\s*" if word.isspace() else _literal(word) for word in words)
    if isinstance(node, Sequence):
        return "".join(pattern(part) for part in node.parts)
    return "(?:" + "|".join(pattern(option) for option in node.options) + ")"


def _literal(word: str) -> str:
    # Punctuation becomes optional space, because `normal` turns it into a word boundary.
    bare = "".join(c for c in unicodedata.normalize("NFD", word.lower()) if not unicodedata.combining(c))
    return re.sub(r"[^a-z0-9]+", r"\\s*", bare)
