"""The answer cache: what two requests must share to share an answer, what an entry looks like, and its scripts.

An entry is one line of ASCII, `TG1 <form> <created, Unix ms, 13 digits> <task> <model>`, and a JSON document after it,
plain (form p) or deflated (form z). Redis fills in the time from its own clock when it stores and judges the age by the
same clock, so that the clocks of the gateways do not matter. Operators read the first line only, never the text.

An entry is looked up, counted and its flight's lock taken in one script, together with the limits (admission.py).
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from orchestrator.choices import Choice, merged, of_row
from orchestrator.domain import CachePolicy, Caller, Chunk, EncodeRequest, GenerateRequest, Model, Usage
from orchestrator.store import Script, answer_key, flight_key, stats_key

DEFAULT_TTL_S = {
    "text_generation": 3600,
    "sentiment_analysis": 1800,
    "translation": 7200,
    "summarization": 3600,
    "embeddings": 3600,
}
TTL_MIN_S, TTL_MAX_S = 300, 7200
LOCK_MS = 3000  # life of a flight's lock; whoever holds it renews it three times as often

HEAD_MAX_BYTES = 512  # of an entry's first line
_COMPRESS_OVER_BYTES = 1024
_TEXT_MAX_BYTES = 64 << 20  # an entry that inflates to more is damaged
_NO_TIME = "0" * 13
_MEMO = 16  # tenants that may ask the same, before they are forgotten

# Statistics of a tenant are fields `<what>:<task>` of one hash; what is hits, misses, bypass or large (not stored).
CACHE_LUA = """
local function cache_now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function cache_enter(entry_key, flight_key, stats_key, packed)
  local lookup, store, count, max_age_s, lock_ms, task, worker, dead =
    string.match(packed, '^(%d) (%d) (%d) (%-?%d+) (%d+) (%S+) (%S+) (%S+)$')
  local function counted(what)
    if count == '1' then redis.call('HINCRBY', stats_key, what .. ':' .. task, 1) end
  end
  if store == '0' then
    counted('bypass')
    return {'bypass'}
  end
  if lookup == '1' then
    local value = redis.call('GET', entry_key)
    local created = value and tonumber(string.match(value, '^TG1 %a (%d+) '))
    max_age_s = tonumber(max_age_s)
    if created and (max_age_s < 0 or cache_now_ms() - created <= max_age_s * 1000) then
      counted('hits')
      return {'hit', value}
    end
    local leader = redis.call('GET', flight_key)
    if leader and leader ~= dead then
      counted('hits')
      return {'follow', leader}
    end
    redis.call('SET', flight_key, worker, 'PX', lock_ms)
    counted('misses')
  else
    redis.call('SET', flight_key, worker, 'NX', 'PX', lock_ms)
    counted('bypass')
  end
  return {'lead'}
end
"""

# KEYS: entry, flight, statistics; ARGV: what Ticket.args() packs
ENTER = Script(CACHE_LUA + "return cache_enter(KEYS[1], KEYS[2], KEYS[3], ARGV[1])")

# The end of a flight. KEYS as above; ARGV: worker, entry or '', its life in ms, task if the entry was too large or ''.
# pcall: a Redis that is full takes no entry, and the lock is given back all the same.
LEAVE = Script(
    CACHE_LUA
    + """
if ARGV[2] ~= '' then
  local value = string.sub(ARGV[2], 1, 6) .. string.format('%013.0f', cache_now_ms()) .. string.sub(ARGV[2], 20)
  redis.pcall('SET', KEYS[1], value, 'PX', ARGV[3])
end
if ARGV[4] ~= '' then redis.pcall('HINCRBY', KEYS[3], 'large:' .. ARGV[4], 1) end
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
return 1
"""
)

# KEYS: flight; ARGV: worker, life in ms. A lock that a Redis without its data forgot is taken again.
RENEW = Script("""
local holder = redis.call('GET', KEYS[1])
if not holder or holder == ARGV[1] then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) end
return holder
""")


@dataclass(slots=True)
class Answer:
    """A complete answer. `created` is when it was stored, Unix time in seconds; `choices` as in a Chunk."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    created: float = 0.0
    choices: tuple[Choice, ...] = ()

    def chunk(self) -> Chunk:
        """The whole answer as a stream of one chunk."""
        if self.choices:
            return Chunk(
                self.text, self.completion_tokens, self.prompt_tokens, self.finish_reason, choices=self.choices
            )  # fmt: skip
        return Chunk(self.text, self.completion_tokens, self.prompt_tokens, self.finish_reason)


def answer_of(chunks: Sequence[Chunk]) -> Answer:
    """The answer that these chunks are, all of them."""
    usage = Usage()
    for chunk in chunks:
        usage.add(chunk)
    choices = merged(choice for chunk in chunks for choice in chunk.choices)
    text = "".join(choice.text for choice in choices) if choices else "".join(chunk.text for chunk in chunks)
    reason = chunks[-1].finish_reason or ""
    return Answer(text, reason, usage.prompt_tokens, usage.completion_tokens, choices=choices)


@dataclass(slots=True)
class Ticket:
    """A request's place in the cache: `key` is the same for two requests exactly when they may share an answer."""

    key: str
    tenant: str
    model: str
    task: str
    policy: CachePolicy = CachePolicy()
    version: str = ""  # of the model whose digest is in the key
    _keys: list[str] | None = field(default=None, init=False, repr=False, compare=False)

    def keys(self) -> list[str]:
        """Names of the entry, of the flight's lock and of the tenant's statistics; one hash tag."""
        if self._keys is None:
            self._keys = [answer_key(self.tenant, self.key), flight_key(self.tenant, self.key), stats_key(self.tenant)]
        return self._keys

    def args(self, worker: str, lock_ms: int = LOCK_MS, *, again: bool = False, dead: str = "") -> bytes:
        """The last argument of `cache_enter`. `again`: not counted. `dead`: a worker whose lock is to be taken over."""
        policy = self.policy
        age_s = -1 if policy.max_age_s is None else max(0, policy.max_age_s)
        flags = f"{policy.lookup:d} {policy.store:d} {not again:d}"
        return f"{flags} {age_s} {lock_ms} {self.task} {worker} {dead or '-'}".encode()


@dataclass(slots=True)
class Lookup:
    """What the cache said.

    `state`: hit (`answer` is set), lead (nobody generates it: the caller does, and holds the lock), follow (the worker
    `leader` does), bypass (the request wants nothing of the cache) or local (Redis is away: what this process knows is
    all there is).
    """

    state: str
    answer: Answer | None = None
    leader: str = ""

    @classmethod
    def local(cls) -> Lookup:
        return cls("local")


def ticket(caller: Caller, model: Model, request: GenerateRequest, rules: str = "") -> Ticket:
    """The key is the SHA-256 of everything that may change the answer, in a serialisation that reads one way only.

    Not part of it: who asked within the tenant, ids, protocol, streaming or not, time-outs, priority, echo, and what is
    at its default. `rules` are the settings that make an answer longer or shorter.
    """
    task, memo = request.task or model.task, request.memo
    of = ("key", rules, caller.tenant, model.digest, model.version, task)
    known = None if memo is None else memo.get(of)
    if known is not None:
        return Ticket(known, caller.tenant, model.name, task, request.cache, model.version)
    more = () if request.plain else ([request.n, request.best_of, request.logprobs],)
    key = _key(
        [
            *_head(rules, caller, task, model),
            request.text,
            request.token_ids,
            None if request.messages is None else [[turn.role, turn.content] for turn in request.messages],
            request.max_tokens,
            float(request.temperature),
            float(request.top_p),
            request.top_k,
            request.seed,
            request.stop,
            *more,
            *request.controls,
        ]
    )
    if memo is not None:
        if len(memo) > _MEMO:
            memo.clear()
        memo[of] = key
    return Ticket(key, caller.tenant, model.name, task, request.cache, model.version)


def encode_ticket(caller: Caller, model: Model, request: EncodeRequest) -> Ticket:
    """The same for texts that an encoder reads: one place for all of a request's. How many dimensions of a vector are
    shown, and in which form, makes no difference.
    """
    task = request.task or model.task
    key = _key([*_head("", caller, task, model), "lines", request.operation, request.texts, request.truncate])
    return Ticket(key, caller.tenant, model.name, task, request.cache, model.version)


def _head(rules: str, caller: Caller, task: str, model: Model) -> list[object]:
    version = "" if model.digest else model.version
    return ["2", rules, caller.tenant, task, model.name, model.digest, version]  # "2": of this serialisation


def _key(canonical: list[object]) -> str:
    return hashlib.sha256(orjson.dumps(canonical)).hexdigest()


def lookup_of(reply: list[Any]) -> Lookup:
    """What `cache_enter` replied. An entry that cannot be read is a miss whose answer takes its place."""
    state = reply[0].decode()
    if state == "hit":
        answer = decode(reply[1])
        return Lookup("lead") if answer is None else Lookup("hit", answer)
    return Lookup(state, leader=reply[1].decode() if state == "follow" else "")


def encode(answer: Answer, model: str, task: str) -> bytes:
    """The entry, without its time; LEAVE fills it in."""
    fields: list[object] = [answer.text, answer.finish_reason, answer.prompt_tokens, answer.completion_tokens]
    if answer.choices:  # their texts are the whole's
        fields[0] = ""
        fields.append([choice.row() for choice in answer.choices])
    body, form = orjson.dumps(fields), "p"
    if len(body) > _COMPRESS_OVER_BYTES and task != "embeddings":  # vectors hardly get smaller
        body, form = zlib.compress(body, 1), "z"
    return f"TG1 {form} {_NO_TIME} {task} {model}\n".encode(errors="replace") + body


def decode(entry: bytes) -> Answer | None:
    """The answer in an entry; None when the bytes are damaged or of another format. Never raises."""
    head = read_head(entry)
    if head is None:
        return None
    body = entry[head.length :]
    try:
        if head.form == "z":
            inflater = zlib.decompressobj()
            body = inflater.decompress(body, _TEXT_MAX_BYTES)
            if not inflater.eof:
                return None
        text, finish_reason, prompt_tokens, completion_tokens, *more = orjson.loads(body)
        choices = tuple(map(of_row, more[0])) if more else ()
    except (ValueError, TypeError, RecursionError, zlib.error):
        return None
    if not (isinstance(text, str) and isinstance(finish_reason, str)):
        return None
    if not (isinstance(prompt_tokens, int) and isinstance(completion_tokens, int)):
        return None
    text = "".join(choice.text for choice in choices) or text
    return Answer(text, finish_reason, prompt_tokens, completion_tokens, head.created, choices)


@dataclass(frozen=True)
class Head:
    """An entry's first line, for operators. `created` is Unix time in seconds, `length` counts bytes."""

    form: str
    created: float
    task: str
    model: str
    length: int


def read_head(entry: bytes) -> Head | None:
    """The first line of an entry, from its first HEAD_MAX_BYTES; None when it is none of ours."""
    line, newline, _ = entry[:HEAD_MAX_BYTES].partition(b"\n")
    try:
        magic, form, created, task, model = line.decode().split(" ", 4)
    except ValueError:
        return None
    good = magic == "TG1" and form in ("p", "z") and len(created) == 13 and created.isascii() and created.isdigit()
    return Head(form, int(created) / 1000, task, model, len(line) + 1) if good and newline else None


def adapt(ttl_s: int, requests: int) -> int:
    """The next TTL of a task after that many requests: busy ones live longer, rare ones make room sooner."""
    if requests > 100:
        return max(ttl_s, min(2 * ttl_s, TTL_MAX_S))
    if requests < 10:
        return min(ttl_s, max(ttl_s // 2, TTL_MIN_S))
    return ttl_s
