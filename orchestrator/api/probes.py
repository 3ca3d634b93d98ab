"""Liveness, readiness and deep health. Probes ask; only liveness is constant, because answering at all is the proof."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from orchestrator.api.http import Exchange
from orchestrator.api.middleware import Routes
from orchestrator.gateway import Gateway


class Probes:
    """`redis_up` tells whether Redis answers, None where none is configured; `audit` what /health says of it."""

    def __init__(
        self, gateway: Gateway, redis_up: Callable[[], bool | None], audit: Callable[[], Mapping[str, object]]
    ) -> None:  # fmt: skip
        self._gateway, self._redis_up, self._audit = gateway, redis_up, audit
        self._started_at = time.monotonic()

    @property
    def routes(self) -> Routes:
        return {
            "/health/live": {"GET": self.live},
            "/health/ready": {"GET": self.ready},
            "/health": {"GET": self.health},
            "/v2/health/live": {"GET": self.kserve_live},
            "/v2/health/ready": {"GET": self.kserve_ready},
        }

    async def live(self, exchange: Exchange) -> None:
        """200 as long as this process answers at all."""
        await exchange.reply_json(200, {"live": True})

    async def ready(self, exchange: Exchange) -> None:
        """200 when a request sent now could be answered, else 503; the body says what is missing."""
        ready = self._gateway.ready
        body = {
            "ready": ready,
            "draining": self._gateway.draining,
            "triton": self._gateway.triton_up,
            "models": {served.model.name: served.detail for served in self._gateway.served},
            "breakers": self._gateway.breakers,
        }
        await exchange.reply_json(200 if ready else 503, body, () if ready else ((b"retry-after", b"1"),))

    async def health(self, exchange: Exchange) -> None:
        """Everything a person wants to know first; always 200, because it is not a probe."""
        gateway = self._gateway
        models = []
        for served in gateway.served:
            model, beat = served.model, served.beat
            row: dict[str, object] = {"name": model.name, "version": model.version, "ready": model.ready}
            row |= {"reason": served.reason or None, "task": model.task, "operation": model.operation}
            row |= {"chat": model.chat, "max_len": model.max_len}
            if beat is not None:
                row |= {"running": beat.running, "waiting": beat.waiting, "slots": beat.slots}
                row |= {"busy": beat.busy, "step_age_s": beat.step_age_s}
                row |= {"device": beat.device or None, "fallback": beat.fallback}
            models.append(row)
        servers = gateway.fleet.states()
        await exchange.reply_json(
            200,
            {
                "ready": gateway.ready,
                "draining": gateway.draining,
                "uptime_s": round(time.monotonic() - self._started_at, 3),
                "in_flight": gateway.in_flight,
                "models": models,
                "triton": {"url": ", ".join(server.url for server in servers), "up": gateway.triton_up},
                "tritons": [
                    {"url": s.url, "state": s.state, "outstanding": s.outstanding, "answered_s": s.answered_s}
                    for s in servers
                ],
                "breakers": gateway.breakers,
                "limits": {"degraded": gateway.limits_degraded},
                "redis": {"configured": self._redis_up() is not None, "up": bool(self._redis_up())},
                "audit": self._audit(),
            },
        )

    async def kserve_live(self, exchange: Exchange) -> None:
        await exchange.reply_json(200, {"live": True})

    async def kserve_ready(self, exchange: Exchange) -> None:
        ready = self._gateway.ready
        await exchange.reply_json(200 if ready else 503, {"ready": ready}, () if ready else ((b"retry-after", b"1"),))
