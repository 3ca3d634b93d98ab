"""Reading the audit log while it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.auditlog import encode, folder_of
from orchestrator.auditwriter import AuditLog
from orchestrator.fingerprint import Fingerprint
from orchestrator.ops.auditread import Wanted, follow, tail


class Told(Exception):
    """All that is there has been read."""


@pytest.mark.parametrize("more", [1, 20, 60])
def test_following_misses_nothing_that_was_moved_aside_before_it_began(tmp_path: Path, more: int) -> None:
    """Rotations between the last row that was shown and the first look cost no line, however many there were."""
    log, folder, found = AuditLog(tmp_path, Fingerprint(b"k" * 32), 2000), folder_of(tmp_path), []

    def pause(seconds: float) -> None:
        raise Told

    log.append([encode("error", 1.7e9, {"kind": "x"})] * 5)
    (last,) = tail(folder, 1, Wanted())
    log.append([encode("error", 1.7e9, {"kind": "x"})] * more)
    with pytest.raises(Told):
        for row in follow(folder, last["seq"], Wanted(), pause):
            found.append(row["seq"])
    assert found == list(range(6, 6 + more))
    log.close()
