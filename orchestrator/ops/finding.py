"""What a check of a deployment says, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata

from orchestrator import models
from orchestrator.local import lone, state
from orchestrator.settings import Settings


@dataclass(frozen=True)
class Finding:
    """One check's result. Ok with a hint is a warning; `ok` is None for what does not exist yet."""

    name: str
    ok: bool | None
    detail: str
    hint: str = ""


@dataclass(frozen=True)
class Limits:
    """What a machine must have free, bytes."""

    shared_memory_bytes: int = 64 << 20
    disk_bytes: int = 512 << 20


def installed(package: str) -> str | None:
    """Version of an installed distribution, found without importing it; None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Deployment:
    """Settings and where they meet the machine. `version`: of a distribution; `offline`: what runs is ignored."""

    settings: Settings
    limits: Limits = field(default_factory=Limits)
    version: Callable[[str], str | None] = installed
    offline: bool = False

    @cached_property
    def stack(self) -> state.State | None:
        """The running stack of the home, or a gateway that runs by itself; None when there is neither."""
        if self.offline:
            return None
        found = state.read(self.settings.home)
        return found if found is not None and found.running else lone.find(self.settings)

    @cached_property
    def elsewhere(self) -> str:
        """Where the Triton servers are that are used in place of own ones; empty where there are own ones."""
        if self.stack is not None:
            return "" if self.stack.tritons else self.stack.triton_http
        return self.settings.triton_urls or ""

    def choice(self) -> models.Choice:
        """The model that is served, or would be by `truthgpt up`. Raises ModelsError."""
        if self.stack is not None:
            return models.Choice(self.stack.model)
        return models.choice(self.settings)
