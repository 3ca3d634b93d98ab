"""What becomes of one sequence's tokens on the way to its client: text, log-probabilities and counts.

The engine's thread only leaves tokens here; the sending thread makes text of them, for its own time is not the other
requests'. An answer with stop strings is the exception: its end depends on the text, so the engine made that already.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass

from .sampling import Pick
from .sequence import Delta
from .text import Detokenizer

LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot say; OpenAI's and vLLM's number

Head = Callable[[int, bool], str]


@dataclass(frozen=True, slots=True)
class Part:
    """What one response says of one answer. `logprobs` is a JSON list with an entry for each of the `tokens`, empty
    where none are wanted.
    """

    text: str = ""
    finish: str = ""
    tokens: int = 0
    logprobs: str = "[]"


class Answer:
    """One answer between engine and client. `decode` maps token ids to text; `head` is there if log-probabilities are
    wanted, see pieces.Pieces. `echo` stands in front of the answer's text.
    """

    def __init__(self, decode: Callable[[Ids[int]], str], head: Head | None = None) -> None:
        self.arrived: list[Delta] = []  # the engine appends to it
        self.ended = False  # nothing more arrives
        self.spoke = False  # its first text has been cut
        self.echo = ""
        self._detokenizer = Detokenizer(decode)
        self._head = head
        self._text: list[str] = []
        self._entries: list[str] = []
        self._finish = ""
        self._tokens = 0  # since the last cut
        self._count, self._sum = 0, 0.0  # of all tokens and of their log-probabilities

    @property
    def has_news(self) -> bool:
        """Whether a cut would show anything. Tokens that complete no text wait for one that does."""
        return bool(self._text or self._finish)

    @property
    def mean_logprob(self) -> float:
        """Of the tokens that have one; minus infinity without tokens."""
        return self._sum / self._count if self._count else float("-inf")

    def collect(self) -> list[Delta]:
        """What has arrived since the last call."""
        arrived, self.arrived = self.arrived, []
        return arrived

    def write(self, deltas: Ids[Delta]) -> None:
        """Make text and entries of what arrived."""
        for pick, finish, text in deltas:
            if text is None:
                text = "" if finish == "stop" else self._detokenizer.push(pick.token)  # an end token is not shown
                if finish is not None:
                    text += self._detokenizer.flush()
            if text:
                self._text.append(text)
            if finish is not None:
                self._finish = finish
            if self._head is not None:
                self._entries.append(_entry(pick, self._count == 0, self._head))
            self._tokens += 1
            self._count += 1
            if pick.logprob is not None:
                self._sum += max(pick.logprob, LEAST_LOGPROB)

    def cut(self) -> Part:
        """All that was written since the last cut."""
        text = "".join(self._text)
        if self.echo and (text or self._finish):
            text, self.echo = self.echo + text, ""
        self.spoke = self.spoke or bool(text)
        part = Part(text, self._finish, self._tokens, f"[{','.join(self._entries)}]")
        self._text, self._finish, self._tokens, self._entries = [], "", 0, []
        return part


def _entry(pick: Pick, first: bool, head: Head) -> str:
    """A token's JSON object, with the likeliest tokens of its place."""
    logprob = LEAST_LOGPROB if pick.logprob is None else max(pick.logprob, LEAST_LOGPROB)
    top = ",".join(f"{head(token, first)}{max(likely, LEAST_LOGPROB)!r}}}" for token, likely in pick.top)
    return f'{head(pick.token, first)}{logprob!r},"top":[{top}]}}'
