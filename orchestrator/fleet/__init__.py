"""The Triton servers that the gateway drives: who they are, how they are, and which of them a request goes to."""

from __future__ import annotations

from orchestrator.fleet.control import Control
from orchestrator.fleet.fleet import Fleet
from orchestrator.fleet.member import Member, ServerState, Visit
from orchestrator.fleet.roster import Times

__all__ = ["Control", "Fleet", "Member", "ServerState", "Times", "Visit"]
