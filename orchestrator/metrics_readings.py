"""The series of a worker that are not counted but read from the parts that know them, once a second."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

from orchestrator.audit import Audit
from orchestrator.breaker import CLOSED, HALF_OPEN, OPEN
from orchestrator.gateway import Gateway
from orchestrator.limiter import Limiter
from orchestrator.metrics import Labels, Reading
from orchestrator.store import Store

BREAKER_STATES = {CLOSED: 0.0, HALF_OPEN: 1.0, OPEN: 2.0}


def readings(gateway: Gateway, limiter: Limiter, store: Store | None) -> dict[str, Reading]:
    """By name of the series, see metrics_table.py."""

    def breakers() -> Mapping[Labels, float]:
        states = {**{served.model.name: CLOSED for served in gateway.served}, **gateway.breakers}
        return {(model,): BREAKER_STATES[state] for model, state in states.items()}

    def model_requests() -> Mapping[Labels, float]:
        values: dict[Labels, float] = {}
        for served in gateway.served:
            if served.beat is not None:
                values[served.model.name, "running"] = served.beat.running
                values[served.model.name, "waiting"] = served.beat.waiting
        return values

    def fallbacks() -> Mapping[Labels, float]:
        return {(s.model.name,): float(s.fallback) for s in gateway.served if s.beat is not None}

    def servers() -> Mapping[Labels, float]:
        states = Counter(server.state for server in gateway.fleet.states())
        return {(state,): float(states[state]) for state in ("ready", "ejected", "draining", "down")}

    return {
        "truthgpt_in_flight": lambda: {(): float(gateway.in_flight)},
        "truthgpt_breaker_state": breakers,
        "truthgpt_model_ready": lambda: {(s.model.name,): float(s.model.ready) for s in gateway.served},
        "truthgpt_model_fallback": fallbacks,
        "truthgpt_model_requests": model_requests,
        "truthgpt_triton_up": lambda: {(): float(gateway.triton_up)},
        "truthgpt_triton_servers": servers,
        "truthgpt_triton_failovers_total": lambda: {(): float(gateway.fleet.failovers)},
        "truthgpt_triton_lookup_failures_total": lambda: {(): float(gateway.fleet.lookup_failures)},
        "truthgpt_limit_degraded": lambda: {(): float(gateway.limits_degraded)},
        "truthgpt_limit_without_redis_total": lambda: {(): float(limiter.without_redis)},
        "truthgpt_redis_up": lambda: {} if store is None else {(): float(store.up)},
        "truthgpt_workers_ready": lambda: {(): float(gateway.ready)},
        "truthgpt_cpu_seconds_total": lambda: {(): time.process_time()},
    }


def audit_readings(audit: Audit | None) -> dict[str, Reading]:
    """Those of a process that writes the audit log; none where nothing is written."""
    if audit is None:
        return {}
    return {
        "truthgpt_audit_up": lambda: {(): float(audit.state == "ok")},
        "truthgpt_audit_lost_total": lambda: {(): float(audit.lost_total)},
    }
