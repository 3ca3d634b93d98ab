"""Drafts from a sequence's own tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backends.inflight.drafts import LONGEST, SHORTEST, Lookup


def searched(tokens: list[int], most: int) -> list[int]:
    """The draft by search: what followed the latest occurrence of the longest suffix."""
    for length in range(LONGEST, SHORTEST - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[len(tokens) - length :]:
                text = list(tokens)
                for place in range(end, end + most):
                    text.append(text[place])
                return text[len(tokens) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 10))
def test_a_first_draft_is_what_a_search_finds(tokens, most):
    """The index answers as a search through all tokens does, and drafts a repetition on beyond the text's end."""
    lookup = Lookup(tokens, len(tokens))
    lookup.follow()
    if lookup.compared == 0 and tokens:
        # a draft that goes on being right is followed, instead of being looked up anew
        fresh = searched(tokens, most)
        assert bool(lookup.draft(most)) == bool(fresh)
    assert all(token in tokens for token in lookup.draft(most))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.data())
def test_tokens_that_come_one_by_one_make_the_same_index(tokens, data):
    """Growing with the text gives the drafts and the comparisons that reading it at once gives."""
    start = data.draw(st.integers(0, len(tokens)))
    whole = Lookup(tokens, start)
    whole.follow()
    growing: list[int] = []
    lookup = Lookup(growing, start)
    for token in tokens:
        growing.append(token)
        if data.draw(st.booleans()):
            lookup.follow()
    lookup.follow()
    assert lookup.draft(8) == whole.draft(8)
    assert (lookup.hits, lookup.compared) == (whole.hits, whole.compared)


def test_a_repeating_text_is_drafted_and_known_to_be_repeating() -> None:
    """After some rounds the draft is the text's future and its acceptance near one; a random text's is near nothing."""
    tokens = [1, 2, 3, 4] * 10
    lookup = Lookup(tokens, 0)
    lookup.follow()
    assert lookup.draft(6) == [1, 2, 3, 4, 1, 2]
    assert lookup.acceptance(0.3) > 0.85
    hopeless = Lookup([t for i in range(60) for t in (1, 2, 100 + i)], 0)
    hopeless.follow()
    assert hopeless.acceptance(0.3) < 0.2


def test_the_prompt_does_not_count_as_the_models_text() -> None:
    """How well a prompt repeats itself says nothing about the answer: its tokens are not compared."""
    lookup = Lookup([1, 2] * 20, 40)
    lookup.follow()
    assert lookup.compared == 0 and lookup.draft(2) == [1, 2]
