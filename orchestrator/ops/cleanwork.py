"""What a cleaning up finds and does: counted, bounded, and going on after what could not be removed."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from orchestrator.ops.serving import Elsewhere

SHOWN = 1000  # things that a plan names one by one
ERRORS = 20  # of a target that are told one by one


def as_text(path: str) -> str:
    """A path as text that every encoding and JSON has: bytes of it that are no UTF-8 become `\\xff`."""
    try:
        return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a character that no path has
        return path.encode("utf-8", "backslashreplace").decode()


class NotClean(Exception):
    """Something could not be removed; `hint` says what to do. What could be is gone."""

    def __init__(self, did: str, failed: int, first: str) -> None:
        super().__init__(f"{failed} could not be removed, the first of them {first}" + (f"; {did}" if did else ""))
        self.did = did
        self.hint = "`truthgpt cleanup plan` shows what is to go; check its owner and permissions"


@dataclass(frozen=True)
class Item:
    """One thing that is to go. `age_s` is None where age is not why."""

    what: str
    path: str
    bytes: int
    age_s: float | None
    why: str


@dataclass
class Tally:
    """Of one target: how many things went, or would go, and how many bytes that is; what failed or was left out."""

    name: str
    count: int = 0
    bytes: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return {
            "name": self.name, "count": self.count, "bytes": self.bytes, "failed": self.failed,
            "errors": self.errors, "notes": self.notes,
        }  # fmt: skip

    def did(self) -> str:
        """One sentence."""
        return f"{self.count} removed, {self.bytes} bytes" if self.count else "nothing to remove"


class Work:
    """Removes what its targets name or, with `dry`, only counts it. `guard` is called before every removal.

    `now` is Unix time in seconds. `elsewhere` asks for the versions of models that other replicas serve.
    """

    def __init__(
        self, dry: bool = False, guard: Callable[[], None] = lambda: None, now: float | None = None,
        shown: int = SHOWN, elsewhere: Elsewhere = tuple,
    ) -> None:  # fmt: skip
        self.dry, self.guard, self.elsewhere = dry, guard, elsewhere
        self.now = time.time() if now is None else now
        self.items: list[Item] = []
        self.omitted = 0
        self.tallies: list[Tally] = []
        self._shown = shown

    @property
    def tally(self) -> Tally:
        """Of the target that is being worked on."""
        return self.tallies[-1]

    def begin(self, name: str) -> Tally:
        """What follows is counted for this target."""
        self.tallies.append(Tally(name))
        return self.tally

    def remove(self, path: str, size: int, why: str, deed: Callable[[], object], age_s: float | None = None) -> bool:
        """One thing is to go, by this deed; whether it went, or would. Raises what the guard raises."""
        tally, path = self.tally, as_text(path)
        if self.dry:
            if len(self.items) < self._shown:
                self.items.append(Item(tally.name, path, size, age_s, why))
            else:
                self.omitted += 1
        else:
            self.guard()
            try:
                deed()
            except FileNotFoundError:  # somebody else was quicker
                return False
            except OSError as error:
                if error.errno != errno.EBUSY:  # something is mounted there
                    self.failed(path, error)
                return False
        tally.count += 1
        tally.bytes += size
        return True

    def failed(self, path: str, error: Exception) -> None:
        """Something could not be removed or read. The rest goes on."""
        tally = self.tally
        tally.failed += 1
        if len(tally.errors) < ERRORS:
            said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            tally.errors.append(as_text(f"{path}: {said}"))

    def note(self, text: str) -> None:
        """Something was left out on purpose."""
        if len(self.tally.notes) < ERRORS:
            self.tally.notes.append(as_text(text))

    def done(self, tally: Tally) -> str:
        """What a target's work came to, as a sentence. Raises NotClean."""
        if tally.failed:
            raise NotClean(tally.did() if tally.count else "", tally.failed, tally.errors[0])
        return tally.did()
