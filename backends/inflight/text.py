"""From tokens to text that may be shown: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
# A UTF-8 character has at most 4 bytes, so 4 byte-level tokens; what is still undecodable after that is not one.
MAX_PENDING_TOKENS = 4
MAX_WINDOW = 64  # tokens


class Detokenizer:
    """Incremental decoding: `push` returns the new text, never half a character.

    `decode` maps token ids to text (special tokens skipped). Decoding one token alone would lose the space that some
    tokenisers put in front, so each step decodes a short window of tokens and returns what is new in it. A token may
    end one character and begin the next, so what is out is counted in characters and not in tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the window
        self._whole = 0  # the text of ids[:_whole] ended with a character; the next cut of the window is there
        self._shown = 0  # how many characters of the window's text are out
        self._held = 0  # tokens since text came out

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is incomplete."""
        self._ids.append(token)
        self._held += 1
        new = self._take()
        if self._held < MAX_PENDING_TOKENS:
            return new
        # The oldest pending token cannot belong to a character that is still incomplete. Bytes that are no character
        # must not join with what follows, so the window begins anew behind it.
        cut = len(self._ids) - self._held + 1
        new = self._decode(self._ids[cut - 1 : cut])
        del self._ids[:cut]
        self._whole = self._shown = 0
        self._held -= 1
        return new + self._take()

    def flush(self) -> str:
        """What is left when generation ends; an incomplete character shows as U+FFFD."""
        new = self._decode(self._ids[-self._held :]) if self._held else self._decode(self._ids)[self._shown :]
        self._ids, self._whole, self._shown, self._held = [], 0, 0, 0
        return new

    def _take(self) -> str:
        """The window's text that is certain and not out yet; cuts the window where that is possible."""
        text = self._decode(self._ids)
        end = len(text.rstrip(REPLACEMENT))  # what is behind may be the beginning of a character
        new = text[self._shown : end]
        if end == len(text):
            self._held = 0
        if new:
            self._held = 0
            self._shown = end
            if end == len(text):  # the tokens that brought this text are the next one's context
                del self._ids[: self._whole]
                self._whole, self._shown = len(self._ids), len(self._decode(self._ids))
        if len(self._ids) > MAX_WINDOW:  # of tokens that end inside characters, or that have no text
            del self._ids[: -MAX_WINDOW // 4]
            self._whole, self._shown = 0, len(self._decode(self._ids).rstrip(REPLACEMENT))
        return new


class StopFilter:
    """Holds back text that may turn out to be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._exempt = 0  # characters of what is held; a stop string that ends among them is none
        self.stopped = False

    def push(self, text: str, look: bool = True) -> str:
        """The text that is certain; sets `stopped` once a stop string is complete (it and what follows is dropped).

        Without `look` none is complete with this text, though one may begin with it.
        """
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        held = self._held + text
        if not look:
            self._exempt = len(held)
        found = [at for stop in self._stops if (at := held.find(stop, max(0, self._exempt - len(stop) + 1))) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        certain = len(held) - max(_overlap(held, stop) for stop in self._stops)
        self._held, self._exempt = held[certain:], max(0, self._exempt - certain)
        return held[:certain]

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
