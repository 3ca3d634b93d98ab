"""Which backups are kept."""

from __future__ import annotations

import os
import time
from pathlib import Path

from orchestrator.ops.backup import names
from orchestrator.ops.backup.errors import Damaged, Newer
from orchestrator.ops.backup.names import Info
from orchestrator.ops.backup.sealing import MAGIC
from orchestrator.ops.backup.tarform import FOOTER_BYTES, TAIL_BYTES, read_footer
from orchestrator.settings import Settings

DAY_S = 86_400.0


def prune(settings: Settings, dry_run: bool = False, now: float | None = None, made: Path | None = None) -> list[Path]:
    """Remove backups older than `backup_days`, and the oldest of more than `backup_keep`; which those were.

    Never the newest one that looks complete, nor `made`, which is the one that was made just now: a clock that was
    wrong has given others later dates. Those dated in the future are the first to go. Parts that were abandoned go,
    too; nothing else does. Raises OSError.
    """
    at = time.time() if now is None else now
    found = sorted(names.infos(settings.backups), key=lambda info: (info.path != made, info.ahead(at)))
    best = next((info for info in found if looks_complete(info)), None)
    removed = []
    for rank, info in enumerate(found):
        old = settings.backup_days > 0 and at - info.created > settings.backup_days * DAY_S
        over = settings.backup_keep > 0 and rank >= settings.backup_keep
        if (old or over) and info != best and info.path != made:
            removed.append(info.path)
            if not dry_run:
                info.path.unlink(missing_ok=True)
    return removed + names.remove_abandoned(settings.backups, at, dry_run)


def looks_complete(info: Info) -> bool:
    """Whether a backup's end is there, or of an encrypted one its beginning. Cheap, and no proof: see `verify`."""
    try:
        with info.path.open("rb") as file:
            if info.encrypted:
                return file.read(len(MAGIC)) == MAGIC
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - TAIL_BYTES))
            return read_footer(file.read(TAIL_BYTES))[0] == size - FOOTER_BYTES
    except Newer:
        return True
    except (OSError, Damaged):
        return False
