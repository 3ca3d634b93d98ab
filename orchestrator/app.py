"""The composition root: settings -> objects -> ASGI application and gRPC server. `python -m orchestrator.app` runs it.

Knows everyone, and nobody knows it. Starts and stays live while Triton is away; ready once its models answer.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

from orchestrator import audit, logs
from orchestrator.activity import Activity
from orchestrator.admission import Admission
from orchestrator.api.admin import Admin, Figures, Scrape
from orchestrator.api.credentials import credential_of
from orchestrator.api.encoders import Encoders
from orchestrator.api.fields import Defaults
from orchestrator.api.http import Receive, Scope, Send
from orchestrator.api.kserve import KServe
from orchestrator.api.middleware import FrontDoor
from orchestrator.api.openai import OpenAI
from orchestrator.api.openapi import Description
from orchestrator.api.probes import Probes
from orchestrator.auth import Auth
from orchestrator.breaker import Breakers
from orchestrator.cache import DEFAULT_TTL_S
from orchestrator.domain import Caller, Limits
from orchestrator.fleet import Control, Fleet, Times
from orchestrator.flights import Flights
from orchestrator.gateway import Gateway
from orchestrator.incident import Incident
from orchestrator.inspection import Inspector
from orchestrator.limiter import Limiter
from orchestrator.metrics import Metrics
from orchestrator.metrics_readings import audit_readings, readings
from orchestrator.registry import Registry
from orchestrator.resolving import Entry, Resolver, entries
from orchestrator.retries import RetryBudget
from orchestrator.sanitize import Rules
from orchestrator.screening import Screen
from orchestrator.settings import Settings
from orchestrator.store import Store
from orchestrator.tokens import Tokens
from orchestrator.tracing import Tracer
from orchestrator.triton import Deadlines, Triton
from orchestrator.upstream import Fallback, Upstream

if TYPE_CHECKING:
    from orchestrator.api.grpc_server import GrpcServer

ADMIN_CALL_S = 600.0  # loading a model of many gigabytes
KEYS_KNOWN_S = 1.0  # a gateway starts without Redis, too


class _Application:
    """An ASGI application: lifespan starts and stops the parts, everything else goes through the front door."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._door: FrontDoor | None = None
        self._fleet: Fleet | None = None
        self._tracer: Tracer | None = None
        self._audit: audit.Audit | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http" and self._door is not None:
            await self._door(scope, receive, send)
        else:
            raise RuntimeError(f"no {scope['type']} is served here")

    async def start(self) -> None:
        """Assemble everything; needs a running loop."""
        raise NotImplementedError

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._fleet is not None:
            await self._fleet.close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
        if self._audit is not None:
            await asyncio.to_thread(self._audit.close)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.start()
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return

    def _run(self, **work: Coroutine[Any, Any, None]) -> None:
        self._tasks = [asyncio.create_task(running, name=name) for name, running in work.items()]


class Application(_Application):
    """The public edge of one worker."""

    gateway: Gateway | None = None
    metrics: Metrics | None = None
    grpc: GrpcServer | None = None

    async def start(self) -> None:
        """Assemble everything; needs a running loop."""
        settings = self.settings
        fleet = self._fleet = connect(settings)
        store = Store(settings.redis_url, settings.redis_timeout_s) if settings.redis_url else None
        registry = Registry(store, settings.keys_grace_s, DEFAULT_TTL_S)
        auth = Auth(settings.auth, registry, default_limits(settings))
        breakers = Breakers(settings.breaker_failures, settings.breaker_open_s, store)
        fleet.on_ready.append(breakers.heard_again)
        fleet.on_gone.append(breakers.forget)
        registry.on_copy.append(lambda: fleet.drain(registry.drained))
        limiter = Limiter(store, settings.limits, settings.redis_loss, settings.workers)
        flights = Flights(store, registry.ttl_of, settings.cache_entry_bytes) if store and settings.cache else None
        fallback = Fallback(settings.fallback_model, settings.fallback_text)
        retries, inspect = RetryBudget(settings.retries), Inspector(fleet)
        metrics = Metrics(fleet.serves)
        upstream = Upstream(fleet, breakers, retries, fallback, settings.max_output_chars, metrics.upstream)
        tracer = self._tracer = Tracer(settings) if settings.otlp_endpoint else None
        auditing = self._audit = audit.start(settings)
        activity = Activity(store) if store else None
        sinks = [logs.log_request, metrics.record]
        sinks += [part.record for part in (activity, tracer, auditing) if part]
        gateway = self.gateway = Gateway(
            fleet=fleet,
            admission=Admission(settings.max_concurrency),
            screen=Screen(Rules(settings.sanitize, settings.max_input_chars), inspect),
            tokens=Tokens(inspect, settings.max_new_tokens),
            limiter=limiter,
            flights=flights,
            breakers=breakers,
            upstream=upstream,
            sinks=sinks,
            answer_rules=f"{settings.max_new_tokens} tokens, {settings.max_output_chars} characters",
            fingerprint=auditing.prints.request if auditing else lambda request: "",
            trace=tracer.begin if tracer else lambda traceparent: None,
        )
        metrics.readings |= readings(gateway, limiter, store) | audit_readings(auditing)
        self.metrics = metrics
        # one request alone may not ask for more places than admission has
        at_once = min(settings.max_batch_size, settings.max_concurrency)
        defaults = Defaults(temperature=settings.temperature)
        openai = OpenAI(gateway, defaults, settings.request_timeout_s, at_once)
        encoders = Encoders(gateway, settings.request_timeout_s)
        kserve = KServe(gateway, fleet.describe, defaults, settings.request_timeout_s)
        audited = auditing.health if auditing else audit.off
        probes = Probes(gateway, lambda: store.up if store else None, audited)

        description = Description(defaults, settings.body_limit_bytes, settings.auth == "keys")

        def identify(headers: dict[bytes, bytes], address: str) -> Caller:
            return auth.caller(credential_of(headers), address)

        routes = {**openai.routes, **encoders.routes, **kserve.routes, **probes.routes, **description.routes}
        report = reporting(metrics, auditing)
        self._door = FrontDoor(routes, settings.body_limit_bytes, identify, report)
        running = {"fleet": fleet.run(), "limiter": limiter.run(), "registry": registry.run()}
        if store:
            running["store"] = store.run()
        if activity:
            running["activity"] = activity.run()
        if flights:
            running["flights"] = flights.run()
        self._run(**running)
        if store:
            await registry.first_copy(KEYS_KNOWN_S)
        if settings.grpc:
            os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own lines on standard error are no JSON
            # here, because whoever does without has no need of what it costs: 15 MB
            from orchestrator.api.grpc_server import GrpcServer, methods

            served = methods(gateway, fleet.describe, defaults, settings.request_timeout_s)
            limit_bytes = settings.body_limit_bytes
            self.grpc = GrpcServer(served, identify, report, settings.trusted_proxies, limit_bytes)
            await self.grpc.start(settings.host, settings.grpc_port)

    async def stop(self) -> None:
        if self.grpc is not None:
            await self.grpc.stop()
        if self.gateway is not None:
            self.gateway.record()  # the last ones
        await super().stop()


class AdminApplication(_Application):
    """The admin edge: Triton's model control and settings, for admin keys alone; `scrape` and `figures` are for all.

    `metrics` count what this edge refuses.
    """

    def __init__(self, settings: Settings, scrape: Scrape, figures: Figures, metrics: Metrics) -> None:
        super().__init__(settings)
        self._scrape, self._figures, self._metrics = scrape, figures, metrics
        self._control: Control | None = None

    async def start(self) -> None:
        """Assemble everything; needs a running loop."""
        settings = self.settings
        store = Store(settings.redis_url, settings.redis_timeout_s) if settings.redis_url else None
        registry = Registry(store, settings.keys_grace_s, DEFAULT_TTL_S)
        auth = Auth(settings.auth, registry, default_limits(settings))

        def identify(headers: dict[bytes, bytes], address: str) -> Caller:
            return auth.admin(credential_of(headers))

        auditing = self._audit = audit.start(settings)
        self._metrics.readings |= audit_readings(auditing)
        tell = auditing.incident if auditing else lambda incident: None
        control = self._control = Control(resolver(settings), client(settings), partial(grpc_address, settings))
        routes = Admin(control.forward, ADMIN_CALL_S, self._scrape, self._figures, tell).routes
        self._door = FrontDoor(routes, settings.body_limit_bytes, identify, reporting(self._metrics, auditing))
        self._run(registry=registry.run(), **({"store": store.run()} if store else {}))
        if store:
            await registry.first_copy(KEYS_KNOWN_S)

    async def stop(self) -> None:
        if self._control is not None:
            self._control.close()
        await super().stop()


def reporting(metrics: Metrics, auditing: audit.Audit | None) -> Callable[[Incident], None]:
    """Whom an edge tells of what it refuses by itself."""
    if auditing is None:
        return metrics.incident

    def report(incident: Incident) -> None:
        metrics.incident(incident)
        auditing.incident(incident)

    return report


def connect(settings: Settings) -> Fleet:
    """The Triton servers of these settings; needs a running loop. Raises ServersError."""
    times = Times(
        interval_s=settings.heartbeat_interval_s,
        engine_stall_s=settings.engine_stall_s,
        drain_s=settings.drain_s,
        resolve_s=settings.triton_resolve_s,
        eject_s=settings.triton_eject_s,
    )
    return Fleet(resolver(settings), client(settings), times, settings.prefix_affinity)


def resolver(settings: Settings) -> Resolver:
    """Where the servers are. Raises ServersError."""
    return Resolver(entries(settings.triton_urls or f"http://127.0.0.1:{settings.triton_http_port}"))


def client(settings: Settings) -> Callable[[str], Triton]:
    """Makes the client of a server; needs a running loop."""
    deadlines = Deadlines(
        connect_s=settings.connect_s,
        stall_s=settings.stall_s,
        token_gap_s=settings.token_gap_s,
        first_token_s=settings.first_token_s,
        request_s=settings.request_timeout_s,
        heartbeat_s=settings.heartbeat_timeout_s,
    )
    return lambda url: Triton(url, deadlines, settings.max_new_tokens)


def grpc_address(settings: Settings, server: Entry) -> str:
    """A server's gRPC port is as far from `triton_grpc_port` as its HTTP port is from `triton_http_port`."""
    port = settings.triton_grpc_port + server.port - settings.triton_http_port
    return f"[{server.host}]:{port}" if ":" in server.host else f"{server.host}:{port}"


def default_limits(settings: Settings) -> Limits:
    """What a caller may do for whom nothing else is set."""
    return Limits(
        per_minute=settings.limit_per_minute,
        per_hour=settings.limit_per_hour,
        per_day=settings.limit_per_day,
        tokens_per_minute=settings.limit_tokens_per_minute,
        tokens_per_day=settings.limit_tokens_per_day,
        concurrency=settings.limit_concurrency,
    )


if __name__ == "__main__":
    from orchestrator.parent import main

    sys.exit(main())
