"""`truthgpt config check`: a whole deployment validated without starting or asking anything."""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.jobs.table import ScheduleError, schedules
from orchestrator.ops import checks_machine as machine
from orchestrator.ops import checks_stack as stack
from orchestrator.ops.finding import Deployment, Finding


@dataclass(frozen=True)
class Problem:
    """What is wrong, in a sentence, and what to do about it."""

    problem: str
    hint: str


def problems(deployment: Deployment) -> list[Problem]:
    """Everything that would keep `truthgpt up` from serving, as far as files and settings show it."""
    checks = (
        machine.check_platform, machine.check_packages, machine.check_server, machine.check_home,
        machine.check_repository, _redis_url, _schedules, stack.check_choice, stack.check_entry,
    )  # fmt: skip
    findings = [check(replace(deployment, offline=True)) for check in checks]
    return [Problem(found.detail, found.hint) for found in findings if found.ok is False]


def _redis_url(deployment: Deployment) -> Finding:
    url = deployment.settings.redis_url
    if url is None:
        return stack.check_redis(deployment)
    from redis.connection import parse_url

    try:
        parse_url(url)  # type: ignore[no-untyped-call]
    except ValueError as error:
        return Finding(
            "redis", False, f"redis_url cannot be read: {error}", "write it as redis://[:PASSWORD@]HOST:PORT/DB"
        )
    return Finding("redis", True, "given")


def _schedules(deployment: Deployment) -> Finding:
    try:
        schedules(deployment.settings)
    except ScheduleError as error:
        return Finding("schedules", False, str(error), error.hint)
    return Finding("schedules", True, "given")
