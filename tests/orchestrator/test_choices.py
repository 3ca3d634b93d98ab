"""Several answers and their log-probabilities: pieces, rows, and which are the best."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.choices import Choice, joined, merged, of_row
from orchestrator.domain import Chunk, GenerateRequest
from orchestrator.output import LOGPROBS_MAX_CHARS, ChoicesGuard, best

ENTRY = st.builds(lambda logprob: {"token": "a", "logprob": logprob}, st.floats(-20, 0))


@settings(deadline=None)
@given(st.lists(st.lists(ENTRY, max_size=4), max_size=6))
def test_joined_lists_are_the_list_of_all(parts: list[list[dict[str, object]]]) -> None:
    """Texts of JSON lists are joined without reading them, in any spelling, and mean the lists one after another."""
    texts = [json.dumps(part, indent=index % 2 or None) for index, part in enumerate(parts)]
    assert json.loads(joined(texts) or "[]") == [entry for part in parts for entry in part]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.text(max_size=3), st.integers(0, 2)), max_size=12))
def test_pieces_become_wholes(rows: list[tuple[int, str, int]]) -> None:
    """However pieces are interleaved, each answer is its own pieces in order, and a row makes the same choice again."""
    pieces = [Choice(index, text, tokens, "stop", "[1]" * bool(tokens)) for index, text, tokens in rows]
    wholes = merged(pieces)
    assert [whole.index for whole in wholes] == sorted({index for index, _, _ in rows})
    for whole in wholes:
        own = [row for row in rows if row[0] == whole.index]
        assert (whole.text, whole.tokens) == ("".join(row[1] for row in own), sum(row[2] for row in own))
        assert of_row(json.loads(json.dumps(whole.row()))) == whole


@pytest.mark.parametrize(
    "row", [[], [0, "a", 1, None], ["0", "a", 1, None, ""], [0, "a", 1, 2, ""], [0, 1, 1, None, ""]]
)
def test_what_is_no_row_is_refused(row: list[object]) -> None:
    """A damaged entry of the cache is no answer."""
    with pytest.raises(ValueError):
        of_row(row)


def _answer(index: int, *logprobs: float) -> Choice:
    return Choice(index, str(index), len(logprobs), "stop", json.dumps([{"logprob": value} for value in logprobs]))


def test_the_best_have_the_highest_mean() -> None:
    """Length makes no difference, of equals the first comes first, and indexes count the ranks."""
    answers = [_answer(0, -3.0), _answer(1, -1.0, -1.0, -1.0), _answer(2, -1.0), _answer(3)]
    found = best(answers, 3, keep_logprobs=False)
    assert [(choice.index, choice.text, choice.logprobs) for choice in found] == [
        (0, "1", ""),
        (1, "2", ""),
        (2, "0", ""),
    ]
    assert best(answers, 1, keep_logprobs=True)[0].logprobs == answers[1].logprobs


def _request(**fields: object) -> GenerateRequest:
    return GenerateRequest(id="r", model="m", accepted_at=0.0, text="x", **fields)  # type: ignore[arg-type]


def test_each_answer_has_the_limit_for_itself() -> None:
    """One that is too long ends with length and gets no more text, the other goes on; what was made counts."""
    guard = ChoicesGuard(_request(n=2), 3)
    first = guard.feed(Chunk("abcd12", 5, choices=(Choice(0, "abcd", 3), Choice(1, "12", 2))))
    assert [(one.text, one.finish_reason) for one in first.choices] == [("abc", "length"), ("12", None)]
    assert (first.text, first.finish_reason, guard.ended) == ("abc12", None, False)
    second = guard.feed(Chunk("ef3", 2, choices=(Choice(0, "ef", 1), Choice(1, "3", 1, "stop"))))
    assert [(one.index, one.text) for one in second.choices] == [(1, "3")]
    assert (second.tokens, second.finish_reason, guard.ended, guard.empty) == (2, "length", True, False)


def test_log_probabilities_have_a_limit_too() -> None:
    """An answer whose log-probabilities grow past the bound ends with length: memory stays bounded."""
    guard = ChoicesGuard(_request(logprobs=20), 5000)
    fed = guard.feed(Chunk("a", 1, choices=(Choice(0, "a", 1, None, "x" * (LOGPROBS_MAX_CHARS + 1)),)))
    assert (fed.finish_reason, guard.ended) == ("length", True)


def test_the_best_come_at_the_end_and_all_tokens_count() -> None:
    """Of best_of answers there is one chunk: the n likeliest, with the tokens of all and the queue's time."""
    guard = ChoicesGuard(_request(n=1, best_of=2), 5000)
    assert guard.holds
    pieces = tuple(_answer(index, -2.0 + index) for index in range(2))
    guard.feed(Chunk("a", 1, choices=(Choice(0, "a", 1, None, json.dumps([{"logprob": -9.0}])),), queue_s=0.25))
    last = guard.feed(Chunk("01", 2, 7, "stop", choices=pieces))
    assert [(one.index, one.text, one.logprobs) for one in last.choices] == [(0, "1", "")]
    assert (last.tokens, last.prompt_tokens, last.text, last.queue_s, last.finish_reason) == (3, 7, "1", 0.25, "stop")
