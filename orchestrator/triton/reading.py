"""One answer of `generate_stream` while it comes: from bytes to chunks, and until when the next bytes have to be there.

Chunks are handed on where the bytes arrive, without waking a task for each: that is most of what a token costs here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from orchestrator.domain import Chunk
from orchestrator.errors import DeadlineExceeded, TruthGPTError, UpstreamUnavailable
from orchestrator.sse import EventParser
from orchestrator.triton.attendance import Deadlines
from orchestrator.triton.wire import Read, pieces

EVENT_LIMIT_BYTES = 1 << 20
# Of an event with choices: what piled up in it while this process stood still may have the twenty likeliest tokens of
# every token of every answer, 2 KB each.
CHOICES_LIMIT_BYTES = 32 << 20

Put = Callable[[Chunk], bool]  # takes the next chunk, and says whether no more is wanted


class Reading:
    """What has been read of an answer. Times are loop times, in seconds; `finished`: the model came to its end.

    `read` reads the events of a request that is not plain.
    """

    def __init__(
        self, put: Put, deadlines: Deadlines, sent_at: float, first_at: float, total_at: float, read: Read | None = None
    ) -> None:  # fmt: skip
        self.finished = False
        self._read = read
        self._put, self._deadlines = put, deadlines
        self._sent_at, self._first_at, self._total_at = sent_at, first_at, total_at
        self._deadline = first_at  # of the next token
        self._now = asyncio.get_running_loop().time
        self._parser = EventParser(EVENT_LIMIT_BYTES if read is None else CHOICES_LIMIT_BYTES)
        self._tokens = self._prompt_tokens = 0
        self._cached_tokens: int | None = None
        self._queue_s: float | None = 0.0  # until the first chunk has told of it

    def feed(self, data: bytes) -> bool:
        """Hand on the chunks that these bytes complete; whether no more is wanted. Raises TruthGPTError."""
        for piece in pieces(self._parser, data, self._read):
            self._tokens += piece.tokens
            prompt_tokens = self._prompt_tokens or piece.prompt_tokens
            self.finished = piece.finish_reason is not None
            if piece.cached_tokens is not None:
                self._cached_tokens = max(self._cached_tokens or 0, piece.cached_tokens)
            if not (piece.text or self.finished or piece.choices):
                # it keeps the connection alive, or tells of the admission
                if prompt_tokens and not self._prompt_tokens:
                    self._queue_s = self._now() - self._sent_at
                self._prompt_tokens = prompt_tokens
                continue
            self._prompt_tokens = piece.prompt_tokens = prompt_tokens
            if self._cached_tokens is not None:
                piece.cached_tokens = self._cached_tokens
            piece.tokens, piece.queue_s = self._tokens, self._queue_s
            self._tokens, self._queue_s = 0, None
            if self._put(piece) or self.finished:
                return True
            self._deadline = min(self._total_at, self._now() + self._deadlines.token_gap_s)
        return False

    def until(self, heard_at: float) -> float:
        """When the next bytes have to be there at the latest, given when the last ones came."""
        return min(max(heard_at, self._sent_at) + self._deadlines.stall_s, self._deadline)

    def late(self) -> TruthGPTError:
        """What it means that they are not."""
        now = self._now()
        if now < self._deadline:
            return UpstreamUnavailable(f"Triton sent nothing for {self._deadlines.stall_s} s", server=True)
        if self._deadline in (self._first_at, self._total_at):
            return DeadlineExceeded()
        return UpstreamUnavailable(f"no token for {self._deadlines.token_gap_s} s")
