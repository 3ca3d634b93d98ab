"""What is known of each job, in Redis: until when its times are done, who runs it, what became of it.

One hash (store.JOBS) has of each job, `<job>` being its ledger name:

    <job>:due      all its times up to this one are done; a decimal number of Unix seconds
    <job>:token    the fencing token of its newest run; they only grow
    <job>:tries    runs of the time that is due now which began and never ended
    <job>:last     its last run that ended, a JSON object
    <job>:success  when it last ended well, Unix seconds
    <name>:paused  when it was paused, in all of the deployment; Unix seconds

and of each home, by the identities of its folders:

    seen:<folder>          when a gateway with this home or repository was last there, Unix seconds; where none was for
                           30 days everything of that folder is forgotten
    <repository>.<home>:serves  the models that it has to serve: {"at": Unix seconds, "models": {name: version}}

A run has a lease, a key that ends by itself: `<token> <holder>`. Whoever holds it renews it. A holder that was killed
marks nothing as done; when its lease has ended somebody else runs the job. A run whose lease was taken over has a token
that is no longer the newest, and can neither renew nor finish.

Every script touches keys of one hash tag only. Nothing here knows who carries them to Redis: commands do with redis-py,
the gateway with its store.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from orchestrator.store import JOBS, Argument, Script, history_key, lease_key

LEASE_S = 15.0
RENEW_S = 4.0
TRIES = 3  # runs in a row that were killed before their job is given up until its next time
HISTORY = 50
HISTORY_S = 30 * 86_400
AHEAD_S = 3600.0  # a mark that is further in the future was made by a clock that was wrong
TEXT_CHARS = 500  # of what a run says of itself
FORGET_S = 30 * 86_400
SERVES_S = 7 * 86_400  # for which what a home says it serves holds
FIELDS = ("due", "last", "success")

CLAIMED, PAUSED, RUNNING, DONE, GIVEN_UP = "claimed", "paused", "running", "done", "given up"

# KEYS: the hash, the lease, the history. ARGV: ledger name, job, expected mark ('-': run it anyway), force, now, lease
# in ms, holder, tries, the run to write down where it is given up, history's length and seconds.
CLAIM = Script("""
local function field(name) return ARGV[1] .. ':' .. name end
if ARGV[4] ~= '1' and redis.call('HEXISTS', KEYS[1], ARGV[2] .. ':paused') == 1 then return {'paused'} end
local held = redis.call('GET', KEYS[2])
if held then return {'running', held} end
local scheduled = ARGV[3] ~= '-'
if scheduled and (redis.call('HGET', KEYS[1], field('due')) or '') ~= ARGV[3] then return {'done'} end
if scheduled and tonumber(redis.call('HGET', KEYS[1], field('tries')) or '0') >= tonumber(ARGV[8]) then
  redis.call('HSET', KEYS[1], field('due'), ARGV[5], field('last'), ARGV[9])
  redis.call('HDEL', KEYS[1], field('tries'))
  redis.call('LPUSH', KEYS[3], ARGV[9])
  redis.call('LTRIM', KEYS[3], 0, ARGV[10] - 1)
  redis.call('EXPIRE', KEYS[3], ARGV[11])
  return {'given up'}
end
local time = redis.call('TIME')
local clock = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local token = math.max(tonumber(redis.call('HGET', KEYS[1], field('token')) or '0') + 1, clock)
token = string.format('%.0f', token)
redis.call('HSET', KEYS[1], field('token'), token)
if scheduled then redis.call('HINCRBY', KEYS[1], field('tries'), 1) end
redis.call('SET', KEYS[2], token .. ' ' .. ARGV[7], 'PX', ARGV[6])
return {'claimed', token}
""")

# KEYS: the lease. ARGV: its value, ms.
RENEW = Script("""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
""")

# KEYS as of CLAIM. ARGV: ledger name, token, the lease's value, mark, run, when it ended well or '', history's length
# and seconds. A second time, because the first one's answer was lost, it changes nothing.
FINISH = Script("""
local function field(name) return ARGV[1] .. ':' .. name end
if redis.call('HGET', KEYS[1], field('token')) ~= ARGV[2] then return 0 end
if redis.call('GET', KEYS[2]) == ARGV[3] then redis.call('DEL', KEYS[2]) end
if redis.call('HGET', KEYS[1], field('last')) == ARGV[5] then return 1 end
if tonumber(redis.call('HGET', KEYS[1], field('due')) or '0') < tonumber(ARGV[4]) then
  redis.call('HSET', KEYS[1], field('due'), ARGV[4])
end
redis.call('HSET', KEYS[1], field('last'), ARGV[5])
if ARGV[6] ~= '' then redis.call('HSET', KEYS[1], field('success'), ARGV[6]) end
redis.call('HDEL', KEYS[1], field('tries'))
redis.call('LPUSH', KEYS[3], ARGV[5])
redis.call('LTRIM', KEYS[3], 0, ARGV[7] - 1)
redis.call('EXPIRE', KEYS[3], ARGV[8])
return 1
""")

# A run that was told to end gives its lease back; the time stays due, and it was no failure.
# KEYS: the hash, the lease. ARGV: ledger name, the lease's value.
RELEASE = Script("""
if redis.call('GET', KEYS[2]) ~= ARGV[2] then return 0 end
redis.call('DEL', KEYS[2])
if tonumber(redis.call('HGET', KEYS[1], ARGV[1] .. ':tries') or '0') > 0 then
  redis.call('HINCRBY', KEYS[1], ARGV[1] .. ':tries', -1)
end
return 1
""")

# A job that is seen for the first time has nothing to catch up. KEYS: the hash. ARGV: now, the latest mark that can be,
# ledger names.
BASELINE = Script("""
for i = 3, #ARGV do
  local mark = redis.call('HGET', KEYS[1], ARGV[i] .. ':due')
  if not mark or not tonumber(mark) or not (tonumber(mark) <= tonumber(ARGV[2])) then
    redis.call('HSET', KEYS[1], ARGV[i] .. ':due', ARGV[1])
  end
end
return 1
""")

# KEYS: the hash. ARGV: now, how old what is forgotten is, the home's identity, and what it serves; the repository's
# identity, or empty.
SEEN = Script("""
redis.call('HSET', KEYS[1], 'seen:' .. ARGV[3], ARGV[1])
if ARGV[5] ~= '' then
  redis.call('HSET', KEYS[1], 'seen:' .. ARGV[5], ARGV[1], ARGV[5] .. '.' .. ARGV[3] .. ':serves', ARGV[4])
end
local names, old, any = redis.call('HKEYS', KEYS[1]), {}, false
for _, name in ipairs(names) do
  local id = string.match(name, '^seen:(%x+)$')
  if id and tonumber(ARGV[1]) - (tonumber(redis.call('HGET', KEYS[1], name)) or 0) > tonumber(ARGV[2]) then
    old[id], any = true, true
  end
end
for _, name in ipairs(any and names or {}) do
  local id = string.match(name, '^seen:(%x+)$') or string.match(name, '%.(%x+):%a+$')
  local repository = string.match(name, '^(%x+)%.%x+:serves$')
  if (id and old[id]) or (repository and old[repository]) then redis.call('HDEL', KEYS[1], name) end
end
return 1
""")


@dataclass(frozen=True)
class Run:
    """One run that ended. `started` is Unix seconds; `did` says what it has done, `error` why it failed."""

    job: str
    started: float
    seconds: float
    result: str  # ok | failed
    did: str = ""
    error: str = ""
    holder: str = ""
    manual: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"did": self.did[:TEXT_CHARS], "error": self.error[:TEXT_CHARS]})

    @classmethod
    def read(cls, text: str | bytes | None) -> Run | None:
        """None for what is no run."""
        try:
            found = json.loads(text or "")
            return cls(
                str(found["job"]), float(found["started"]), float(found["seconds"]), str(found["result"]),
                str(found["did"]), str(found["error"]), str(found["holder"]), bool(found["manual"]),
            )  # fmt: skip
        except (ValueError, TypeError, KeyError):
            return None


@dataclass(frozen=True)
class Known:
    """What the ledger has of one job. `mark` is None for one that was never seen, `holder` empty while none runs it.

    `raw_mark` is the mark as it stands there: what a claim expects to find again.
    """

    mark: float | None = None
    raw_mark: str = ""
    last: Run | None = None
    success: float | None = None
    paused: bool = False
    holder: str = ""


@dataclass(frozen=True)
class Claim:
    """What became of an attempt to run a job: CLAIMED, with a token, or why not. `holder`: who runs it instead."""

    outcome: str
    token: str = ""
    holder: str = ""


def ledger_name(job: str, identity: str = "") -> str:
    """A job's name in the ledger: of one that cleans a folder, with the folder's identity."""
    return f"{job}.{identity}" if identity else job


def fields(names: Sequence[tuple[str, str]]) -> list[str]:
    """The fields of the hash that say what is known of these jobs, (ledger name, job) each."""
    return [field for name, job in names for field in (*(f"{name}:{what}" for what in FIELDS), f"{job}:paused")]


def known(values: Sequence[Any], leases: Sequence[Any]) -> list[Known]:
    """The same as Redis answers: HMGET of `fields`, and MGET of the leases."""
    found = []
    for index, lease in enumerate(leases):
        due, last, success, paused = values[4 * index : 4 * index + 4]
        found.append(
            Known(
                _number(due), _text(due), Run.read(last), _number(success), paused is not None,
                _text(lease).partition(" ")[2],
            )
        )  # fmt: skip
    return found


def baseline(now: float, names: Sequence[str]) -> tuple[Script, list[str], list[Argument]]:
    """The script that gives these ledger names a mark where they have none, its keys and arguments."""
    return BASELINE, [JOBS], [_mark(now), _mark(now + AHEAD_S), *names]


def seen(now: float, home: str, repository: str, models: Mapping[str, int]) -> tuple[Script, list[str], list[Argument]]:
    """The script that says that a home is there, and what it serves of which repository (its identity, or empty)."""
    value = json.dumps({"at": round(now, 3), "models": dict(models)})
    return SEEN, [JOBS], [_mark(now), FORGET_S, home, value, repository]


class Client(Protocol):
    """What the ledger needs of redis-py."""

    def execute_command(self, *args: Any, **options: Any) -> Any: ...


class Ledger:
    """The ledger for commands and jobs. Raises whatever the client raises while Redis is away."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def known(self, names: Sequence[tuple[str, str]]) -> list[Known]:
        """What is known of jobs, (ledger name, job) each."""
        values = self._client.execute_command("HMGET", JOBS, *fields(names))
        leases = self._client.execute_command("MGET", *(lease_key(name) for name, _ in names))
        return known(values, leases)

    def baseline(self, now: float, names: Sequence[str]) -> None:
        self._run(*baseline(now, names))

    def claim(
        self, name: str, job: str, holder: str, now: float, expected: str | None, force: bool = False,
        lease_s: float = LEASE_S,
    ) -> Claim:  # fmt: skip
        """Begin a run. `expected`: the mark for which the job is due, and stays undone if it is another by now; None
        runs it in any case but that somebody else does. `force` runs one that is paused.
        """
        given_up = Run(
            job, now, 0.0, "failed", error=f"its process was killed {TRIES} times before it had ended", holder=holder
        )
        reply = self._run(
            CLAIM, _keys(name),
            [name, job, "-" if expected is None else expected, "1" if force else "", _mark(now), int(lease_s * 1000),
             holder, TRIES, given_up.to_json(), HISTORY, HISTORY_S],
        )  # fmt: skip
        outcome, said = _text(reply[0]), _text(reply[1]) if len(reply) > 1 else ""
        if outcome == CLAIMED:
            return Claim(outcome, token=said)
        return Claim(outcome, holder=said.partition(" ")[2])

    def renew(self, name: str, token: str, holder: str, lease_s: float = LEASE_S) -> bool:
        """Whether the lease was still this run's, and goes on for `lease_s`."""
        return bool(self._run(RENEW, [lease_key(name)], [f"{token} {holder}", int(lease_s * 1000)]))

    def finish(self, name: str, token: str, run: Run, mark: float) -> bool:
        """Write down how a run ended, and that all times up to `mark` are done; False, and nothing is written, where
        a newer run has begun.
        """
        success = _mark(run.started + run.seconds) if run.result == "ok" else ""
        arguments: list[Argument] = [
            name, token, f"{token} {run.holder}", _mark(mark), run.to_json(), success, HISTORY, HISTORY_S,
        ]  # fmt: skip
        return bool(self._run(FINISH, _keys(name), arguments))

    def release(self, name: str, token: str, holder: str) -> bool:
        """Give a run up: what was due stays due."""
        return bool(self._run(RELEASE, [JOBS, lease_key(name)], [name, f"{token} {holder}"]))

    def pause(self, job: str, now: float) -> bool:
        """Whether it was not paused before."""
        return bool(self._client.execute_command("HSETNX", JOBS, f"{job}:paused", _mark(now)))

    def resume(self, job: str) -> bool:
        """Whether it was paused."""
        return bool(self._client.execute_command("HDEL", JOBS, f"{job}:paused"))

    def history(self, name: str, count: int = HISTORY) -> list[Run]:
        """The last runs of a ledger name, newest first."""
        rows = self._client.execute_command("LRANGE", history_key(name), 0, count - 1)
        return [run for run in map(Run.read, rows) if run is not None]

    def served(self, repository: str, now: float, without: str = "") -> set[tuple[str, int]]:
        """Each (model, version) that any home, `without` left out, has to serve of this repository; "*": of any.

        As far as their gateways say.
        """
        found, cursor = set[tuple[str, int]](), b"0"
        while True:
            command = ("HSCAN", JOBS, cursor, "MATCH", f"{repository}.*:serves", "COUNT", 1000)
            cursor, rows = self._client.execute_command(*command)
            for name, value in rows.items() if isinstance(rows, dict) else zip(rows[::2], rows[1::2], strict=True):
                if without and name.decode().endswith(f".{without}:serves"):
                    continue
                try:
                    said = json.loads(value)
                    if now - float(said["at"]) < SERVES_S:
                        found |= {(str(model), int(number)) for model, number in said["models"].items()}
                except (ValueError, TypeError, KeyError, AttributeError):
                    continue
            if int(cursor) == 0:
                return found

    def _run(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        return self._client.execute_command("EVAL", script.text, len(keys), *keys, *arguments)


def _keys(name: str) -> list[str]:
    return [JOBS, lease_key(name), history_key(name)]


def _mark(moment: float) -> str:
    return f"{moment:.3f}"


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else "" if value is None else str(value)


def _number(value: Any) -> float | None:
    try:
        number = math.nan if value is None else float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
