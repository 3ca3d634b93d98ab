"""`truthgpt doctor`: the commonest set-up faults and a proof of each switch, each on its own and within a deadline."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.ops import checks_machine as machine
from orchestrator.ops import checks_profile as profile
from orchestrator.ops import checks_stack as stack
from orchestrator.ops.finding import Deployment, Finding


@dataclass(frozen=True)
class Check:
    """One check and how long it may take, seconds."""

    name: str
    run: Callable[[Deployment], Finding]
    deadline_s: float = 10.0


CHECKS = (
    Check("platform", machine.check_platform),
    Check("packages", machine.check_packages),
    Check("server", machine.check_server, 30.0),
    Check("home", machine.check_home),
    Check("repository", machine.check_repository),
    Check("disk", machine.check_disk),
    Check("shared_memory", machine.check_shared_memory),
    Check("ports", machine.check_ports),
    Check("redis", stack.check_redis),
    Check("keys", stack.check_keys),
    Check("model", stack.check_model),
    Check("entry", stack.check_entry, 120.0),  # hashes every byte of the weights
    Check("engine", stack.check_engine, 60.0),
    Check("gateway", stack.check_gateway),
    Check("monitoring", profile.check_monitoring),
    Check("alerts", profile.check_alerts, 60.0),  # a sender's attempts, each with its time-out
    Check("security", profile.check_security, 20.0),
    Check("audit", profile.check_audit),
    Check("cache", profile.check_cache),
    Check("breaker", profile.check_breaker),
    Check("cleanup", profile.check_cleanup, 60.0),
    Check("backup", profile.check_backup, 600.0),  # reads every byte
    Check("load_balancing", profile.check_load_balancing),
    Check("auto_scaling", profile.check_auto_scaling),
    Check("leftovers", stack.check_leftovers),
)


def examine(deployment: Deployment, checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """Run the checks at the same time; findings in their order. A check that fails or hangs is itself a finding."""
    # Daemon threads, not a pool: a pool waits for a hanging check when the process ends.
    results: list[queue.SimpleQueue[Finding]] = []
    for check in checks:
        result: queue.SimpleQueue[Finding] = queue.SimpleQueue()
        threading.Thread(target=_run, args=(check, deployment, result), name=check.name, daemon=True).start()
        results.append(result)
    began = time.monotonic()
    found = []
    for check, result in zip(checks, results, strict=True):
        try:
            found.append(result.get(timeout=max(0.0, began + check.deadline_s - time.monotonic())))
        except queue.Empty:
            detail = f"the check did not end within {check.deadline_s:g} s"
            hint = "look for a stalled disk, network mount or server; the other checks may tell more"
            found.append(Finding(check.name, False, detail, hint))
    return found


def _run(check: Check, deployment: Deployment, result: queue.SimpleQueue[Finding]) -> None:
    try:
        result.put(check.run(deployment))
    except Exception as error:  # what a check trips over is worth telling, and the others go on
        hint = "mend what it names, or report it as a fault of truthgpt"
        result.put(Finding(check.name, False, f"the check failed: {type(error).__name__}: {error}", hint))
