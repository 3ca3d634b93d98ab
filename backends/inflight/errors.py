"""What the engine can refuse or fail with.

    EngineError
    ├── InvalidArgument     the request can never succeed as it stands
    ├── ResourceExhausted   the waiting queue is full; try again later
    ├── OutOfMemory         the device has no memory left for this request; try again later
    ├── DeadlineExceeded    the request's own deadline passed
    ├── Unavailable         the engine is stopping
    └── Internal            the model or the engine failed (non-finite logits, a session error)
        └── DeviceLost      the accelerator failed; the engine goes on on the CPU where it can

Triton carries one string. Its form is `<kind>: <text>`, so that a client behind any of Triton's protocols can tell
the kinds apart.
"""

from __future__ import annotations


class EngineError(Exception):
    """Root of the tree. `kind` is the machine-readable prefix of the wire message."""

    kind = "internal"

    def wire(self) -> str:
        """The message as Triton carries it: `<kind>: <text>`. Triton takes UTF-8 only: what is none is escaped."""
        return f"{self.kind}: {self}".encode(errors="backslashreplace").decode()


class InvalidArgument(EngineError):
    kind = "invalid_argument"


class ResourceExhausted(EngineError):
    kind = "resource_exhausted"


class OutOfMemory(EngineError):
    kind = "out_of_memory"


class DeadlineExceeded(EngineError):
    kind = "deadline_exceeded"


class Unavailable(EngineError):
    kind = "unavailable"


class Internal(EngineError):
    kind = "internal"


class DeviceLost(Internal):
    """Kept inside the engine while it can go on elsewhere; its clients see it as `internal` where it cannot."""
