from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.inflight.answer import Answer
from backends.inflight.request import SamplingParams
from backends.inflight.sampling import Pick
from backends.inflight.sequence import Delta, Sequence

from .fakes import Collector

LETTERS = "abcde"
END = len(LETTERS)


def decode(ids):
    """A letter a token; the end token is special and so has no text."""
    return "".join(LETTERS[i] for i in ids if i != END)


def run(tokens: list[int], budget: int, eos: frozenset[int] = frozenset({END}), **params) -> tuple[list[Delta], str]:
    """What a sequence says to these tokens until it ends, and the text that goes out."""
    sequence = Sequence([0], SamplingParams(temperature=0.0, **params), budget, eos, decode, Collector(), 0.0, END + 1)
    deltas: list[Delta] = []
    for token in tokens:
        deltas.append(sequence.accept(Pick(token)))
        if deltas[-1].finish is not None:
            break
    answer = Answer(decode)
    answer.write(deltas)
    return deltas, answer.cut().text


@given(st.lists(st.integers(0, END), min_size=1, max_size=30), st.integers(1, 30))
def test_without_stop_strings_the_text_is_made_by_whoever_sends_it(tokens, budget):
    """The engine only says where the answer ends; the text is that of the tokens before the end."""
    deltas, text = run(tokens, budget)
    assert all(delta.text is None for delta in deltas)
    end = tokens.index(END) if END in tokens else len(tokens)
    assert text == decode(tokens[: min(end, budget)])
    expected = "stop" if end < budget and end < len(tokens) else "length" if budget <= len(tokens) else None
    assert deltas[-1].finish == expected and all(delta.finish is None for delta in deltas[:-1])


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=2),
    st.integers(0, 8),
)
def test_a_stop_string_ends_the_answer_with_the_token_that_completes_it(tokens, stops, least):
    """The first one to be complete with a token after min_tokens counts, wherever it began; nothing of it is shown."""
    deltas, text = run(tokens, 100, stop=tuple(stops), min_tokens=least)
    whole = decode(tokens)
    found = [(end, end - len(stop)) for end in range(least + 1, len(whole) + 1) for stop in stops
             if whole[:end].endswith(stop)]  # fmt: skip
    if not found:
        assert deltas[-1].finish is None and whole.startswith(text)
        return
    first = min(end for end, _ in found)
    assert deltas[-1].finish == "stop" and len(deltas) == first
    assert text == whole[: min(begin for end, begin in found if end == first)]


def test_what_was_held_back_is_shown_when_the_answer_ends():
    """Text that might have become a stop string is text once nothing follows."""
    for budget, finish in ((2, "length"), (9, "stop")):
        deltas, text = run([0, 1, END], budget, stop=("abc",))
        assert text == "ab" and deltas[-1].finish == finish


@pytest.mark.parametrize("ignore", [False, True])
def test_a_stop_token_ends_the_answer_also_where_end_tokens_do_not(ignore):
    """ignore_eos concerns the model's own end tokens only; the stop token is counted and not shown."""
    deltas, text = run([1, END, 2, 3], 9, ignore_eos=ignore, stop_token_ids=(2,))
    assert [delta.finish for delta in deltas] == ([None, None, "stop"] if ignore else [None, "stop"])
    assert text == "b"


@given(st.lists(st.binary(min_size=1, max_size=3), min_size=1, max_size=20), st.lists(st.integers(1, 5), max_size=10))
def test_the_text_does_not_depend_on_how_the_tokens_were_sent(tokens, sizes):
    """However many tokens one response has, the answer is the same, also of bytes that are no UTF-8."""

    def bytes_of(ids):
        return b"".join(tokens[i] for i in ids).decode("utf-8", "replace")

    deltas = [Delta(Pick(i), "length" if i == len(tokens) - 1 else None) for i in range(len(tokens))]
    once, often = Answer(bytes_of), Answer(bytes_of)
    once.write(deltas)
    cuts = [0, *(min(sum(sizes[: i + 1]), len(deltas)) for i in range(len(sizes))), len(deltas)]
    parts = []
    for begin, end in pairwise(cuts):
        often.write(deltas[begin:end])
        parts.append(often.cut())
    whole = once.cut()
    assert "".join(part.text for part in parts) == whole.text
    assert sum(part.tokens for part in parts) == whole.tokens == len(tokens)
