"""API keys: how one is made, written down and checked. Pure: time is an argument, nothing is read or sent.

A credential is `tg_<id>_<secret>`. The id is public: it stands in listings and is the caller's id. Of the secret only
the SHA-256 is kept: it is 256 random bits, so that nothing can be guessed and a slow hash would protect nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import ipaddress
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from orchestrator.domain import Limits

SCOPES = ("inference", "admin")
OPEN_TENANT = "open"  # of callers who are known by their address
LIMIT_NAMES = tuple(item.name for item in dataclasses.fields(Limits))
LIMIT_MAX = 10**12  # exact in a Lua number and in JSON
CREDENTIAL_MAX_BYTES = 512
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")  # of a tenant, a key id and the subject of a limit

_ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
_CREDENTIAL = re.compile(r"tg_([a-z2-7]{12})_([A-Za-z0-9_-]{43})")
_UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_DURATION = re.compile("".join(f"(?:([0-9]{{1,10}}){letter})?" for letter in _UNITS))
DURATION_MAX_S = 36_500 * 86_400
_HASH = re.compile(r"[0-9a-f]{64}")
_NO_HASH = "0" * 64  # nobody knows a text with this SHA-256

PartialLimits = Mapping[str, int]  # the fields of domain.Limits that are set; 0 is no limit


class MalformedKey(ValueError):
    """A record that is no key."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """What is known of one key. `created`, `expires`, `revoked` and `old_until` are Unix times in seconds.

    `limits` holds the fields of domain.Limits that this key sets. After a rotation `old_hash` is the SHA-256 of the
    secret before, which works until `old_until`. No hash shows in a repr.
    """

    id: str
    tenant: str
    hash: str = field(repr=False)
    scope: str = "inference"
    limits: PartialLimits = field(default_factory=dict)
    created: float = 0.0
    expires: float | None = None
    revoked: float | None = None
    note: str = ""
    old_hash: str | None = field(default=None, repr=False)
    old_until: float = 0.0

    def state(self, now: float) -> str:
        """active, expired or revoked."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "active"

    def takes(self, secret: str, now: float) -> bool:
        """Whether this is the key's secret, whatever its state; in the same time for every secret."""
        found = hash_of(secret)
        current = hmac.compare_digest(found, self.hash)
        former = hmac.compare_digest(found, self.old_hash or _NO_HASH)
        return current or (former and now < self.old_until)

    def rotated(self, secret: str, now: float, grace_s: float) -> Key:
        """The same key with a new secret; the one before works for `grace_s` more seconds."""
        old = self.hash if grace_s > 0 else None
        return dataclasses.replace(self, hash=hash_of(secret), old_hash=old, old_until=now + grace_s if old else 0.0)

    def to_json(self) -> str:
        """What is stored under the key's id."""
        record = dataclasses.asdict(self)
        del record["id"]
        return json.dumps(record, ensure_ascii=False, separators=(",", ":"))


# Stands for every key that does not exist, so that looking one up takes the same path whether it does or not.
NOBODY = Key(id="-", tenant="-", hash=_NO_HASH, revoked=0.0)


def new_id() -> str:
    """60 random bits in lower-case base32 (RFC 4648): twelve characters that can be read aloud."""
    return "".join(secrets.choice(_ID_ALPHABET) for _ in range(12))


def new_secret() -> str:
    """256 random bits as base64url."""
    return secrets.token_urlsafe(32)


def hash_of(secret: str) -> str:
    # Of the text, not of the bytes it stands for: two base64 texts can stand for the same bytes.
    return hashlib.sha256(secret.encode()).hexdigest()


def credential(id: str, secret: str) -> str:
    """What the key's owner sends."""
    return f"tg_{id}_{secret}"


def split(credential: str) -> tuple[str, str] | None:
    """Id and secret of a credential, None for any text that no key can have."""
    found = _CREDENTIAL.fullmatch(credential)
    return (found[1], found[2]) if found else None


def read(id: str, text: bytes | str) -> Key:
    """The key that `to_json` wrote. Raises MalformedKey."""
    record = _object(text)
    try:
        key = Key(id=id, **record)
    except TypeError as error:
        raise MalformedKey(f"key {id}: {error}") from error
    good = (
        _matches(NAME, id) and _matches(NAME, key.tenant) and _matches(_HASH, key.hash) and key.scope in SCOPES
        and (key.old_hash is None or _matches(_HASH, key.old_hash)) and isinstance(key.note, str)
        and _is_time(key.created) and _is_time(key.old_until)
        and (key.expires is None or _is_time(key.expires)) and (key.revoked is None or _is_time(key.revoked))
    )  # fmt: skip
    if not good:
        raise MalformedKey(f"key {id}: a field has a value that it cannot have")
    _check_limits(key.limits)
    return key


def read_limits(text: bytes | str) -> PartialLimits:
    """Limits as `json.dumps` wrote them. Raises MalformedKey."""
    limits = _object(text)
    _check_limits(limits)
    return limits


def merged(defaults: Limits, *stronger: PartialLimits) -> Limits:
    """Field by field, the last one that sets it wins."""
    given = {name: value for limits in stronger for name, value in limits.items()}
    return dataclasses.replace(defaults, **given) if given else defaults


@lru_cache(maxsize=4096)
def subject_of(address: str) -> str:
    """What limits of a caller without a key are counted for: `ip-<address>`, one spelling for each address."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "ip-" + (re.sub(r"[^A-Za-z0-9._-]", "-", address)[:61] or "unknown")
    # A socket that listens on both protocols shows IPv4 clients as ::ffff:192.0.2.1.
    return f"ip-{(found.ipv4_mapped or found) if isinstance(found, ipaddress.IPv6Address) else found}"


def is_address(text: str) -> bool:
    """Whether this names an address, as `192.0.2.1` or as the subject `ip-192.0.2.1`, and not a key."""
    try:
        ipaddress.ip_address(text.removeprefix("ip-").partition("%")[0])
    except ValueError:
        return text.startswith("ip-")
    return True


def parse_duration(text: str) -> int:
    """Seconds of a duration such as 30d, 12h, 90m, 45s or 1d12h. Raises ValueError."""
    found = _DURATION.fullmatch(text.strip())
    seconds = (
        sum(int(part or 0) * unit for part, unit in zip(found.groups(), _UNITS.values(), strict=True)) if found else 0
    )
    if not 0 < seconds <= DURATION_MAX_S:
        raise ValueError(f"{text!r} is no duration such as 30d, 12h or 90m, of at most 100 years")
    return seconds


def format_duration(seconds: int) -> str:
    """The duration as `parse_duration` reads it, exactly."""
    parts = []
    for letter, unit in _UNITS.items():
        count, seconds = divmod(seconds, unit)
        parts.append(f"{count}{letter}" if count else "")
    return "".join(parts) or "0s"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _object(text: bytes | str) -> dict[str, Any]:
    try:
        record = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise MalformedKey("not JSON") from error
    if not isinstance(record, dict):
        raise MalformedKey("not a JSON object")
    return record


def _check_limits(limits: object) -> None:
    if not isinstance(limits, dict) or not all(
        name in LIMIT_NAMES and isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LIMIT_MAX
        for name, value in limits.items()
    ):
        raise MalformedKey("limits that cannot be")


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
