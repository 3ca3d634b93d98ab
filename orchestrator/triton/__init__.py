"""Everything that talks to Triton; nobody else does."""

from __future__ import annotations

from orchestrator.triton.attendance import Attendance, Deadlines
from orchestrator.triton.client import Heartbeat, ModelConfig, Prompt, Triton
from orchestrator.triton.repository import Repository, Row, is_engine
from orchestrator.triton.wire import Reply

__all__ = [
    "Attendance", "Deadlines", "Heartbeat", "ModelConfig", "Prompt", "Reply", "Repository", "Row", "Triton",
    "is_engine",
]  # fmt: skip
