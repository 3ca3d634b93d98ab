from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.cli.conversation import Conversation, shown, too_long

TURNS = st.lists(st.tuples(st.text(max_size=9), st.text(max_size=9)), max_size=9)


@given(text=st.text(), pieces=st.integers(1, 5))
@settings(deadline=None)
def test_a_terminal_gets_no_control_characters(text: str, pieces: int) -> None:
    """Whatever a model says, cut anywhere: only line ends and tabs are left of what terminals obey."""
    size = max(1, len(text) // pieces)
    said = "".join(shown(text[at : at + size]) for at in range(0, len(text), size))
    assert all(letter in "\n\t" or not (ord(letter) < 32 or 127 <= ord(letter) < 160) for letter in said)
    assert not set(said) & set("\u202e\u2066\u2028")


def test_people_s_text_is_left_alone() -> None:
    """Accents, wide letters, emoji with joiners and unusual spaces are shown as they are."""
    text = "¿Qué tal?\n\t你好 👩‍🚀 10\u00a0km\u3000fin"
    assert shown(text) == text
    assert shown("a\r\nb\x1b[31mc\x9bd\u202e") == "a\nb\\x1b[31mc\\x9bd\\x202e"


@given(turns=TURNS, system=st.none() | st.text(max_size=9))
@settings(deadline=None)
def test_a_shorter_conversation_is_its_newer_half(turns: list[tuple[str, str]], system: str | None) -> None:
    """Whole turns go, the oldest first, until none is left; the system message and the newest stay longest."""
    now: Conversation | None = Conversation(system, 100, turns)
    steps = 0
    while now is not None:
        assert now.turns == turns[len(turns) - len(now.turns) :]
        messages = now.messages("x")
        assert messages[-1] == {"role": "user", "content": "x"}
        assert (messages[0]["role"] == "system") == (system is not None)
        assert [m["role"] for m in messages if m["role"] != "system"] == ["user", "assistant"] * len(now.turns) + [
            "user"
        ]
        now, steps = now.shorter(), steps + 1
    assert steps <= len(turns).bit_length() + 1


def test_characters_are_counted_as_the_gateway_does() -> None:
    """All texts together, the system message and what is said now included."""
    talk = Conversation("ab", 10, [("cd", "ef")])
    assert not talk.overflows("1234") and talk.overflows("12345")


@pytest.mark.parametrize(
    ("status", "message", "told"),
    [
        (400, "the prompt has 513 tokens; the model's context of 512 tokens leaves no room to answer", True),
        (400, "max_tokens is 20; 500 prompt tokens leave 12 of the model's context of 512", True),
        (400, "max_tokens must be a whole number", False),
        (429, "the context of 3 is over", False),
        (None, "context of 3", False),
    ],
)
def test_what_is_too_long_is_known_by_its_words(status: int | None, message: str, told: bool) -> None:
    """Only a refusal that names the context's length."""
    assert too_long(status, message) is told
