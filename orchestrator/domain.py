"""What a request, its answer and its record are, free of any wire format. Nothing of ours is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Caller:
    """Who asks. Every operation of the gateway takes one, so that no path can forget it."""

    id: str
    language: str = "en"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """Generate text. Exactly one of `text`, `token_ids` and `messages` is set; they never show in a repr.

    `max_tokens` None lets the gateway choose; `top_k` 0 and `top_p` 1 are off; `temperature` 0 is greedy; `accepted_at`
    is `time.monotonic()` of the moment the request was accepted, in seconds.
    """

    id: str
    model: str
    accepted_at: float
    text: str | None = field(default=None, repr=False)
    token_ids: tuple[int, ...] | None = field(default=None, repr=False)
    messages: tuple[Message, ...] | None = field(default=None, repr=False)
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = field(default=(), repr=False)
    stream: bool = False
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer; the last one has a finish reason. `tokens` were generated since the chunk before."""

    text: str = field(repr=False)
    tokens: int = 0
    prompt_tokens: int = 0
    finish_reason: str | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of a request and its answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def plus(self, chunk: Chunk) -> Usage:
        return Usage(self.prompt_tokens or chunk.prompt_tokens, self.completion_tokens + chunk.tokens)


@dataclass(frozen=True)
class Model:
    """A served model as callers may see it. `created` is Unix time in seconds; `max_len` counts tokens."""

    name: str
    version: str
    created: int
    ready: bool
    task: str = "text_generation"
    chat: bool = False
    max_len: int | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """What happened to one request: made once, when it ends, and handed to every sink. Never holds text of the prompt.

    `outcome` is ok, error or cancelled; `error` the kind of the error. `accepted` is Unix time, durations are seconds,
    measured from acceptance; `ttft_s` is the time to the first text.
    """

    id: str
    caller: str
    operation: str
    model: str
    stream: bool
    outcome: str
    error: str | None
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    accepted: float
    ttft_s: float | None
    duration_s: float
    traceparent: str | None
