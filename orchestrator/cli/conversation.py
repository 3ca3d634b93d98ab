"""A conversation with a model, as a chat holds it: turns, what no longer fits, and what a terminal may be shown."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field

Message = dict[str, str]

# How the gateway and the backend say that a prompt is too long for a model: by its context's length.
_TOO_LONG = re.compile(r"\bcontext of (\d+)\b")
# What turns text around for the eye (Unicode's bidirectional controls) or ends a line unseen.
_UNSEEN = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029\ufeff")


def too_long(status: int | None, message: str) -> bool:
    """Whether this refusal means that the conversation has more tokens than the model's context."""
    return status == 400 and _TOO_LONG.search(message) is not None


def shown(text: str) -> str:
    """What of a model's answer a terminal may be given: control characters but line ends and tabs are spelt out, so
    that no answer moves the cursor, renames the window or hides what it says.
    """
    return "".join(letter if _harmless(letter) else f"\\x{ord(letter):02x}" for letter in text.replace("\r\n", "\n"))


def _harmless(letter: str) -> bool:
    return letter in "\n\t" or (unicodedata.category(letter) not in ("Cc", "Cs") and letter not in _UNSEEN)


@dataclass
class Conversation:
    """Turns in order: each is what a person said and the answer, or as much of it as came. `max_chars` bounds all the
    text of a request, as the gateway does.
    """

    system: str | None = None
    max_chars: int = 10_000
    turns: list[tuple[str, str]] = field(default_factory=list)

    def messages(self, text: str) -> list[Message]:
        """What is sent with the next thing that is said."""
        return [*self._said(), {"role": "user", "content": text}]

    def add(self, text: str, answer: str) -> None:
        self.turns.append((text, answer))

    def overflows(self, text: str) -> bool:
        """Whether a gateway would cut this off, or refuse it, for its length in characters."""
        return sum(len(message["content"]) for message in self.messages(text)) > self.max_chars

    def shorter(self) -> Conversation | None:
        """The same without the older half of its turns, so that the next ones fit as well; None when there are none."""
        if not self.turns:
            return None
        return Conversation(self.system, self.max_chars, self.turns[(len(self.turns) + 1) // 2 :])

    def document(self, model: str) -> dict[str, object]:
        """What is saved: the messages as OpenAI's API takes them."""
        return {"model": model, "messages": self._said()}

    def _said(self) -> list[Message]:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for text, answer in self.turns:
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return messages
