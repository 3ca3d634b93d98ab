"""What one caller has used of the limits, read and forgotten without counting anything."""

from __future__ import annotations

from dataclasses import dataclass

import redis

from orchestrator import keys
from orchestrator.domain import ENDPOINTS, Limits, Window
from orchestrator.limits import PEEK, peek_args, verdict
from orchestrator.ops.keyring import Keyring
from orchestrator.store import leases_key, limits_key


@dataclass(frozen=True)
class Subject:
    """Whom limits are counted for: a key's id, or `ip-<address>`. `own`: the key's limits, `override`: `limits set`."""

    id: str
    tenant: str
    own: keys.PartialLimits
    override: keys.PartialLimits

    def limits(self, defaults: Limits) -> Limits:
        """Those that hold, where the gateway has these defaults."""
        return keys.merged(defaults, self.own, self.override)


def find(client: redis.Redis, id: str) -> Subject:
    """The subject of a key id or an address. Raises KeyringError when there is no such key."""
    keyring = Keyring(client)
    subject = keys.subject_of(id.removeprefix("ip-")) if keys.is_address(id) else id
    if subject.startswith("ip-"):
        return Subject(subject, keys.OPEN_TENANT, {}, keyring.limits(subject))
    key = keyring.get(id)
    return Subject(id, key.tenant, key.limits, keyring.limits(id))


def windows(client: redis.Redis, subject: Subject, limits: Limits) -> dict[str, tuple[Window, ...]]:
    """Endpoint -> its windows as they stand; those without a limit are not counted and not there."""
    pipeline = client.pipeline(transaction=False)
    for endpoint in ENDPOINTS:
        names = limits_key(subject.tenant, subject.id, endpoint), leases_key(subject.tenant, subject.id)
        pipeline.eval(PEEK.text, 2, *names, *peek_args(limits))
    return {
        endpoint: verdict(reply, limits).windows for endpoint, reply in zip(ENDPOINTS, pipeline.execute(), strict=True)
    }


def forget(client: redis.Redis, subject: Subject) -> int:
    """Start every window of the caller anew; how many endpoints had been used. Running requests go on counting."""
    return int(client.delete(*(limits_key(subject.tenant, subject.id, endpoint) for endpoint in ENDPOINTS)))
