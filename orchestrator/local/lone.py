"""A gateway that runs by itself, as in a container: `python -m orchestrator.app`, in front of servers elsewhere.

No supervisor has started it, and none has written where it is: it listens where the settings say.
"""

from __future__ import annotations

import time

import psutil

from orchestrator.client import GatewayClient, GatewayError
from orchestrator.local.state import State
from orchestrator.settings import Settings

ASK_S = 2.0
PROGRAM = "orchestrator.app"


def find(settings: Settings) -> State | None:
    """Such a gateway of this machine, None where there is none, or Triton servers are this home's own."""
    if settings.triton_urls is None:
        return None
    http = url(settings.host, settings.http_port)
    try:
        health = GatewayClient(http, ASK_S).health()
    except GatewayError:
        return None
    uptime_s = health.get("uptime_s")
    process = _process(settings.http_port)
    if process is None:
        return None
    return State(
        pid=process.pid,
        created=process.create_time(),
        started=time.time() - (uptime_s if isinstance(uptime_s, int | float) else 0.0),
        http=http,
        grpc=address(settings.host, settings.grpc_port) if settings.grpc else "",
        ops=url(settings.ops_host, settings.ops_port),
        triton_http=settings.triton_urls,
        triton_grpc="",
        redis=settings.redis_url or "",
        model=_model(settings, health.get("models")),
        shm_prefix="",
        processes={"gateway": process.pid},
        servers=[],
    )


def _model(settings: Settings, rows: object) -> str:
    """The model that is meant where none is named: that of the settings if it is served, else any that is."""
    names = [str(row.get("name")) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return settings.model if settings.model in names or not names else names[0]


def _process(port: int) -> psutil.Process | None:
    """The parent process of a gateway: the one of ours that listens on this port."""
    for process in psutil.process_iter():
        try:
            if PROGRAM in process.cmdline() and any(
                one.status == psutil.CONN_LISTEN and one.laddr.port == port
                for one in process.net_connections("inet")
            ):  # fmt: skip
                return process
        except psutil.Error:  # it has just ended, or is somebody else's
            continue
    return None


def url(host: str, port: int) -> str:
    """Where a gateway of this machine that listens there is asked."""
    return f"http://{address(host, port)}"


def address(host: str, port: int) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 (compared, not bound)
    return f"{f'[{host}]' if ':' in host else host}:{port}"
