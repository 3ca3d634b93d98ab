"""Files that a command makes as root in somebody's home: they are that one's. Real users; only root may try that."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from orchestrator.auditlog import encode
from orchestrator.auditwriter import AuditLog
from orchestrator.fingerprint import Fingerprint, load_key
from orchestrator.monitor import alertbook
from orchestrator.monitor.alerts import Document
from orchestrator.ownership import make_folder, open_owned

USER, GROUP = 12_345, 23_456
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """One of a user who is not root."""
    made = tmp_path / "home"
    made.mkdir(mode=0o700)
    os.chown(made, USER, GROUP)
    return made


def owners(folder: Path) -> dict[str, tuple[int, int, int]]:
    """User, group and mode of everything below a folder."""
    found = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}
    return {name: (facts.st_uid, facts.st_gid, stat.S_IMODE(facts.st_mode)) for name, facts in found.items()}


@root_only
def test_the_alert_book_stays_its_owners(home: Path) -> None:
    """`sudo truthgpt alerts ack` leaves a book and a lock that the gateway can read, change and hold."""
    alertbook.update(home, lambda before: (Document({"a": 1.0}), None))
    alertbook.change(home, lambda document: document.watchers.update(b=2.0))
    assert owners(home) == {name: (USER, GROUP, 0o600) for name in ("alerts.json", "alerts.lock")}


@root_only
def test_the_audit_log_stays_its_owners(home: Path) -> None:
    """A command's event that begins the log, or its next file, leaves nothing that the gateway cannot go on with."""
    log = AuditLog(home, Fingerprint(load_key(home, None, True)), 4096)
    for number in range(60):
        log.append([encode("admin", float(number), {"n": number})])
    log.sync()
    log.close()
    found = owners(home)
    assert found.pop("audit") == (USER, GROUP, 0o700)
    assert len(found) > 4 and set(found.values()) == {(USER, GROUP, 0o600)}


@root_only
def test_a_home_that_root_makes(tmp_path: Path) -> None:
    """It belongs to whom the folder around it does, and is nobody else's."""
    os.chown(tmp_path, USER, GROUP)
    make_folder(tmp_path / "new")
    make_folder(tmp_path / "new")
    assert owners(tmp_path) == {"new": (USER, GROUP, 0o700)}
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "file")


@root_only
def test_what_was_there_before_is_not_given_away(home: Path, tmp_path: Path) -> None:
    """Nobody gets another one's file by having put a link to it where a command would make one."""
    secret = tmp_path / "secret"
    secret.write_text("root's")
    os.link(secret, home / "alerts.lock")
    alertbook.update(home, lambda before: (Document({"a": 1.0}), None))
    (home / "linked").symlink_to(secret)
    os.close(open_owned(home / "linked", os.O_RDWR))
    os.link(secret, home / "alerts.json.new")
    alertbook.update(home, lambda before: (Document({"b": 1.0}), None))
    assert (secret.stat().st_uid, secret.read_text()) == (0, "root's")


def test_what_is_there_is_opened(tmp_path: Path) -> None:
    """A file is made once, 0600, and then opened as it is; a link that leads nowhere is an error and makes nothing."""
    fd = open_owned(tmp_path / "file", os.O_WRONLY)
    os.write(fd, b"text")
    os.close(fd)
    fd = open_owned(tmp_path / "file", os.O_RDONLY)
    assert os.read(fd, 10) == b"text" and not os.get_inheritable(fd)
    os.close(fd)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        open_owned(tmp_path / "link", os.O_RDWR)
    assert not (tmp_path / "nowhere").exists()
