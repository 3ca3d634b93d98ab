"""The same deployment as for the commands."""

from __future__ import annotations

from tests.orchestrator.cli.conftest import entry, gateway, place

__all__ = ["entry", "gateway", "place"]
