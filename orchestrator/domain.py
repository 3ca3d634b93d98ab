"""What a request, its answer and its record are, free of any wire format. Little of ours is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from orchestrator.choices import Choice

_T = TypeVar("_T")

TASKS = ("text_generation", "sentiment_analysis", "translation", "summarization", "embeddings")
ENDPOINTS = ("generate", "embed", "classify", "infer")  # the operations that limits count apart
FINISH_REASONS = ("stop", "length")


@dataclass(frozen=True)
class Limits:
    """What one caller may do at each endpoint, in any interval of the window's length; 0 is no limit."""

    per_minute: int = 0
    per_hour: int = 0
    per_day: int = 0
    tokens_per_minute: int = 0
    tokens_per_day: int = 0
    concurrency: int = 0


@dataclass(frozen=True)
class Caller:
    """Who asks. Every operation of the gateway takes one, so that no path can forget it.

    `id` is the API key's id, or the client's address where no key is asked for. No answer crosses from one `tenant`
    to another. `scope` is inference or admin; an admin may also infer.
    """

    id: str
    tenant: str = "open"
    scope: str = "inference"
    limits: Limits = Limits()
    language: str = "en"


class Window(NamedTuple):
    """One limit's state after a request was counted. `reset_s`: seconds until something of it is free again."""

    name: str  # minute, hour, day, tokens_minute, tokens_day or concurrency
    limit: int
    used: int
    reset_s: float

    @property
    def remaining(self) -> int:
        return max(0, self.limit - self.used)


@dataclass(frozen=True)
class CachePolicy:
    """What a request wants of the cache (RFC 9111): `lookup` and `store` may be off; `max_age_s` bounds the age."""

    lookup: bool = True
    store: bool = True
    max_age_s: int | None = None


@dataclass
class Notes:
    """What became of a request beside its answer; filled in on the path before the first chunk, shown in headers.

    `edge` is the protocol that the request came by: openai, kserve or grpc; `route` what that calls the operation: a
    method and a path's template, or a gRPC service and method, SERVICE/METHOD. `recorded`: a Record was made.
    `prompt` is the text that the model reads, where it was asked for.
    """

    edge: str = ""
    route: str = ""
    recorded: bool = False
    windows: tuple[Window, ...] = ()
    refused: str | None = None  # the limit that did refuse it
    shadow: str | None = None  # the limit that would have refused it, in shadow mode
    cache: str | None = None  # hit, miss or bypass
    fallback: str | None = None  # "text", or "model=NAME"
    sanitized: tuple[str, ...] = ()  # what was changed in the input
    prompt: str = field(default="", repr=False)

    def add(self, other: Notes) -> None:
        """Take in those of another request that is answered together with this one, and was let in after it."""
        self.windows = other.windows or self.windows
        self.refused, self.shadow = other.refused or self.refused, other.shadow or self.shadow
        self.cache = other.cache if self.cache in (None, other.cache) else "miss"
        self.fallback = self.fallback or other.fallback
        self.recorded = self.recorded or other.recorded
        self.sanitized += tuple(change for change in other.sanitized if change not in self.sanitized)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """Generate text. Exactly one of `text`, `token_ids` and `messages` is set; they never show in a repr.

    `max_tokens` None lets the gateway choose; `top_k` 0 and `top_p` 1 are off; `temperature` 0 is greedy; `accepted_at`
    is `time.monotonic()` of the moment the request was accepted, in seconds; an empty `task` is the model's own. `memo`
    belongs to a body that came before: whoever derives something from the prompt alone keeps it there, a few things.

    `n` answers are wanted, of `best_of` that are made where that is more; `logprobs` is how many of the likeliest
    tokens are told with their log-probabilities beside the chosen ones', None for none at all. `controls` are the
    parameters that only the model reads, by their names on its wire, in one order, those at their default left out.
    `echo`: the prompt's text is wanted as well, in Notes. `priority`: lower goes first in the model's queue.
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
    n: int = 1
    best_of: int = 1
    logprobs: int | None = None
    controls: tuple[tuple[str, Any], ...] = ()
    echo: bool = False
    priority: int = 0
    stream: bool = False
    timeout_s: float | None = None
    task: str = ""
    cache: CachePolicy = CachePolicy()
    traceparent: str | None = None
    memo: dict[object, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def answers(self) -> int:
        """How many the model makes."""
        return max(self.n, self.best_of)

    @property
    def plain(self) -> bool:
        """Whether the answer is one text and nothing beside it; else its chunks have choices."""
        return self.n == 1 and self.logprobs is None and self.best_of == 1


def made(kind: type[_T], **fields: object) -> _T:
    """A frozen dataclass of these fields, at a third of what its own constructor costs: the others have their
    defaults, and nothing is checked.
    """
    one = object.__new__(kind)
    one.__dict__.update(fields)
    return one


def changed(request: _T, **fields: object) -> _T:
    """`dataclasses.replace` for a request, at a tenth of its cost: nothing is checked."""
    other: _T = object.__new__(type(request))
    other.__dict__.update(request.__dict__, **fields)
    return other


@dataclass(slots=True)  # not frozen: one is made for every token, and that doubles what it costs
class Chunk:
    """A piece of an answer; the last one has a finish reason. `tokens` were generated since the chunk before.

    `queue_s`, of the first chunk only: seconds that the request waited in the model's queue, None where nobody knows.
    `version` of the model that wrote it, empty where nobody says. `encoded`, of an encoder's answer: what the text
    says, for those who read it in the process that made it.

    `choices`, of a request that is not plain: what is new of each of its answers. `text` and `tokens` are then those of
    all together, and the finish reason comes when all have ended. `cached_tokens` of the prompt came from the engine's
    prefix cache, None where nobody says.
    """

    text: str = field(repr=False)
    tokens: int = 0
    prompt_tokens: int = 0
    finish_reason: str | None = None
    queue_s: float | None = field(default=None, compare=False)
    version: str = field(default="", compare=False)
    encoded: Encoded | None = field(default=None, compare=False, repr=False)
    choices: tuple[Choice, ...] = ()
    cached_tokens: int | None = field(default=None, compare=False)


@dataclass(slots=True)
class Usage:
    """Tokens of a request and its answer; `cached_tokens` is as in Chunk."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None

    def add(self, chunk: Chunk) -> None:
        self.prompt_tokens = self.prompt_tokens or chunk.prompt_tokens
        self.completion_tokens += chunk.tokens
        if chunk.cached_tokens is not None:
            self.cached_tokens = chunk.cached_tokens


@dataclass(frozen=True, kw_only=True)
class EncodeRequest:
    """Read texts with an encoder: `operation` embed turns each into a vector, classify into a score for each label.

    `accepted_at` is monotonic seconds. `truncate`: a text longer than the model reads is cut there, else refused. Of
    each vector the first `dimensions` are wanted, all by default; whoever shows them cuts. An empty `task` is the
    model's own.
    """

    id: str
    model: str
    accepted_at: float
    texts: tuple[str, ...] = field(repr=False)
    operation: str = "embed"
    truncate: bool = False
    dimensions: int | None = None
    timeout_s: float | None = None
    task: str = ""
    cache: CachePolicy = CachePolicy()
    traceparent: str | None = None


@dataclass(frozen=True)
class Tensor:
    """One named array in row-major order, by KServe v2's datatypes. `shape` counts elements in each dimension.

    A BYTES tensor has its `elements`; every other datatype has `data`, its elements' little-endian bytes.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes = field(default=b"", repr=False)
    elements: tuple[bytes, ...] = field(default=(), repr=False)


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """Run a model that is no generation model once. `accepted_at` is monotonic seconds.

    `outputs` names the tensors that are wanted, empty for all; a number other than 0 asks for that many top classes of
    the tensor instead of the tensor.
    """

    id: str
    model: str
    accepted_at: float
    inputs: tuple[Tensor, ...]
    outputs: Mapping[str, int] = field(default_factory=dict)
    parameters: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    timeout_s: float | None = None
    task: str = "text_generation"
    cache: CachePolicy = CachePolicy()
    traceparent: str | None = None


@dataclass(frozen=True)
class InferResult:
    """What the model answered, with the version that did."""

    model: str
    version: str
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What an entry says of its model. `max_len` counts tokens; None when the entry does not say.

    `operation`, of ENDPOINTS, is what it is for: ours generate, embed or classify, any other is only inferred with.
    `prefix_reuse`: what it has read of one prompt it need not read again of another that begins alike; `tells_cached`:
    it says of how many tokens that was so.
    Encoders make vectors of `dim` elements, of length 1 if `normalized`, or a score for each of `labels`, of
    `max_batch` texts at once.
    """

    task: str = "text_generation"
    chat: bool = False
    prefix_reuse: bool = False
    tells_cached: bool = False
    max_len: int | None = None
    operation: str = "generate"
    dim: int | None = None
    normalized: bool = False
    labels: tuple[str, ...] = ()
    max_batch: int = 1

    @property
    def generates(self) -> bool:
        return self.operation == "generate"


@dataclass(frozen=True)
class Model(Abilities):
    """A served model as callers may see it. `created` is Unix time in seconds.

    `digest` names what is loaded: a model that was exported again has another one. `seen`: that its abilities have been
    read, and are not only supposed.
    """

    name: str
    version: str
    created: int
    ready: bool
    digest: str = ""
    seen: bool = False


@dataclass(frozen=True)
class Encoded:
    """What an encoder made of the texts, with the model that did: a row of each output for each text.

    embed: `embedding` FP32 [texts, dim]. classify: `scores` FP32 [texts, labels], `label` BYTES [texts, 1]. Both:
    `num_input_tokens` UINT32 [texts, 1], of which `tokens` is the sum.
    """

    model: Model
    outputs: Mapping[str, Tensor]
    tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """A request's place in a W3C trace: hexadecimal ids, of the request's own span and of its call to Triton.

    `parent_id` is the span of the client, if it sent one.
    """

    trace_id: str
    parent_id: str | None
    span_id: str
    upstream_id: str
    sampled: bool

    @property
    def traceparent(self) -> str:
        """What Triton is sent (W3C Trace Context, version 00)."""
        return f"00-{self.trace_id}-{self.upstream_id}-{'01' if self.sampled else '00'}"

    @property
    def own(self) -> str:
        """The request's own place, in the same form."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What happened to one request: made once, when it ends, and handed to every sink. Never holds text of the prompt.

    `outcome` is ok, error or cancelled; `error` the kind of the error. `accepted` is Unix time, durations are seconds,
    measured from acceptance; `ttft_s` is the time to the first text. `cache`, `edge`, `route`, `fallback`,
    `sanitized`, `refused` and `shadow` are those of Notes; `limited`: limits apply to the caller, `degraded`: they
    were decided without Redis. `input_hash` is a keyed hash of the prompt, empty where none is made. `upstream_s` is
    the time from asking Triton, or whoever else asked it, to the end; `queue_s` what of it was the model's queue.
    `stages` are the path's stages in order, each with the seconds from acceptance to its end.
    """

    id: str
    caller: str
    tenant: str
    operation: str
    task: str
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
    edge: str = ""
    route: str = ""
    cache: str | None = None
    fallback: str | None = None
    sanitized: tuple[str, ...] = ()
    refused: str | None = None
    shadow: str | None = None
    limited: bool = False
    degraded: bool = False
    input_hash: str = ""
    output_chars: int = 0
    upstream_s: float | None = None
    queue_s: float | None = None
    stages: tuple[tuple[str, float], ...] = ()
    trace: Trace | None = None
