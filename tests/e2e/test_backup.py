"""The drill: a deployment is backed up while it serves, destroyed, and brought back from the file alone."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.local import swap
from tests.counting import write_entry

from .stack import Stack, wait_until

KEY = "AGE-SECRET-KEY-142LQ7ELG35USSY7XA05SGPACHTUR7XGUENG5PWDU4QP0Q7SXULTSJ42UYY"


@pytest.fixture
def drilled() -> Iterator[Stack]:
    folder = Path(tempfile.mkdtemp(prefix="truthgpt-backup-"))
    write_entry(folder / "repository")
    extra = {
        "TRUTHGPT_AUTH": "keys", "TRUTHGPT_BACKUP_DIR": str(folder / "backups"), "TRUTHGPT_BACKUP_KEY": KEY,
        "TRUTHGPT_CONFIG": "",
    }  # fmt: skip
    made = Stack(folder / "home", folder / "repository", extra=extra)
    try:
        yield made
    finally:
        made.cli("down")
        assert made.leftovers() == []
        shutil.rmtree(folder)


def note_half_done(home: Path) -> None:
    """As a second restore leaves it that is killed after its first rename: the audit log's key is away."""
    key = home / "audit.key"
    note = {"moves": [[str(key), str(home / "away")]], "inodes": [key.stat().st_ino], "staging": [], "kept": []}
    (home / swap.NOTE).write_text(json.dumps(note))
    key.rename(home / "away")


def test_a_deployment_that_is_lost_comes_back(drilled: Stack) -> None:
    """Home and repository are gone; after restore and up the key, its limits, the model and a cached answer are there.

    And so is the audit log, with the restore in it, although another restore is killed half-way before `up`.
    """
    drilled.start()
    made = json.loads(drilled.cli("keys", "create", "--tenant", "acme", "--per-day", "77", "--json").stdout)
    headers = {"Authorization": f"Bearer {made['key']}"}
    wait_until(lambda: drilled.knows(made["key"]), 10, "the key is known")
    body = {"model": drilled.model, "prompt": "one two", "max_tokens": 5}

    def ask() -> tuple[dict[str, str], Any]:
        status, found, answer = drilled.request("POST", "/v1/completions", body, headers=headers)
        assert status == 200, answer
        return {name.lower(): value for name, value in found.items()}, json.loads(answer)["choices"][0]["text"]

    _, text = ask()

    def cached() -> bool:
        return ask()[0].get("x-cache") == "hit"

    wait_until(cached, 10, "the answer is cached")
    done = drilled.cli("backup", "create", "--json")
    assert done.returncode == 0, done.stderr
    backup = Path(json.loads(done.stdout)["path"])
    assert backup.suffix == ".age" and b"truthgpt:" not in backup.read_bytes()
    drilled.stop()
    shutil.rmtree(drilled.home)
    shutil.rmtree(drilled.repository)

    done = drilled.cli("backup", "verify", str(backup))
    assert done.returncode == 0, done.stderr
    done = drilled.cli("backup", "restore", str(backup), "--target", str(drilled.home), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["restored"] and found["kept"] == [] and found["redis_backup"]["keys"] == 1
    note_half_done(drilled.home)
    drilled.start()
    wait_until(lambda: drilled.knows(made["key"]), 10, "the key is known again")
    answer, again = ask()
    assert (answer.get("x-cache"), again) == ("hit", text)
    shown = json.loads(drilled.cli("keys", "list", "--json").stdout)
    assert [(key["id"], key["limits"]) for key in shown] == [(made["id"], {"per_day": 77})]
    done = drilled.cli("audit", "verify")
    assert done.returncode == 0, done.stdout + done.stderr
    events = json.loads(drilled.cli("audit", "tail", "-n", "1000", "--json").stdout)
    assert "backup restore" in [event.get("operation") for event in events]
