"""The answer's limit and the empty answer, whatever the chunks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.domain import Chunk
from orchestrator.output import OutputGuard


@given(st.text(max_size=40), st.integers(1, 30), st.data())
def test_any_chunks_give_the_same_answer(answer: str, max_chars: int, data: st.DataObject) -> None:
    """However an answer is cut into chunks, the same text comes out, within the limit, with the same last reason."""
    cuts = data.draw(st.lists(st.integers(0, len(answer)), max_size=8).map(sorted))
    parts = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    guard, seen = OutputGuard(max_chars), []
    for index, part in enumerate(parts):
        seen.append(guard.feed(Chunk(part, 1, finish_reason="stop" if index == len(parts) - 1 else None)))
        if guard.ended:
            break
    assert "".join(chunk.text for chunk in seen) == answer[:max_chars]
    assert guard.ended
    last = "length" if len(answer) > max_chars else "stop"
    assert [chunk.finish_reason for chunk in seen] == [None] * (len(seen) - 1) + [last]
    assert guard.empty == (answer == "")


def test_nothing_passes_after_the_end() -> None:
    """What a model still sends after the limit has no text left; its tokens, which were generated, still count."""
    guard = OutputGuard(3)
    assert guard.feed(Chunk("hola", 2, 5)) == Chunk("hol", 2, 5, "length")
    assert guard.feed(Chunk("!", 1, 0, "stop")) == Chunk("", 1, 0, "length")


def test_chunks_without_text_are_no_answer() -> None:
    """Tokens that give no character at all are an empty answer, even with a finish reason."""
    guard = OutputGuard(3)
    for chunk in (Chunk("", 1), Chunk("", 1, 0, "stop")):
        assert guard.feed(chunk) == chunk
    assert guard.empty and guard.ended
