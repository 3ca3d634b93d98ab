"""Why an export did not happen.

ExportError              anything a person can mend; carries a hint and never needs a traceback
├── SourceError          the checkpoint: unknown id, no network, pickle weights, not a causal LM
├── UnsupportedModel     the architecture needs something that the slot-cache graph cannot express
├── VerificationError    the graph does not compute what transformers computes; blocks publishing
└── RepositoryError      the model repository: unwritable, no space, locked, bad name
"""

from __future__ import annotations

HINT = "docs/models.md has the families that are exported, and why the others are not."
ENCODERS = "docs/encoders.md has what is carried of encoders, and what is not."
DAMAGED = "Download or copy the checkpoint again, completely."


class ExportError(Exception):
    """One sentence for people (``str(error)``) and what to do about it (``hint``)."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class SourceError(ExportError):
    """The checkpoint cannot be found, read or trusted."""


class UnsupportedModel(ExportError):
    """The architecture needs something that the slot-cache graph cannot express."""


class VerificationError(ExportError):
    """The exported graph does not compute what transformers computes."""


class RepositoryError(ExportError):
    """The model repository cannot take the entry."""
