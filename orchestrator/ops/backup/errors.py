"""What goes wrong with a backup, for people."""

from __future__ import annotations


class BackupError(Exception):
    """A backup cannot be made, read or put back; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class Damaged(BackupError):
    """A file is no backup, or not every byte of it is as it was written."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "take another backup: `truthgpt backup list` shows what there is")


class Newer(BackupError):
    """A file is of a form that this version does not know: it is not damaged."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: it was made by a newer version of truthgpt", "upgrade truthgpt, then try again")


class Changed(BackupError):
    """What was being copied was removed or replaced meanwhile."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} changed while it was being copied", "make the backup again once nobody changes it")
