"""What keeps a model from being tuned."""

from __future__ import annotations


class TuneError(Exception):
    """It cannot be done; `hint` says what to do. Nothing has been changed unless the message says so."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class CandidateError(Exception):
    """One candidate could not be measured, and counts as failed; the search goes on."""
