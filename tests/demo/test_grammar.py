"""The template grammar: what it writes, what it recognises and what it refuses."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.grammar import GrammarError, count, expand_macros, normal, parse, pattern, sample, tidy


def test_choices_nest_and_empty_alternatives_are_allowed() -> None:
    """Every sentence of a small template, and no other, comes out."""
    node = parse("a (b|c (d|e)|) f")
    rng = random.Random(1)
    assert count(node) == 4
    assert {tidy(sample(node, rng)) for _ in range(200)} == {"a b f", "a c d f", "a c e f", "a f"}


def test_macros_take_text_and_nest() -> None:
    """A macro with text puts it, bracketed, where its @ stands; macros inside macros are replaced too."""
    macros = {"ask": "(how|why) @ {end}", "end": "(now|then)"}
    assert expand_macros("{ask|stop|go}", macros) == "(how|why) (stop|go) (now|then)"


@pytest.mark.parametrize("template", ["(a|b", "a)b", "((a)"])
def test_unbalanced_brackets_are_refused(template: str) -> None:
    """A template with an open or a surplus bracket raises GrammarError."""
    with pytest.raises(GrammarError, match="bracket"):
        parse(template)


@pytest.mark.parametrize(("template", "message"), [("{nobody}", "unknown macro"), ("{loop}", "do not end")])
def test_bad_macros_are_refused(template: str, message: str) -> None:
    """An unknown macro and one that contains itself raise GrammarError instead of looping."""
    with pytest.raises(GrammarError, match=message):
        expand_macros(template, {"loop": "x {loop}"})


SHAPES = st.recursive(
    st.sampled_from(["uno", "¿qué", "dos?", "Hi, "]), lambda part: st.lists(part, min_size=1, max_size=3)
)


@given(SHAPES)
def test_the_pattern_recognises_everything_the_tree_writes(shape: object) -> None:
    """For random templates, any sample matches the pattern of its own tree: the disjointness test cannot miss."""

    def build(part: object) -> str:
        return part if isinstance(part, str) else "(" + "|".join(build(p) for p in part) + ") x"  # type: ignore[attr-defined]

    node = parse(build(shape))
    sentence = tidy(sample(node, random.Random(7)))
    assert re.fullmatch(rf"\s*{pattern(node)}\s*", normal(sentence))
