"""From tokens to text that may be shown: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
# A UTF-8 character has at most 4 bytes, so 4 byte-level tokens; what is still undecodable after that is not one.
MAX_PENDING_TOKENS = 4


class Detokenizer:
    """Incremental decoding: `push` returns the new text, never half a character.

    `decode` maps token ids to text (special tokens skipped). Decoding one token alone would lose the space that some
    tokenisers put in front, so each step decodes a short window twice and returns the difference.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0  # ids[:_shown] are in the text already
        self._context = 0  # ids[_context:_shown] are decoded again as context

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is incomplete."""
        self._ids.append(token)
        new = self._difference(len(self._ids))
        if not new.endswith(REPLACEMENT):
            self._advance(len(self._ids))
            return new
        if len(self._ids) - self._shown < MAX_PENDING_TOKENS:
            return ""
        # The oldest pending token cannot belong to a character that is still incomplete.
        new = self._difference(self._shown + 1)
        self._advance(self._shown + 1)
        self._context = self._shown  # bytes that are no character must not join with what follows
        return new

    def flush(self) -> str:
        """What is left when generation ends; an incomplete character shows as U+FFFD."""
        new = self._difference(len(self._ids))
        self._advance(len(self._ids))
        return new

    def _difference(self, end: int) -> str:
        before = self._decode(self._ids[self._context : self._shown])
        return self._decode(self._ids[self._context : end])[len(before) :]

    def _advance(self, end: int) -> None:
        self._context, self._shown = self._shown, end
        if self._context > 64:  # keep the window, not the history
            del self._ids[: self._context]
            self._shown -= self._context
            self._context = 0


class StopFilter:
    """Holds back text that may turn out to be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain; sets `stopped` once a stop string is complete (it and what follows is dropped)."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        held = self._held + text
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        keep = max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back when generation ended without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - length :]):
            return length
    return 0
