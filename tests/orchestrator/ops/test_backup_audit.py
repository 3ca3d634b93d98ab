"""The audit log in backups: after retention, during it, and while a restore is half done."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.audit import fingerprint_of
from orchestrator.auditlog import BASE, encode, folder_of, rotated
from orchestrator.auditwriter import AuditLog
from orchestrator.local import swap
from orchestrator.ops import auditcheck, auditing, backup
from orchestrator.ops.cleanup import clean
from orchestrator.ops.cleanwork import Work
from orchestrator.settings import Settings
from tests.orchestrator.ops.deployments import deployment

DAY_S = 86_400.0


def retain(settings: Settings) -> int:
    """What retention removes now: so many files."""
    (tally,) = clean(settings, Work(), ["audit"])
    assert tally.failed == 0, tally.errors
    return tally.count


def aged(base: Path) -> Settings:
    """A deployment that keeps ten days, with a line a day of the last 24, some four lines a file."""
    settings = replace(deployment(base), audit_days=10)
    shutil.rmtree(folder_of(settings.home))
    log = AuditLog(settings.home, fingerprint_of(settings), 1000)
    for day in range(24, 0, -1):
        log.append([encode("generation", time.time() - day * DAY_S, {"n": day, "model": "m"})])
    log.sync()
    log.close()
    return settings


def restored(settings: Settings, made: backup.Created) -> auditcheck.Report:
    """What the log says that comes out of a backup."""
    other = replace(settings, home=settings.home.with_name("other"))
    assert backup.restore(other, made.path, lambda *_: True).done
    return auditcheck.verify(folder_of(other.home), fingerprint_of(other, create=False))


def test_a_log_that_retention_has_shortened_comes_back(tmp_path: Path) -> None:
    """The mark of what was removed is in the backup: the restored log verifies from behind it, and goes on."""
    settings = aged(tmp_path)
    assert retain(settings) > 1
    now = auditcheck.verify(folder_of(settings.home), fingerprint_of(settings))
    report = restored(settings, backup.create(settings))
    assert now.base is not None and now.base.seq > 1
    assert (report.broken, report.base, report.first, report.last) == (None, now.base, now.first, now.last)
    other = replace(settings, home=tmp_path / "other")
    assert auditing.note(other, "backup restore") == ""
    assert auditcheck.verify(folder_of(other.home), fingerprint_of(other)).broken is None


def test_retention_in_the_middle_of_a_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files go after they were opened, or between the list of names and the opening: the copy verifies all the same."""
    real = auditing.opened
    for number, early in enumerate((False, True)):
        settings = aged(tmp_path / str(number))

        def opened(folder: Path, settings: Settings = settings, early: bool = early) -> Any:
            if early:
                retain(settings)
            found = real(folder)
            retain(settings)
            return found

        with monkeypatch.context() as patched:
            patched.setattr(auditing, "opened", opened)
            made = backup.create(settings)
        assert len(rotated(folder_of(settings.home))) < 5 and (folder_of(settings.home) / BASE).exists()
        assert restored(settings, made).broken is None


def test_no_log_begins_while_a_restore_is_half_done(tmp_path: Path) -> None:
    """With the log moved aside a command's event is refused in words; after undoing, it follows the lines before."""
    settings = deployment(tmp_path)
    folder, note = folder_of(settings.home), settings.home / swap.NOTE
    document = {"moves": [[str(folder), str(tmp_path / "away")]], "inodes": [folder.stat().st_ino], "staging": [],
                "kept": []}  # fmt: skip
    folder.rename(tmp_path / "away")
    for text in (json.dumps(document), "what is this"):
        note.write_text(text)
        assert "restore was interrupted" in auditing.note(settings, "keys create")
        assert not folder.exists()
    note.write_text(json.dumps(document))
    assert swap.recover(settings.home) == [] and auditing.note(settings, "keys create") == ""
    assert auditcheck.verify(folder, fingerprint_of(settings)).lines == 6
    note.write_text(json.dumps({**document, "done": True}))
    assert auditing.note(settings, "keys create") == ""
