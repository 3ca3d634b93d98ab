"""Checks of the production profile's switches: each is proven by using what it switches on."""

from __future__ import annotations

import time
from collections.abc import Callable

from orchestrator.client import GatewayClient, GatewayError
from orchestrator.ops import cleanup, joblist, proofs
from orchestrator.ops.cleanwork import Work
from orchestrator.ops.finding import Deployment, Finding
from orchestrator.ops.redis import NoRedis, connect

ASK_S = 3.0
LATE_S = 3600.0  # a job that is due waits for those before it
HISTORY_S = 180.0  # the metric history has a line a minute
NO_KEY = "tg_aaaaaaaaaaaa_doctor-looks-whether-this-is-refused"
_NOT_RUNNING = "it is looked at while the stack runs"


def check_monitoring(deployment: Deployment) -> Finding:
    """The ops port answers with series and figures, and the history is written."""
    from prometheus_client.parser import text_string_to_metric_families

    from orchestrator.monitor import history

    name, settings, stack = "monitoring", deployment.settings, deployment.stack
    if stack is None:
        return Finding(name, True, _off("monitoring") if not settings.monitoring else _NOT_RUNNING)
    log = settings.home / "logs" / "gateway.log"
    try:
        client = GatewayClient(stack.ops, ASK_S)
        requests = client.summary()["requests"]
        series = sum(1 for _ in text_string_to_metric_families(client.metrics()))
    except (GatewayError, ValueError, KeyError) as error:
        return Finding(name, False, f"{stack.ops} does not say how the stack is doing: {error}", f"see {log}")
    detail = f"{series} series, {requests} requests in the last five minutes"
    if not settings.monitoring:
        return Finding(name, True, f"{detail}; {_off('monitoring')}", _on(deployment, "monitoring"))
    now = time.time()
    if now - stack.started > HISTORY_S and next(history.read(settings.home, now - HISTORY_S, now), None) is None:
        return Finding(name, False, f"{detail}, but no metric history was written for three minutes", f"see {log}")
    return Finding(name, True, detail)


def check_alerts(deployment: Deployment) -> Finding:
    """A test alert goes out through every sender that is set."""
    from orchestrator.monitor.senders import test_senders

    settings = deployment.settings
    if not settings.monitoring:
        return Finding("alerts", True, _off("monitoring"), _on(deployment, "monitoring"))
    results = test_senders(settings)
    if not results:
        hint = "set TRUTHGPT_ALERT_WEBHOOK_URL, TRUTHGPT_ALERT_SLACK_URL or TRUTHGPT_ALERT_EMAIL_TO"
        return Finding("alerts", True, "nobody is told of alerts: no sender is set", _advice(deployment, hint))
    failed = [f"{result.sender}: {result.detail}" for result in results if not result.ok]
    if failed:
        return Finding("alerts", False, "; ".join(failed), "`truthgpt alerts test` tries it again")
    return Finding("alerts", True, f"a test alert was sent by {', '.join(result.sender for result in results)}")


def check_security(deployment: Deployment) -> Finding:
    """A wrong key and a call to the admin port without one are refused; dangerous prompts are; limits hold."""
    settings, stack = deployment.settings, deployment.stack
    try:
        told = [proofs.sanitizer(settings)]
        if stack is not None:
            told += [_refuses_strangers(deployment), proofs.limits(stack.redis, settings)]
    except proofs.NotProven as error:
        return Finding("security", False, str(error), "see logs/gateway.log, and report it as a fault of truthgpt")
    open_ = [f"{what} is off" for what, off in (
        ("TRUTHGPT_AUTH", settings.auth == "open"), ("TRUTHGPT_SANITIZE", settings.sanitize == "off"),
        ("TRUTHGPT_LIMITS", settings.limits != "enforce"),
    ) if off]  # fmt: skip
    hint = _advice(deployment, f"{', '.join(open_)}: right for development only") if open_ else ""
    return Finding("security", True, "; ".join(told), hint)


def _refuses_strangers(deployment: Deployment) -> str:
    stack = deployment.stack
    if stack is None:
        raise proofs.NotProven("no stack is running")
    doors: list[tuple[str, Callable[[], object]]] = [
        ("the admin port", lambda: GatewayClient(stack.ops, ASK_S, NO_KEY).ask("/v2/repository/index", {}))
    ]
    if deployment.settings.auth == "keys":
        doors.append(("the gateway", lambda: GatewayClient(stack.http, ASK_S, NO_KEY).models()))
    for whose, knock in doors:
        try:
            knock()
        except GatewayError as error:
            if error.status in (401, 403):
                continue
            raise proofs.NotProven(f"{whose} did not refuse a wrong key but said: {error}") from error
        raise proofs.NotProven(f"{whose} let a wrong key in")
    return "a wrong key is refused" if len(doors) > 1 else "a wrong key is refused at the admin port"


def check_audit(deployment: Deployment) -> Finding:
    """What happens is written down: an event is written and read again, and follows what was before."""
    from orchestrator.audit import AuditKeyError, AuditLogError
    from orchestrator.auditlog import folder_of
    from orchestrator.ops import auditing, auditread

    settings = deployment.settings
    if not settings.audit:
        return Finding("audit", True, _off("audit"), _on(deployment, "audit"))
    if deployment.stack is None:
        return Finding("audit", True, _NOT_RUNNING)
    hint = "free space or give the folder back to this user; `truthgpt audit verify` checks all of it"
    problem = auditing.note(settings, "doctor", detail="is this written?")
    if problem:
        return Finding("audit", False, f"nothing can be written: {problem}", hint)
    try:
        rows = auditread.tail(folder_of(settings.home), 50, auditread.Wanted(("security",)))
    except (OSError, auditing.NoAuditLog, AuditKeyError, AuditLogError) as error:
        return Finding("audit", False, f"it cannot be read: {error}", hint)
    if not any(row.get("operation") == "doctor" for row in rows):
        return Finding("audit", False, "an event that was written is not there", hint)
    return Finding("audit", True, f"an event was written and read again, number {rows[-1]['seq']}")


def check_cache(deployment: Deployment) -> Finding:
    """An answer is stored and found again."""
    if not deployment.settings.cache:
        return Finding("cache", True, _off("cache"), _on(deployment, "cache"))
    if deployment.stack is None:
        return Finding("cache", True, _NOT_RUNNING)
    return _proven("cache", lambda: proofs.cache(deployment.stack.redis, deployment.settings),  # type: ignore[union-attr]
                   "see the check of Redis; its memory may be full (TRUTHGPT_REDIS_MAX_BYTES)")  # fmt: skip


def check_breaker(deployment: Deployment) -> Finding:
    """A breaker opens at the failures that are set, and closes."""
    return _proven("breaker", lambda: proofs.breaker(deployment.settings), "report it as a fault of truthgpt")


def check_cleanup(deployment: Deployment) -> Finding:
    """The jobs run: none is failing, paused or long overdue, and what could be cleaned up can be told."""
    from orchestrator.jobs.table import ScheduleError, schedules

    settings = deployment.settings
    try:
        crons = schedules(settings)
    except ScheduleError as error:
        return Finding("cleanup", False, str(error), error.hint)
    if not settings.maintenance:
        return Finding("cleanup", True, _off("maintenance"), _on(deployment, "maintenance"))
    work = Work(dry=True)
    tallies = cleanup.clean(settings, work, cleanup.TARGETS)
    errors = [error for tally in tallies for error in tally.errors]
    if errors:
        return Finding("cleanup", False, errors[0], "`truthgpt cleanup plan` shows all; mend its cause")
    size_mb = sum(tally.bytes for tally in tallies) / (1 << 20)
    detail = f"{len(crons)} jobs; {sum(tally.count for tally in tallies)} old things may go, {size_mb:.1f} MiB"
    if deployment.stack is None:
        return Finding("cleanup", True, f"{detail}; the jobs run while the stack does")
    return _jobs(deployment, detail)


def _jobs(deployment: Deployment, detail: str) -> Finding:
    try:
        with connect(deployment.settings) as client:
            rows = joblist.rows(deployment.settings, client, time.time())
    except NoRedis as error:
        return Finding("cleanup", False, f"no job runs: {error}", "see the check of Redis")
    failing = [row["name"] for row in rows if row["last_result"] not in (None, "ok")]
    now, busy = time.time(), any(row["running"] for row in rows)
    late = [row["name"] for row in rows if row["next_run"] and now - row["next_run"] > LATE_S and not busy]
    if failing:
        return Finding("cleanup", False, f"the last run of {', '.join(failing)} failed", "`truthgpt jobs history`: why")
    if late:
        return Finding("cleanup", False, f"long overdue: {', '.join(late)}", "see logs/gateway.log: none starts")
    idle = [f"{row['name']} is paused: `truthgpt jobs resume {row['name']}`" for row in rows if row["paused"]]
    idle += [f"{row['name']} is off (TRUTHGPT_SCHEDULES)" for row in rows if row["schedule"] is None]
    return Finding("cleanup", True, detail, "; ".join(idle))


def check_backup(deployment: Deployment) -> Finding:
    """Every byte of the newest backup is right, and it is not too old."""
    from orchestrator.ops import backup

    settings = deployment.settings
    newest = backup.newest(settings.backups)
    if newest is None:
        if not settings.backup:
            return Finding("backup", True, f"{_off('backup')}, and there is none", _on(deployment, "backup"))
        hint = "make one with `truthgpt backup create`" if deployment.stack else ""
        return Finding("backup", deployment.stack is None, f"there is no backup in {settings.backups}", hint)
    if newest.ahead(time.time()):
        hint = "set the clock of this machine; if it is right, remove or rename that file, whose date is wrong"
        return Finding("backup", False, f"the newest backup, {newest.path.name}, is dated in the future", hint)
    try:
        report = backup.verify(newest.path, settings.backup_key)
    except (backup.BackupError, OSError) as error:
        hint = getattr(error, "hint", "") or "make another with `truthgpt backup create`"
        return Finding("backup", False, f"{newest.path.name} does not verify: {error}", hint)
    age_s = time.time() - newest.created
    detail = f"every byte of {newest.path.name} is right, {age_s / 3600:.1f} hours old"
    if settings.backup and age_s > settings.alert_backup_age_s:
        return Finding("backup", False, detail, "it is too old: `truthgpt jobs history backup` says why")
    hint = "" if report.encrypted else _advice(deployment, "it is not encrypted: see `truthgpt backup keygen`")
    return Finding("backup", True, detail, hint)


def check_load_balancing(deployment: Deployment) -> Finding:
    """Several Triton servers share what is asked, and one that fails is left alone until it is back."""
    name, settings, stack = "load_balancing", deployment.settings, deployment.stack
    if stack is None:
        return Finding(name, True, _NOT_RUNNING)
    try:
        rows = GatewayClient(stack.http, ASK_S).health().get("tritons") or []
    except GatewayError as error:
        return Finding(name, False, f"the gateway does not say which servers it has: {error}", "mend the gateway first")
    drained = [row["url"] for row in rows if row["state"] == "draining"]
    urls = [row["url"] for row in rows if row["url"] not in drained]
    back = f"drained: {', '.join(drained)}; `truthgpt tritons resume URL` has it take requests again" if drained else ""
    if len(urls) > 1:
        try:
            return Finding(name, True, proofs.balancing(urls, settings), back)
        except proofs.NotProven as error:
            return Finding(name, False, str(error), "see `truthgpt tritons list`, and that server's log")
    if back:
        return Finding(name, bool(urls), f"{len(rows)} Triton servers, of which {len(urls)} may take requests", back)
    hint = "one more takes over when it fails: TRUTHGPT_TRITONS or TRUTHGPT_TRITON_URLS, docs/several-tritons.md"
    hint = hint if settings.environment == "production" else ""
    return Finding(name, True, "one Triton server: nothing to balance", hint)


def check_auto_scaling(deployment: Deployment) -> Finding:
    """Replicas that come and go with the load."""
    return Finding("auto_scaling", None, "not available: start more replicas by hand")


def _proven(name: str, prove: Callable[[], str], hint: str) -> Finding:
    try:
        return Finding(name, True, prove())
    except proofs.NotProven as error:
        return Finding(name, False, str(error), hint)


def _off(setting: str) -> str:
    return f"off (TRUTHGPT_{setting.upper()}=false)"


def _on(deployment: Deployment, setting: str) -> str:
    return _advice(deployment, f"switch it on: TRUTHGPT_{setting.upper()}=true")


def _advice(deployment: Deployment, text: str) -> str:
    """What who develops needs not be told."""
    return "" if deployment.settings.environment == "development" else text
