"""The audit log as commands see it: its files, its key, its hashes, and what a command writes into it."""

from __future__ import annotations

import getpass
import json
import os
import time
from pathlib import Path
from typing import BinaryIO

from orchestrator.audit import AuditKeyError, AuditLogError, fingerprint_of
from orchestrator.auditevents import of_incident
from orchestrator.auditlog import CURRENT, folder_of, rotated
from orchestrator.auditwriter import AuditLog
from orchestrator.fingerprint import Fingerprint
from orchestrator.incident import Incident
from orchestrator.keys import is_address, subject_of
from orchestrator.local import swap
from orchestrator.settings import Settings


class NoAuditLog(Exception):
    """There is nothing to read; `hint` says what to do."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"there is no audit log in {folder}")
        self.hint = "--home names the folder of the stack whose log it is"


def opened(folder: Path) -> list[tuple[Path, BinaryIO, int]]:
    """The log's files, oldest first, each with its size now. Raises NoAuditLog or OSError.

    The current one is opened first: if it is moved aside meanwhile it is found twice, and never missed.
    """
    try:
        current = (folder / CURRENT).open("rb")
    except FileNotFoundError:
        current = None
    found: list[tuple[Path, BinaryIO, int]] = []
    for path in rotated(folder):
        try:
            file = path.open("rb")
        except FileNotFoundError:  # it was too old and is gone just now; who checks the chain sees any other hole
            continue
        if current is not None and os.path.samestat(os.fstat(file.fileno()), os.fstat(current.fileno())):
            file.close()
        else:
            found.append((path, file, os.fstat(file.fileno()).st_size))
    if current is not None:
        found.append((folder / CURRENT, current, os.fstat(current.fileno()).st_size))
    if not found:
        raise NoAuditLog(folder)
    return found


def note(settings: Settings, operation: str, subject: str = "", detail: str = "") -> str:
    """Write that a command has changed something; why that could not be done, empty where it was.

    `subject` is the caller whom it was done to; `detail` has no secrets.
    """
    if not settings.audit:
        return ""
    try:
        if swap.pending(settings.home):  # the log may be moved aside: another would begin, and be in its way
            return "a restore was interrupted; `truthgpt up`, `truthgpt backup create` or another restore undoes it"
        incident = Incident(
            kind="admin", id="", edge="cli", operation=operation, caller=f"user-{_user()}", address="",
            at=time.time(), subject=subject, detail=detail,
        )  # fmt: skip
        prints = fingerprint_of(settings)
        log = AuditLog(settings.home, prints, settings.audit_max_bytes)
        try:
            log.append([of_incident(incident, prints)])
            log.sync()
        finally:
            log.close()
    except (OSError, AuditKeyError, AuditLogError) as error:
        return (error.strerror if isinstance(error, OSError) else None) or str(error)
    return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user id without a name
        return str(os.getuid())


def folder_and_key(settings: Settings) -> tuple[Path, Fingerprint]:
    """Where the log is, and the key that it was written with. Raises AuditKeyError."""
    return folder_of(settings.home), fingerprint_of(settings, create=False)


class NotJson(Exception):
    """What was to be hashed is not what it was said to be; `hint` says what is."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"standard input is not {kind} in JSON")
        self.hint = {
            "messages": 'such as [{"role": "user", "content": "Hola"}]', "tokens": "such as [15, 7, 20]",
            "texts": 'such as ["one", "two"]',
        }[kind]  # fmt: skip


def hash_of(prints: Fingerprint, kind: str, data: bytes) -> str:
    """How something stands in the log; `kind` is text, messages, tokens, texts or caller. Raises NotJson."""
    if kind == "text":
        return prints.text(data)
    if kind == "caller":
        id = data.decode("utf-8", "surrogateescape").strip()
        return prints.caller(subject_of(id.removeprefix("ip-")) if is_address(id) else id)
    try:
        items = json.loads(data)
        if not isinstance(items, list):
            raise TypeError
        if kind == "messages":
            return prints.messages([(_text(item["role"]), _text(item["content"])) for item in items])
        return prints.texts([_text(i) for i in items]) if kind == "texts" else prints.tokens([_id(i) for i in items])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise NotJson(kind) from error


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _id(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError
    return value
