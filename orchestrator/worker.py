"""A gateway process: the application under the server, until it is told to stop."""

from __future__ import annotations

import logging
import sys

from orchestrator import logs
from orchestrator.app import Application
from orchestrator.server import Server, configure
from orchestrator.settings import Settings, SettingsError

log = logging.getLogger(__name__)


def build(settings: Settings) -> Server:
    """The server of these settings, not yet running."""
    application = Application(settings)

    async def drain() -> None:
        if application.gateway is not None:
            await application.gateway.drain(settings.drain_s)

    return Server(configure(application, settings), drain)


def main() -> int:
    """Serve until SIGTERM or SIGINT; 0 after a drain."""
    try:
        settings = Settings.load()
    except SettingsError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    logs.configure(settings.log_level, settings.debug)
    for warning in settings.warnings:
        log.warning("%s", warning)
    server = build(settings)
    server.run()
    return 0 if server.started else 1
