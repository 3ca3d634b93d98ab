"""Several answers to one request, and their log-probabilities: how pieces become wholes.

Log-probabilities stay the JSON text that the model's backend wrote, a list with an entry a token (docs/protocol.md):
read as objects they would take ten times the memory, and only whoever shows them needs to read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Row = tuple[int, str, int, str | None, str]


@dataclass(slots=True)
class Choice:
    """A piece of one of a request's answers, or the whole of it; `index` counts the answers from 0.

    `tokens` were generated since the piece before, and the last piece has a finish reason. `logprobs` is the JSON text
    of a list with an entry for each of these tokens, empty where nobody asked for them.
    """

    index: int
    text: str = field(repr=False)
    tokens: int = 0
    finish_reason: str | None = None
    logprobs: str = field(default="", repr=False)

    def row(self) -> Row:
        """As JSON can hold it."""
        return self.index, self.text, self.tokens, self.finish_reason, self.logprobs


def of_row(row: Sequence[object]) -> Choice:
    """The choice of a row. Raises ValueError for what is none."""
    index, text, tokens, reason, logprobs = row
    if not (isinstance(index, int) and isinstance(text, str) and isinstance(tokens, int)):
        raise ValueError("no choice")
    if not (isinstance(reason, str | None) and isinstance(logprobs, str)):
        raise ValueError("no choice")
    return Choice(index, text, tokens, reason, logprobs)


def merged(pieces: Iterable[Choice]) -> tuple[Choice, ...]:
    """The answers that these pieces are of, each as one, in the order of their indexes."""
    by_index: dict[int, list[Choice]] = {}
    for piece in pieces:
        by_index.setdefault(piece.index, []).append(piece)
    return tuple(
        Choice(
            index,
            "".join(piece.text for piece in own),
            sum(piece.tokens for piece in own),
            own[-1].finish_reason,
            joined([piece.logprobs for piece in own]),
        )
        for index, own in sorted(by_index.items())
    )


def joined(lists: Iterable[str]) -> str:
    """The texts of several JSON lists as that of one; empty where all are."""
    given = [one for one in lists if one]
    inner = (one.strip()[1:-1].strip() for one in given)
    return f"[{','.join(filter(None, inner))}]" if given else ""


def whole_reason(reasons: Iterable[str | None]) -> str:
    """Why a request with several answers ended, where one word has to say it: length, if any of them did so."""
    return "length" if "length" in reasons else "stop"
