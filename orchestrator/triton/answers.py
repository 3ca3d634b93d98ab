"""Chunks of a stream that holds several answers, or one with its log-probabilities: see docs/protocol.md.

Each response then has an element of every answer, empty where that one has nothing new.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from orchestrator.choices import Choice, whole_reason
from orchestrator.domain import FINISH_REASONS, Chunk


class Answers:
    """Reads the responses of one request that `count` answers come of, with `logprobs` if they were asked for."""

    def __init__(self, count: int, logprobs: bool) -> None:
        self._count, self._logprobs = count, logprobs
        self._reasons: dict[int, str] = {}

    def chunk(self, fields: Mapping[str, Any]) -> Chunk:
        """What is new in one response. Raises ValueError, TypeError and KeyError for what makes no sense."""
        texts = self._elements(fields["text_output"])
        reasons = self._elements(fields.get("finish_reason", [""] * self._count))
        tokens = self._elements(fields.get("num_output_tokens", [0] * self._count))
        logprobs = self._elements(fields["logprobs"]) if self._logprobs else [""] * self._count
        choices = []
        for index in range(self._count):
            new, reason = int(tokens[index]), str(reasons[index]) or None
            if not (texts[index] or reason or new) or index in self._reasons:
                continue
            if reason is not None:
                if reason not in FINISH_REASONS:
                    raise ValueError(f"finish_reason {reason!r}")
                self._reasons[index] = reason
            checked = _entries(str(logprobs[index]), new) if self._logprobs else ""
            choices.append(Choice(index, str(texts[index]), new, reason, checked))
        ended = len(self._reasons) == self._count
        return Chunk(
            "".join(choice.text for choice in choices),
            sum(choice.tokens for choice in choices),
            finish_reason=whole_reason(self._reasons.values()) if ended else None,
            choices=tuple(choices),
        )

    def _elements(self, value: Any) -> list[Any]:
        """Triton writes a tensor of one element as a scalar or as a list of one, by its declared shape."""
        elements = value if isinstance(value, list) else [value]
        if len(elements) != self._count:
            raise ValueError(f"{len(elements)} elements where {self._count} were expected")
        return elements


def _entries(text: str, tokens: int) -> str:
    """The text of a list of entries, after a look at each of them."""
    entries = orjson.loads(text) if text else []
    if not isinstance(entries, list) or len(entries) != tokens:
        raise ValueError("not an entry a token")
    for entry in entries:
        for one in (entry, *entry["top"]):
            if not (isinstance(one["token"], str) and isinstance(one["logprob"], float | int)):
                raise ValueError("no entry of a token")
            bytes(one["bytes"])
    return text
