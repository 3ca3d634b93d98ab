"""What an edge or a command has done by itself, as an auditor wants to see it. Nothing of ours is imported here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Incident:
    """Something that an edge did by itself, before or beside the path, and that an auditor wants to see.

    `kind` is that of the error where it refused something, or `admin` for what an administrator has done: a call that
    was let in, or a command. `operation` is the route's template, the RPC's or the command's name, `caller` empty where
    nobody is known, `at` Unix time. `subject` is the caller whom it was done to, `detail` what was given: no secrets.
    """

    kind: str
    id: str
    edge: str
    operation: str
    caller: str
    address: str
    at: float
    traceparent: str | None = None
    subject: str = ""
    detail: str = ""
