"""What one answer is made of, and what makes it none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.bench.answers import MAX_MESSAGE, Answer, Fault, HttpReader, error_text, mapping, natural, shown


def test_tokens_of_one_moment_share_the_time_before_them() -> None:
    """What one read brought came at once: three tokens 0.3 s after the first are one gap with three in it."""
    answer = Answer(8)
    for now in (1.0, 1.3, 1.3, 1.3, 1.5):
        answer.piece(now)
    answer.count(5, 4)
    answer.finish(1.6, streams=True)
    assert answer.first == 1.0 and answer.last == 1.5 and answer.tokens == 5
    assert [(round(gap, 6), came) for gap, came in answer.gaps] == [(0.3, 3), (0.2, 1)]


def test_pieces_of_several_tokens_each_are_spread() -> None:
    """A server that counts more tokens than it sent pieces put as many in each; one that tells each is believed."""
    spread, told = Answer(8), Answer(8)
    for at in range(3):
        spread.piece(1.0 + at)
        told.piece(1.0 + at, tokens=1 + at)
    for answer in (spread, told):
        answer.count(6, None)
        answer.finish(4.0, streams=True)
    assert spread.gaps == [(1.0, 2.0), (1.0, 2.0)] and told.gaps == [(1.0, 2), (1.0, 3)]


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 20)), min_size=1, max_size=30))
def test_every_token_after_the_first_moment_is_in_a_gap(pieces: list[tuple[float, int]]) -> None:
    """Gaps add up to the time from first to last, and the tokens in them to all that came after the first moment."""
    answer, now, first = Answer(1000), 1.0, 0
    for pause, tokens in pieces:
        now += pause
        answer.piece(now, tokens)
        first += tokens if now == answer.first else 0
    assert sum(gap for gap, _ in answer.gaps) == pytest.approx(answer.last - answer.first)
    assert sum(came for _, came in answer.gaps) == sum(tokens for _, tokens in pieces) - first


def test_an_answer_in_one_piece_has_its_first_token_at_its_end() -> None:
    """Without a stream a user sees nothing before all is there."""
    answer = Answer(8)
    answer.piece(1.0)
    answer.finish(2.0, streams=False)
    assert answer.first == answer.last == 2.0 and answer.tokens == 1 and answer.gaps == []


def test_counts_that_cannot_be_are_faults() -> None:
    """More than was asked for, none though there is text, no numbers, negative ones."""
    with pytest.raises(Fault, match="at most 8") as caught:
        Answer(8).count(9, 1)
    assert caught.value.kind == "wrong_usage"
    answer = Answer(8)
    answer.piece(1.0)
    answer.count(0, 1)
    with pytest.raises(Fault, match="no output tokens"):
        answer.finish(2.0, streams=True)
    for wrong in (-1, True, "3", 1.0, [1], {"a": 1}):
        with pytest.raises(Fault) as caught:
            natural("output", wrong)
        assert caught.value.kind == "wrong_usage"


def test_a_stream_of_pieces_without_end_is_ended() -> None:
    """Some thousand pieces after four for each token nobody waits any longer, whatever the time-out."""
    answer = Answer(8)
    with pytest.raises(Fault) as caught:
        for at in range(10_000):
            answer.piece(float(at + 1))
    assert caught.value.kind == "endless" and answer.pieces < 1100


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"error": {"message": "no such model", "type": "x"}}, "no such model"), ({"error": "gone"}, "gone"),
        ({"message": "bare"}, "bare"), ({"detail": "fastapi"}, "fastapi"), ({"error": {"code": 3}}, ""), ([1], ""),
        ("text", ""), (None, ""), ({"error": ["a"]}, ""),
    ],
)  # fmt: skip
def test_the_sentence_of_an_error_is_found(body: object, said: str) -> None:
    """OpenAI's form, KServe's, bare ones; what is none of them is no sentence and no failure."""
    assert error_text(body) == said


def test_a_body_that_holds_an_error_is_no_answer() -> None:
    """Whatever its status was; and neither is what is no object."""
    with pytest.raises(Fault, match="boom") as caught:
        mapping(b'{"error": {"message": "boom"}, "choices": []}', "the body")
    assert caught.value.kind == "in_band"
    for data in (b"[]", b"{", b"", b"\xff\xfe", b"null", b"[" * 100_000, b'"a"'):
        with pytest.raises(Fault) as caught:
            mapping(data, "the body")
        assert caught.value.kind == "nonsense"


@given(st.text(st.characters(exclude_categories=())))
def test_a_servers_words_are_fit_for_a_terminal(text: str) -> None:
    """One line, short, nothing that moves a cursor or could not be written."""
    line = shown(text)
    assert line.isprintable() and len(line) <= MAX_MESSAGE
    assert line == line.encode().decode() == str(Fault("kind", text))


def test_what_looks_like_a_secret_or_is_one_is_not_repeated() -> None:
    """Keys are known by their looks, and the run's own is known even where the text was long."""
    assert "sk-12345" not in shown("Authorization: Bearer sk-12345 is not valid")
    fault = Fault("http_401", "no key plain-word here " * 30 + "plain-word")
    assert "plain-word" in str(fault)
    hidden = fault.without(["plain-word"])
    assert "plain-w" not in str(hidden) and "no key *** here" in str(hidden) and hidden.kind == "http_401"


@pytest.mark.parametrize(
    ("kind", "encoding", "fault"),
    [
        ("application/json; charset=utf-8", "", None), ("Application/JSON", "identity", None),
        ("text/html", "", "content_type"), ("", "", "content_type"), ("application/json", "gzip", "content_encoding"),
    ],
)  # fmt: skip
def test_the_head_of_an_answer_is_looked_at(kind: str, encoding: str, fault: str | None) -> None:
    """A 200 of another type or encoding than was asked for is a fault at once; an error may have any."""
    reader = HttpReader(Answer(8))
    HttpReader(Answer(8)).head(503, kind, encoding)
    if fault is None:
        return reader.head(200, kind, encoding)
    with pytest.raises(Fault) as caught:
        reader.head(200, kind, encoding)
    assert caught.value.kind == fault
    return None
