"""Backups of a deployment: made, listed, checked, put back, and removed when they are old.

`create`, `verify`, `restore` and `prune` do it; `newest` and `infos` tell what there is. docs/backup.md describes it.
"""

from __future__ import annotations

from orchestrator.ops.backup.creation import Created, create
from orchestrator.ops.backup.difference import Difference
from orchestrator.ops.backup.errors import BackupError, Changed, Damaged, Newer
from orchestrator.ops.backup.names import Info, infos, newest
from orchestrator.ops.backup.reading import Report
from orchestrator.ops.backup.restoring import Restored, restore, verify
from orchestrator.ops.backup.retention import prune
from orchestrator.ops.backup.sealing import new_key

__all__ = [
    "BackupError", "Changed", "Created", "Damaged", "Difference", "Info", "Newer", "Report", "Restored", "create",
    "infos", "new_key", "newest", "prune", "restore", "verify",
]  # fmt: skip
