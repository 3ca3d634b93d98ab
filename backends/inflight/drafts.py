"""Prompt lookup: what followed the last time that a sequence's latest tokens occurred is a draft of what comes next.

Source: Saxena, Prompt Lookup Decoding, 2023 (https://github.com/apoorvumang/prompt-lookup-decoding); verifying drafts:
Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023 (https://arxiv.org/abs/2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence as Ids

LONGEST, SHORTEST = 3, 2  # tokens of a match; what follows a single token says little
FADE = 0.95  # of older comparisons at each new one
PRIOR = 4.0  # comparisons that a sequence's own must outweigh


class Lookup:
    """An index over one sequence's tokens that grows with them: a few dictionary entries a token, no search.

    It follows the text in silence, too: each generated token is compared with the one that a draft would have had, so
    how good drafts are is known before one is paid for.
    """

    def __init__(self, tokens: Ids[int], generated_from: int) -> None:
        """`tokens` is read again at each `follow`; those from `generated_from` on are the model's."""
        self._tokens, self._generated_from = tokens, generated_from
        self._after: dict[tuple[int, ...], int] = {}  # some tokens -> where what followed them last begins
        self._seen = 0
        self._source = -1  # where the draft of the next token is; -1: there is none
        self.hits = self.compared = 0.0  # of late

    def follow(self) -> None:
        """Take in the tokens that came since."""
        tokens = self._tokens
        for i in range(self._seen, len(tokens)):
            hit = self._source >= 0 and tokens[self._source] == tokens[i]
            if self._source >= 0 and i >= self._generated_from:
                self.hits = self.hits * FADE + hit
                self.compared = self.compared * FADE + 1
            for length in range(SHORTEST, LONGEST + 1):
                if i >= length:
                    self._after[tuple(tokens[i - length : i])] = i
            self._source = self._source + 1 if hit else self._find(i + 1)
        self._seen = len(tokens)

    def draft(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next. A text that repeats itself is drafted on beyond its end."""
        if self._source < 0:
            return []
        draft: list[int] = []
        for place in range(self._source, self._source + most):
            behind = place - len(self._tokens)
            draft.append(self._tokens[place] if behind < 0 else draft[behind])
        return draft

    def acceptance(self, usual: float) -> float:
        """How likely the next token of a draft is right, where `usual` is what is so of sequences in general."""
        return (self.hits + PRIOR * usual) / (self.compared + PRIOR)

    def _find(self, end: int) -> int:
        for length in range(min(LONGEST, end), SHORTEST - 1, -1):
            place = self._after.get(tuple(self._tokens[end - length : end]), -1)
            if place >= 0:
                return place
        return -1
