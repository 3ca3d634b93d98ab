"""What is measured: the endpoint (Target), the load on it (Load) and what its users expect (Goals).

PlanError     a value that no measurement can have; names the field and its limit
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal
from urllib.parse import urlsplit

import orjson

ProtocolName = Literal["openai", "kserve-http", "kserve-grpc"]
EndpointName = Literal["chat", "completions", "embeddings"]
Task = Literal["generate", "encode"]

PROTOCOLS: tuple[ProtocolName, ...] = ("openai", "kserve-http", "kserve-grpc")
ENDPOINTS: tuple[EndpointName, ...] = ("chat", "completions", "embeddings")
MAX_CONCURRENCY = 4096
MAX_RATE = 10_000.0  # requests a second
MAX_REQUESTS = 10_000_000
MAX_TOKENS = 1_000_000
MAX_SECONDS = 86_400.0
SECRET_LETTERS = 6  # of a header's value or a key that may be a secret; less would blank out words
_PORTS = {"http": 80, "https": 443, "grpc": 8001, "grpcs": 443}
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
# gRPC's own names and binary ones are not for people: PROTOCOL-HTTP2.md of grpc, Custom-Metadata
_METADATA = re.compile(r"(?!grpc-)[0-9a-z_.-]+(?<!-bin):[\x20-\x7e]*")
_OWN_HEADERS = {"host", "content-length", "transfer-encoding", "connection", "content-type", "accept-encoding", "te"}
_OWN_FIELDS = {"model", "stream", "stream_options", "messages", "prompt", "input"}


class PlanError(ValueError):
    """A value that no measurement can have; `hint` says what could be given."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Prompt:
    """One prompt: a text, or the turns of a conversation as (role, content)."""

    text: str = ""
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Goals:
    """What a request has to meet to count as good, in seconds; None asks for nothing.

    `itl_s` bounds a request's mean time per output token after its first one.
    """

    ttft_s: float | None = None
    itl_s: float | None = None
    latency_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.to_json().items():
            _number(f"goodput {name}", value, 0, MAX_SECONDS)

    def __bool__(self) -> bool:
        return any(value is not None for value in (self.ttft_s, self.itl_s, self.latency_s))

    def to_json(self) -> dict[str, float]:
        return {one.name: value for one in fields(self) if (value := getattr(self, one.name)) is not None}


@dataclass(frozen=True)
class Target:
    """An endpoint. Raises PlanError.

    `url` is http(s)://HOST[:PORT][/PREFIX]; for kserve-grpc also grpc(s)://HOST:PORT or HOST:PORT. `endpoint` matters
    to openai alone; `task` encode means its embeddings, or plain inference over KServe. Unless `allow_cache` is set,
    servers are asked not to answer from a cache. `ca_file` has the certificates to trust instead of the system's.
    """

    url: str
    protocol: ProtocolName
    model: str
    endpoint: EndpointName = "chat"
    task: Task = "generate"
    stream: bool = True
    allow_cache: bool = False
    api_key: str | None = field(default=None, repr=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    ca_file: str | None = None

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise PlanError(f"protocol: there is no {self.protocol!r}", f"one of {', '.join(PROTOCOLS)}")
        if self.endpoint not in ENDPOINTS:
            raise PlanError(f"endpoint: there is no {self.endpoint!r}", f"one of {', '.join(ENDPOINTS)}")
        if (self.endpoint == "embeddings") != (self.task == "encode") and self.protocol == "openai":
            hint = "embeddings encode; chat and completions generate"
            raise PlanError("task and endpoint contradict each other", hint)
        if not self.model or len(self.model) > 500 or not self.model.isprintable():
            raise PlanError("model: not a name of 1 to 500 printable characters", "give the name that it is served by")
        self._split()
        if self.api_key is not None and re.fullmatch(r"[\x21-\x7e]+", self.api_key) is None:
            raise PlanError("the API key has characters that no key has", "copy it again")
        for name, value in self.headers:
            if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
                raise PlanError(f"header {name[:50]!r} is no header", "give NAME: VALUE in printable characters")
            if name.lower() in _OWN_HEADERS:
                raise PlanError(f"header {name} is set by the measurement itself", "leave it out")
            if self.protocol == "kserve-grpc" and not _METADATA.fullmatch(f"{name.lower()}:{value}"):
                hint = "give letters, digits and -_. as NAME"
                raise PlanError(f"header {name[:50]!r} cannot be sent over gRPC", hint)

    def _split(self) -> tuple[str, str, int, str]:
        bare = self.protocol == "kserve-grpc" and "://" not in self.url
        try:
            parts = urlsplit(f"grpc://{self.url}" if bare else self.url)
            port = parts.port
            known = ("http", "https", "grpc", "grpcs") if self.protocol == "kserve-grpc" else ("http", "https")
            good = parts.scheme in known and parts.hostname and not parts.query and not parts.fragment
        except ValueError:
            good = False
        if not good or re.search(r"[\x00-\x20\x7f-\U0010ffff]", self.url):
            example = "127.0.0.1:8001" if self.protocol == "kserve-grpc" else "http://127.0.0.1:8080"
            raise PlanError("url: not the address of such an endpoint", f"give one such as {example}")
        if parts.username is not None or parts.password is not None:
            raise PlanError("url: it holds a user or a password", "give the key in TRUTHGPT_API_KEY or --api-key-file")
        return parts.scheme, str(parts.hostname), port or _PORTS[parts.scheme], parts.path.rstrip("/")

    @property
    def tls(self) -> bool:
        return self._split()[0] in ("https", "grpcs")

    @property
    def host(self) -> str:
        return self._split()[1]

    @property
    def port(self) -> int:
        return self._split()[2]

    @property
    def prefix(self) -> str:
        """What stands before every path; no slash at its end."""
        return self._split()[3]

    @property
    def converses(self) -> bool:
        """Whether it takes the turns of a conversation."""
        return self.task == "generate" and (self.protocol != "openai" or self.endpoint == "chat")

    @property
    def streams(self) -> bool:
        """Whether an answer comes in pieces."""
        return self.stream and self.task == "generate"

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no output may hold: the key, and whatever the headers say that is long enough to be one."""
        said = (value.removeprefix("Bearer ") for _, value in self.headers)
        return tuple(one for one in (self.api_key, *said) if one and len(one) >= SECRET_LETTERS)

    def to_json(self) -> dict[str, Any]:
        """For reports: no key, and of headers their names alone."""
        return {
            "url": self.url, "protocol": self.protocol, "model": self.model, "task": self.task,
            "endpoint": self.endpoint if self.protocol == "openai" else None, "stream": self.streams,
            "allow_cache": self.allow_cache, "headers": sorted(name for name, _ in self.headers),
        }  # fmt: skip


@dataclass(frozen=True)
class Load:
    """What is put on a target. Raises PlanError.

    Either `concurrency` clients, each of which asks again when it has its answer (closed loop), or `rate` requests a
    second that arrive at random whether or not the ones before are answered (open loop, Poisson), of which at most
    `max_in_flight` are under way. A run ends after `requests` or, beginning no more, after `duration_s`.
    `warmup` requests before it are not counted. `prompt_tokens` may be None with `prompts`, which are taken in order
    and over again. Times are seconds; `timeout_s` bounds a whole request.
    """

    concurrency: int | None = 1
    rate: float | None = None
    requests: int | None = None
    duration_s: float | None = None
    warmup: int = 0
    prompt_tokens: int | None = 128
    output_tokens: int = 64
    prompts: tuple[Prompt, ...] = field(default=(), repr=False)
    temperature: float = 0.0
    ignore_eos: bool = False
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 120.0
    max_in_flight: int = 1024
    goals: Goals = Goals()
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise PlanError("a load has either a concurrency or a rate", "give one of them")
        if self.requests is None and self.duration_s is None:
            raise PlanError("a load has no end", "give requests or duration_s")
        for name, least, most in (
            ("concurrency", 1, MAX_CONCURRENCY), ("requests", 1, MAX_REQUESTS), ("warmup", 0, MAX_REQUESTS),
            ("prompt_tokens", 1, MAX_TOKENS), ("output_tokens", 1, MAX_TOKENS), ("max_in_flight", 1, MAX_CONCURRENCY),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise PlanError(f"{name}: {value!r} is not an integer", f"from {least} to {most}")
            _number(name, value, least, most)
        _number("rate", self.rate, 1e-4, MAX_RATE)
        _number("duration_s", self.duration_s, 0.1, MAX_SECONDS)
        _number("timeout_s", self.timeout_s, 0.01, MAX_SECONDS)
        _number("temperature", self.temperature, 0, 100)
        if self.prompt_tokens is None and not self.prompts:
            raise PlanError("a load has no prompts", "give prompt_tokens or prompts")
        taken = sorted(_OWN_FIELDS & set(self.extra_body))
        if taken:
            raise PlanError(f"extra body: {', '.join(taken)} is set by the measurement itself", "leave it out")
        try:
            json.dumps(self.extra_body, allow_nan=False)
            orjson.dumps(self.extra_body)  # no integers past 64 bits, no halves of characters
        except (TypeError, ValueError, RecursionError) as error:
            raise PlanError(f"extra body: not JSON: {error}", 'give one object such as {"top_k": 1}') from error

    def to_json(self) -> dict[str, Any]:
        """The parameters of a run in a report."""
        return {
            "concurrency": self.concurrency, "rate": self.rate, "requests": self.requests,
            "duration_s": self.duration_s, "warmup": self.warmup, "prompt_tokens": self.prompt_tokens,
            "prompts": len(self.prompts) or None,
            "output_tokens": self.output_tokens, "temperature": self.temperature, "ignore_eos": self.ignore_eos,
            "extra_body": dict(self.extra_body), "timeout_s": self.timeout_s,
            "max_in_flight": self.max_in_flight if self.rate is not None else None,
            "goodput": self.goals.to_json(), "seed": self.seed,
        }  # fmt: skip


@dataclass
class Progress:
    """How far a measurement is, for whoever looks on. `stage` is a word for people, `total` None where time ends it."""

    stage: str = "asking"
    done: int = 0
    errors: int = 0
    total: int | None = None
    began: float = 0.0  # the event loop's time
    until_s: float | None = None


def _number(name: str, value: float | None, least: float, most: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise PlanError(f"{name}: {value!r} is not a number", f"from {least:g} to {most:g}")
    if not least <= value <= most:
        raise PlanError(f"{name}: {value:g} is out of range", f"from {least:g} to {most:g}")
