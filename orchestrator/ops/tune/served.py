"""The running stack of a home, if there is one: which version it serves, whether it is busy, and its reload."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.client import GatewayClient, GatewayError
from orchestrator.local import modelset, state
from orchestrator.ops.modelcontrol import Control, Outcome
from orchestrator.settings import Settings

ASK_S = 2.0


@dataclass(frozen=True)
class Served:
    """A model of a running stack, in this version."""

    settings: Settings
    found: state.State
    model: str
    version: int

    def reload(self, say: Callable[[str], None]) -> Outcome:
        """Have it take up its config.pbtxt, in the version that is served. Raises what Control.reload raises."""
        return Control(self.settings, self.found, self.settings.start_timeout_s, say).reload(self.model, self.version)


def served(settings: Settings, model: str) -> Served | None:
    """None where no stack runs, it does not serve the model, or others' servers do that for it."""
    found = state.read(settings.home)
    version = modelset.read(settings.home.resolve()).get(model)
    if found is None or not found.running or not found.tritons or version is None:
        return None
    return Served(settings, found, model, version)


def in_flight(settings: Settings) -> int:
    """Requests that the running stack is at work on, whose company disturbs what is measured; 0 where none runs."""
    found = state.read(settings.home)
    if found is None or not found.running:
        return 0
    with contextlib.suppress(GatewayError):
        count = GatewayClient(found.http, ASK_S).health().get("in_flight")
        return count if isinstance(count, int) else 0
    return 0
