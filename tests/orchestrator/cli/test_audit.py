"""`truthgpt audit` on a log that the real writer has written, and what other commands write into it."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from orchestrator.auditevents import of_incident, of_request
from orchestrator.auditlog import CURRENT, encode, folder_of
from orchestrator.auditwriter import AuditLog
from orchestrator.fingerprint import KEY_FILE, Fingerprint, load_key
from tests.orchestrator.gateway import write_state
from tests.orchestrator.test_auditevents import INCIDENT, RECORD
from tests.redis import RealRedis


class Log:
    """The log of a place: fifty requests of two callers, and some events more."""

    def __init__(self, home: Path) -> None:
        self.prints = Fingerprint(load_key(home, None))
        self.writer = AuditLog(home, self.prints, 6000)
        self.folder = folder_of(home)
        evil = replace(RECORD, outcome="error", error="internal", model="=cmd()\x1b[2J", sanitized=("html", "uri"))
        records = [replace(RECORD, caller=f"caller{number % 2}", accepted=1.8e9 + number) for number in range(50)]
        self.add(encode("start", 1.8e9, {"pid": os.getpid()}), *(of_request(record, self.prints) for record in records),
                 of_request(replace(evil, accepted=1.8e9 + 100), self.prints),
                 of_incident(replace(INCIDENT, at=1.8e9 + 200), self.prints),
                 encode("security", 1.8e9 + 201, {"kind": "unauthenticated", "only_counted": 40}),
                 encode("lost", 1.8e9 + 300, {"count": 7}))  # fmt: skip

    def add(self, *events: bytes) -> None:
        self.writer.append(events)
        self.writer.sync()


@pytest.fixture
def log(place: Any) -> Log:
    return Log(place.home)


def test_verify_of_a_good_log(place: Any, log: Log) -> None:
    """Exit code 0, what was checked, what is worth knowing, and the mark to keep; --json has all of it."""
    done = place.run("audit", "verify")
    assert done.exit_code == 0 and done.stdout.startswith("ok: 55 lines, 1 to 55, in ")
    found = place.json("audit", "verify")
    mark = f"{found['last']['seq']}:{found['last']['hash']}"
    assert found["ok"] and found["lines"] == 55 and found["files"] > 3 and found["broken"] is None
    assert (found["lost"], found["unfinished"], found["running"]) == (7, 1, 1)
    assert done.stdout.splitlines()[-2:] == ["note: 7 events could not be written, and were counted", f"mark: {mark}"]
    assert place.run("audit", "verify", "--mark", mark).exit_code == 0
    assert place.run("audit", "verify", "--mark", f"56:{'0' * 32}").exit_code == 1
    assert place.run("audit", "verify", "--first", "10").stdout.startswith("ok: 46 lines, 10 to 55")


def test_verify_of_a_changed_log(place: Any, log: Log) -> None:
    """Exit code 1 and the first broken place, as file:line, for people and as JSON."""
    path = sorted(log.folder.glob("audit-*"))[1]
    path.write_bytes(path.read_bytes().replace(b'"output_chars":17', b'"output_chars":18', 1))
    done = place.run("audit", "verify")
    assert done.exit_code == 1 and done.stdout.splitlines()[0].startswith(f"BROKEN at {path}:1: the line was changed")
    assert place.json("audit", "verify", code=1)["broken"] == {
        "file": str(path), "line": 1, "why": "the line was changed, or written with another key",
    }  # fmt: skip


def test_without_a_log_or_a_key(place: Any, log: Log) -> None:
    """What is missing is said, with what to do, and reading makes nothing: no folder, no key."""
    for arguments in (("audit", "verify"), ("audit", "stats"), ("audit", "tail"), ("audit", "export")):
        assert "there is no" in place.refused(*arguments, "--home", str(place.home / "none"))
    assert not (place.home / "none").exists()
    (place.home / KEY_FILE).unlink()
    assert "there is no key" in place.refused("audit", "verify")
    assert "others may read" not in place.refused("audit", "hash", input="x")
    assert not (place.home / KEY_FILE).exists()
    assert place.run("audit", "tail").exit_code == 0  # reading needs no key


@pytest.mark.parametrize(
    "arguments",
    [("verify", "--mark", "1"), ("verify", "--first", "0"), ("stats", "--since", "yesterday"),
     ("tail", "--event", "noise"), ("tail", "--follow", "--json"), ("export", "--format", "xml")],
)  # fmt: skip
def test_wrong_usage(place: Any, log: Log, arguments: tuple[str, ...]) -> None:
    """Arguments that mean nothing are exit code 2."""
    place.refused("audit", *arguments, code=2)


def test_tail(place: Any, log: Log) -> None:
    """The last rows over several files, oldest first, of one kind where asked; a terminal gets no control character."""
    rows = place.json("audit", "tail", "-n", "30")
    assert [row["seq"] for row in rows] == list(range(26, 56))
    assert [row["event"] for row in place.json("audit", "tail", "--event", "security")] == ["security"] * 2
    shown = place.run("audit", "tail", "--event", "error").stdout
    assert "model==cmd()?[2J" in shown and "sanitized=html,uri" in shown and "\x1b" not in shown
    assert place.json("audit", "tail", "-n", "0") == []


def test_tail_follows_over_rotations(place: Any, log: Log) -> None:
    """--follow shows each event that comes, once and in order, however many files were begun meanwhile."""
    process = place.process("audit", "tail", "-n", "1", "--follow", bufsize=1)
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith("55 ")
        for _ in range(3):
            log.add(*(of_request(RECORD, log.prints) for _ in range(30)))
            time.sleep(0.1)
        assert [int(process.stdout.readline().split()[0]) for _ in range(90)] == list(range(56, 146))
    finally:
        process.kill()
        process.communicate()


def test_stats(place: Any, log: Log) -> None:
    """Counts by event, outcome, error, model and caller, the time they span, and what is not there."""
    found = place.json("audit", "stats", "--top", "1")
    assert found["lines"] == 55 and found["only_counted"] == 40 and found["lost"] == 7 and found["unreadable"] == 0
    assert found["events"] == {"generation": 50, "security": 2, "start": 1, "error": 1, "lost": 1}
    assert found["outcomes"] == {"ok": 50, "error": 1} and found["models"] == {"demo": 50}
    assert found["errors"] == {"unauthenticated": 2, "internal": 1}
    assert list(found["callers"].values()) == [25]
    assert (found["first"], found["last"]) == ("2027-01-15T08:00:00.000Z", "2027-01-15T08:05:00.000Z")
    assert place.json("audit", "stats", "--since", "2027-01-15T08:03:00Z", "--until", "2027-01-15T09:04:00+01:00") == {
        **found, "lines": 2, "first": "2027-01-15T08:03:20.000Z", "last": "2027-01-15T08:03:21.000Z",
        "events": {"security": 2}, "outcomes": {}, "errors": {"unauthenticated": 2}, "models": {}, "callers": {},
        "lost": 0,
    }  # fmt: skip
    assert "caller" in place.run("audit", "stats").stdout


def test_export(place: Any, log: Log, tmp_path: Path) -> None:
    """Lines as they are, or a table that no spreadsheet takes for formulas; a file is complete or not there."""
    out = place.run("audit", "export").stdout
    files = sorted(log.folder.glob("audit-*")) + [log.folder / CURRENT]
    assert out.encode() == b"".join(path.read_bytes() for path in files)
    target = tmp_path / "errors.csv"
    assert place.run("audit", "export", "--format", "csv", "--event", "error", "-o", str(target)).exit_code == 0
    assert target.stat().st_mode & 0o777 == 0o600
    (row,) = csv.DictReader(io.StringIO(target.read_text()))
    assert row["model"] == "'=cmd()\x1b[2J" and json.loads(row["sanitized"]) == ["html", "uri"]
    assert row["duration_s"] == "0.25" and row["seq"] == "52"
    place.refused("audit", "export", "-o", str(tmp_path / "no" / "where"))
    assert [path.name for path in tmp_path.iterdir() if "errors" in path.name] == ["errors.csv"]


def test_hash(place: Any, log: Log) -> None:
    """The hash of standard input is the one in the log: a prompt in each of its forms, a key's id, an address."""

    def made(*arguments: str, input: str | bytes) -> str:
        return str(place.run("audit", "hash", *arguments, input=input).stdout.strip())

    assert made(input="Hola\n") == made("--exact", input="Hola") == log.prints.text("Hola")
    assert made("--exact", input="Hola\n") == log.prints.text("Hola\n")
    turns = '[{"role": "user", "content": "¿Qué?"}]'
    assert made("--as", "messages", input=turns) == log.prints.messages([("user", "¿Qué?")])
    assert made("--as", "tokens", input="[1, 2]") == log.prints.tokens([1, 2])
    assert made("--as", "caller", input="192.0.2.7\n") == made("--as", "caller", input="ip-192.0.2.7")
    assert (
        made("--as", "caller", input="192.0.2.7\n") == place.json("audit", "tail", "--event", "security")[0]["address"]
    )
    for kind, text in (("messages", "{}"), ("tokens", "[true]"), ("texts", "[1]"), ("tokens", "[")):
        place.refused("audit", "hash", "--as", kind, input=text)


@pytest.fixture
def deployment(place: Any, server: RealRedis, client: redis.Redis) -> Any:
    write_state(place.home, "http://127.0.0.1:1", redis=server.url)
    return place


def test_commands_write_what_they_change(deployment: Any) -> None:
    """Making, rotating and revoking keys, limits, cache and breakers leave a security event each; reading leaves none.

    A key is named by the hash that its requests have, and no secret is there.
    """
    made = deployment.json("keys", "create", "--tenant", "acme", "--per-minute", "5")
    id = made["id"]
    for arguments in (
        ("keys", "rotate", id, "--grace", "1h"), ("limits", "set", id, "--per-day", "9"), ("limits", "reset", id),
        ("keys", "revoke", id), ("cache", "clear"), ("cache", "ttl", "translation", "600"), ("cache", "ttl", "--adapt"),
        ("keys", "list"), ("limits", "show", id), ("cache", "stats"), ("cache", "ttl"),
    ):  # fmt: skip
        assert deployment.run(*arguments).exit_code == 0, arguments
    rows = deployment.json("audit", "tail", "-n", "100")
    whose = deployment.run("audit", "hash", "--as", "caller", input=id).stdout.strip()
    assert [(row["operation"], row.get("subject"), row.get("detail")) for row in rows] == [
        ("keys create", whose, "tenant=acme scope=inference per_minute=5"),
        ("keys rotate", whose, "tenant=acme grace_s=3600"),
        ("limits set", whose, "per_day=9"),
        ("limits reset", whose, None),
        ("keys revoke", whose, "tenant=acme"),
        ("cache clear", None, "everything: 0 entries"),
        ("cache ttl", None, "translation=600"),
        ("cache ttl", None, "adapt"),
    ]
    assert {(row["event"], row["kind"], row["edge"]) for row in rows} == {("security", "admin", "cli")}
    text = deployment.run("audit", "export").stdout
    assert id not in text and made["key"] not in text
    assert deployment.run("audit", "verify").exit_code == 0


def test_a_command_whose_event_cannot_be_written_says_so(deployment: Any) -> None:
    """The change is made and the exit code is 0, but standard error says that it is not in the log; off, nothing is."""
    Log(deployment.home)
    deployment.set(AUDIT_KEY="another key, long enough")
    done = deployment.run("keys", "create", "--tenant", "acme", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["id"]
    assert "warning: this is not in the audit log: " in done.stderr and "another audit key" in done.stderr
    deployment.set(AUDIT="false")
    assert deployment.run("keys", "create", "--tenant", "acme").stderr == ""
