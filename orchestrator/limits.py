"""Rate limits that hold over all replicas: one atomic script counts a request in every window, or in none.

A window is rolling: in no interval of its length is more than its limit accepted. It is counted in sub-buckets of 1/60
of its length, the oldest one whole, so a request may be refused early by at most 1/60 of the window, and the memory of
a caller is constant. limits_lua.py has the layout and the rule of the clock, limits_local.py the same rule without
Redis.

Tokens are reserved before a request runs and replaced by their true number after it, in the sub-bucket of the
reservation. Running requests hold a lease of LEASE_S each, renewed every RENEW_S, so that those of a worker that died
are given back by themselves. A refusal costs nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from orchestrator.domain import Limits, Window
from orchestrator.limits_lua import LIMITS_LUA, RENEW_LUA, SETTLE_LUA
from orchestrator.store import Script

__all__ = [
    "LEASE_S", "LIMITS_LUA", "MOST", "PEEK", "RENEW", "RENEW_S", "SETTLE", "Reservation", "Verdict", "limit_rows",
    "nothing_to_settle", "peek_args", "reserve_args", "settle_args", "settled_windows", "verdict",
]  # fmt: skip

LEASE_S = 30.0
RENEW_S = 10.0
MOST = 10**12  # a limit or a reservation above it counts as this

_RESERVE, _CAPS = struct.Struct("<qBQ"), struct.Struct("<6Q")
_SETTLE = struct.Struct("<4QB")
_SHADOW, _ENFORCE, _PEEK = 0, 1, 2
_new = tuple.__new__  # of a Window: all that its own constructor does, at half the cost


class Reservation(NamedTuple):
    """What was counted and where: the hash's birth and the key's time in milliseconds, tokens reserved, windows."""

    born_ms: int
    time_ms: int
    tokens: int
    used: int  # 1: tokens_minute, 2: tokens_day, 4: concurrency


class Verdict(NamedTuple):
    """What the limits say to one request. `windows`: the used ones, as they stand afterwards.

    `refused` is the window that is used up longest; in shadow mode the request is accepted nevertheless.
    `retry_after_s`: when the same request could pass, never earlier than that window's `reset_s`; 0 without one.
    """

    accepted: bool
    windows: tuple[Window, ...]
    refused: Window | None
    retry_after_s: float
    reservation: Reservation


def limit_rows(limits: Limits) -> tuple[tuple[str, int], ...]:
    """Name and limit of every window, in the order of the script; no limit is above MOST."""
    return (
        ("minute", min(limits.per_minute, MOST)),
        ("hour", min(limits.per_hour, MOST)),
        ("day", min(limits.per_day, MOST)),
        ("tokens_minute", min(limits.tokens_per_minute, MOST)),
        ("tokens_day", min(limits.tokens_per_day, MOST)),
        ("concurrency", min(limits.concurrency, MOST)),
    )


class _Known(NamedTuple):
    """What follows from a caller's limits alone. `rows`: name, limit and place in a reply of each window with a limit.

    `numbers`: those that the script calls these windows by.
    """

    caps: bytes
    rows: tuple[tuple[str, int, int], ...]
    numbers: tuple[int, ...]
    settled: int


@lru_cache(maxsize=1024)
def _known(limits: Limits) -> _Known:
    rows = limit_rows(limits)
    used = [(number, name, limit) for number, (name, limit) in enumerate(rows, 1) if limit > 0]
    return _Known(
        _CAPS.pack(*[limit for _, limit in rows]),
        tuple((name, limit, at) for at, (_, name, limit) in zip(range(6, 18, 2), used, strict=False)),
        tuple(number for number, _, _ in used),
        settled_windows(limits),
    )


def _pack(limits: Limits, mode: int, tokens: int, lease: str, now_ms: int) -> bytes:
    return _RESERVE.pack(now_ms, mode, min(tokens, MOST)) + _known(limits).caps + lease.encode()


def reserve_args(limits: Limits, *, tokens: int, lease: str, enforce: bool, now_ms: int = -1) -> bytes:
    """`packed` of `limits_reserve`, which counts one request and `tokens` and takes the lease, or refuses.

    `tokens` is what the request may use at most: prompt and max_tokens. `lease` is unique to the request. `now_ms` is
    for tests; -1 is Redis's own clock.
    """
    return _pack(limits, _ENFORCE if enforce else _SHADOW, tokens, lease, now_ms)


def peek_args(limits: Limits, now_ms: int = -1) -> list[bytes]:
    """Arguments of PEEK, whose reply `verdict` reads: the windows as they stand, with nothing counted."""
    return [_pack(limits, _PEEK, 0, "", now_ms)]


# keys: the caller's hash at one endpoint, the caller's leases
PEEK = Script(LIMITS_LUA + "return limits_reserve(KEYS[1], KEYS[2], ARGV[1])")
SETTLE = Script(SETTLE_LUA)
# key: the caller's leases; arguments: the leases that are still running
RENEW = Script(RENEW_LUA)


def verdict(reply: Sequence[Any], limits: Limits) -> Verdict:
    """The verdict in the reply of `limits_reserve` to `reserve_args(limits, ...)`."""
    accepted, refused_at, wait_ms, born_ms, time_ms, tokens = reply[:6]
    known = _known(limits)
    windows = tuple([
        _new(Window, (name, limit, reply[at], reply[at + 1] / 1000)) for name, limit, at in known.rows
    ])  # fmt: skip
    refused = windows[known.numbers.index(refused_at)] if refused_at in known.numbers else None
    reservation = Reservation(born_ms, time_ms, tokens, known.settled if accepted else 0)
    return Verdict(bool(accepted), windows, refused, wait_ms / 1000, reservation)


def settled_windows(limits: Limits) -> int:
    """The windows that a request under these limits is settled in, as in `Reservation.used`."""
    return (limits.tokens_per_minute > 0) + 2 * (limits.tokens_per_day > 0) + 4 * (limits.concurrency > 0)


def nothing_to_settle(limits: Limits) -> bool:
    """Whether a request under these limits leaves nothing behind that SETTLE would change."""
    return settled_windows(limits) == 0


def settle_args(verdict: Verdict, tokens: int, lease: str) -> list[bytes]:
    """Arguments of SETTLE: `tokens` were used, also by a request that was cancelled, and its lease is given back.

    Once per accepted verdict. What has left the window meanwhile, or was reset, stays as it is.
    """
    born_ms, time_ms, reserved, used = verdict.reservation
    return [_SETTLE.pack(born_ms, time_ms, reserved, min(tokens, MOST), used) + lease.encode()]
