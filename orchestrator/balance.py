"""Which of several servers is asked next, and when one that failed is asked again. Pure: the time is an argument.

Least outstanding requests, ties at random, so that workers who know nothing of each other do not all choose alike; or,
for prompts that begin alike, the highest of the servers' random weights for that beginning (rendezvous hashing, Thaler
and Ravishankar 1998) with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018): the server that is theirs is passed
over while it has much more to do than the others.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol, TypeVar

from orchestrator.domain import GenerateRequest

LONGEST_REST_S = 60.0
FORGIVEN_S = 60.0  # in service without a failure, and the next rest is a first one again
PREFIX_CHARS = 256  # of a prompt, by which its server is chosen
PREFIX_IDS = 64  # the same of one that is token ids
BOUND = 1.25  # times the mean of outstanding requests, and one more: what an affine server takes at most


class Candidate(Protocol):
    """A server that may be asked. `outstanding`: requests that it has from this process."""

    @property
    def url(self) -> str: ...
    @property
    def outstanding(self) -> int: ...


C = TypeVar("C", bound=Candidate)


def least(candidates: Sequence[C]) -> C:
    """The candidate with the fewest outstanding requests, any of those that tie. Raises ValueError for none."""
    fewest = min(candidate.outstanding for candidate in candidates)
    tied = [candidate for candidate in candidates if candidate.outstanding == fewest]
    return tied[0] if len(tied) == 1 else random.choice(tied)  # noqa: S311 (spreads load, hides nothing)


def affine(key: bytes, candidates: Sequence[C]) -> C:
    """The candidate that is this key's own, or the next one by weight while that has too much to do.

    A candidate more or less moves only the keys that are its own. Raises ValueError for none.
    """
    most = BOUND * sum(candidate.outstanding for candidate in candidates) / max(1, len(candidates)) + 1
    free = [candidate for candidate in candidates if candidate.outstanding <= most]  # whoever is at the mean is free
    return max(free, key=lambda candidate: (_weight(key, candidate.url), candidate.url))


def _weight(key: bytes, url: str) -> bytes:
    return blake2b(key, digest_size=8, key=blake2b(url.encode(), digest_size=32).digest()).digest()


def prefix_of(request: GenerateRequest) -> bytes:
    """What prompts that begin alike share: the model, and the first characters of the text or of the messages."""
    if request.messages is not None:
        parts: list[str] = []
        for turn in request.messages:
            parts.append(f"{turn.role}\x1e{turn.content[:PREFIX_CHARS]}\x1e")
            if sum(map(len, parts)) >= PREFIX_CHARS:
                break
        text = "".join(parts)[:PREFIX_CHARS]
    elif request.token_ids is not None:
        text = " ".join(map(str, request.token_ids[:PREFIX_IDS]))
    else:
        text = (request.text or "")[:PREFIX_CHARS]
    return f"{request.model}\x1f{text}".encode(errors="surrogatepass")


@dataclass
class Ejection:
    """One server's rests. All times are seconds of one monotonic clock.

    A failure begins a rest of `first_s`; each further one, of a server that was back, one twice as long, up to a
    minute, until it was a minute in service without one. It is back when the rest is over and it has answered a
    heartbeat that was asked after its last failure.
    """

    first_s: float
    rest_s: float = 0.0  # how long the last rest was to be
    until: float | None = None  # when it ends, or ended
    failed_at: float | None = None

    def resting(self, now: float, answered_at: float) -> bool:
        """Whether it rests. `answered_at`: when the last heartbeat was asked that it has answered."""
        if self.until is None or self.failed_at is None:
            return False
        return now < self.until or answered_at <= self.failed_at

    def fail(self, began: float, now: float, answered_at: float) -> bool:
        """Something that was asked at `began` failed; whether a rest begins with it.

        What was asked before the last failure is part of that one: of a hundred streams that a server had, the end is
        one failure. One of a server that rests, and was asked for want of another, only has it answer anew.
        """
        if self.failed_at is not None and began <= self.failed_at:
            return False
        if self.resting(now, answered_at):
            self.failed_at = now
            return False
        again = self.until is not None and now < self.until + FORGIVEN_S
        self.rest_s = min(LONGEST_REST_S, 2 * self.rest_s if again else self.first_s)
        self.until, self.failed_at = now + self.rest_s, now
        return True


def newest(versions: Iterable[str]) -> str:
    """The version that most have; of several such the newest. Raises ValueError for none."""
    counts: dict[str, int] = {}
    for version in versions:
        counts[version] = counts.get(version, 0) + 1
    return max(counts, key=lambda version: (counts[version], int(version) if version.isdecimal() else -1, version))
