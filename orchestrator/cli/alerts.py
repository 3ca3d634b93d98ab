"""`truthgpt alerts`: what fires and has fired, who looks after it, and whether messages arrive."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli import table
from orchestrator.cli.base import Command, CommandError, Group, audited, json_option, print_json, settings_options
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.monitor.alerts import Alert, Document


@click.group("alerts", cls=Group)
def alerts() -> None:
    """List, show and acknowledge alerts, and send test messages.

    The running stack looks at itself every few seconds (alert_interval_s). docs/alerts.md has every alert, its
    threshold, and how to be told by a webhook, Slack or mail.
    """


_LIST_EPILOG = """\b
Examples:
  truthgpt alerts list
  truthgpt alerts list --firing
  truthgpt alerts list --json
"""


@alerts.command("list", cls=Command, epilog=_LIST_EPILOG)
@click.option("--firing", is_flag=True, help="Those that fire now only.")
@json_option
@settings_options("home")
def list_alerts(settings: Settings, firing: bool, as_json: bool) -> None:
    """List the alerts that fire, the critical ones first, and those that were resolved within the last hour."""
    from orchestrator.monitor import alertbook

    document = alertbook.read(settings.home)
    behind = _warn_if_behind(settings, document)
    found = [alert for alert in _sorted(document) if alert.firing or not firing]
    if as_json:
        print_json([_json(alert) for alert in found])
    elif found:
        rows = [
            (alert.name, "acknowledged" if alert.acknowledged else alert.state, alert.severity, _short(alert.since),
             _what(alert))
            for alert in found
        ]  # fmt: skip
        table.show(("NAME", "STATE", "SEVERITY", "SINCE (UTC)", "WHAT"), rows, folds=("WHAT",))
    elif not behind:
        click.echo("no alert fires" + ("" if firing else ", and none has in the last hour"))


_SHOW_EPILOG = """\b
Examples:
  truthgpt alerts show TruthGPTRedisAway
  truthgpt alerts show redis_away --json
"""


@alerts.command("show", cls=Command, epilog=_SHOW_EPILOG)
@click.argument("name")
@json_option
@settings_options("home")
def show(settings: Settings, name: str, as_json: bool) -> None:
    """Show all that is known of the alerts of one NAME, and what to do first. 1 when there is none."""
    from orchestrator.monitor import alertbook
    from orchestrator.monitor.rules import RULES

    document = alertbook.read(settings.home)
    name = _name(name, document)
    found = [alert for alert in _sorted(document) if alert.name == name]
    if not found:
        raise _not_there(settings, name, ", and has not in the last hour", "`truthgpt alerts list` has all")
    _warn_if_behind(settings, document)
    if as_json:
        print_json([_json(alert) for alert in found])
        return
    for alert in found:
        rows = {key: value for key, value in _json(alert).items() if key not in ("name", "acknowledged", "labels")}
        rows |= {"acknowledged": _acknowledged(alert), "first": RULES[name].advice if name in RULES else ""}
        click.echo(_titled(alert))
        for key, value in rows.items():
            if value not in (None, ""):
                click.echo(f"  {key:<12} {value}")


_ACK_EPILOG = """\b
Examples:
  truthgpt alerts ack TruthGPTDiskFull
  truthgpt alerts ack disk_full --note "a bigger disk comes on Monday"
"""


@alerts.command("ack", cls=Command, epilog=_ACK_EPILOG)
@click.argument("name")
@click.option("--note", default="", metavar="TEXT", help="For people: what is being done.")
@json_option
@settings_options("home")
def ack(settings: Settings, name: str, note: str, as_json: bool) -> None:
    """Say that you look after the alerts of NAME: they are not told again, but when they are resolved."""
    import getpass

    from orchestrator.monitor import alertbook
    from orchestrator.monitor.alerts import Acknowledged

    if len(note) > 200 or not all(letter.isprintable() for letter in note):
        raise click.BadParameter("a note is one line of at most 200 printable characters", param_hint="--note")
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a user id without a name
        user = "unknown"

    def edit(document: Document) -> tuple[str, list[Alert]]:
        full = _name(name, document)
        found = [alert for alert in _sorted(document) if alert.name == full and alert.firing]
        for alert in found:
            alert.acknowledged = Acknowledged(user, time.time(), note)
        return full, found

    full, changed = alertbook.change(settings.home, edit)
    if not changed:
        raise _not_there(settings, full, "", "`truthgpt alerts list` has what does")
    audited(settings, "alerts ack", detail=f"name={changed[0].name}")
    if as_json:
        print_json([_json(alert) for alert in changed])
    for alert in changed if not as_json else ():
        click.echo(f"acknowledged {_titled(alert)}")


_CLEAR_EPILOG = """\b
Examples:
  truthgpt alerts clear
  truthgpt alerts clear TruthGPTJobFailing
"""


@alerts.command("clear", cls=Command, epilog=_CLEAR_EPILOG)
@click.argument("name", required=False)
@json_option
@settings_options("home")
def clear(settings: Settings, name: str | None, as_json: bool) -> None:
    """Forget the resolved alerts, or all those of NAME. One that still holds fires again, and is told again."""
    from orchestrator.monitor import alertbook

    def edit(document: Document) -> list[Alert]:
        full = None if name is None else _name(name, document)
        found = [alert for alert in _sorted(document) if (not alert.firing if full is None else alert.name == full)]
        for alert in found:
            del document.alerts[alert.id]
        return found

    gone = alertbook.change(settings.home, edit)
    if gone:
        audited(settings, "alerts clear", detail=f"name={gone[0].name}" if name else "resolved ones")
    if as_json:
        print_json([_json(alert) for alert in gone])
    else:
        click.echo(f"cleared {len(gone)} alert{'' if len(gone) == 1 else 's'}")


_TEST_EPILOG = """\b
Examples:
  truthgpt alerts test
  truthgpt alerts test --sender email --json
"""


@alerts.command("test", cls=Command, epilog=_TEST_EPILOG)
@click.option("--sender", type=click.Choice(("webhook", "slack", "email")), help="This one only.")
@json_option
@settings_options("home")
def test(settings: Settings, sender: str | None, as_json: bool) -> None:
    """Send a test message by every sender that is configured, one attempt each. 1 when one fails or there is none."""
    import dataclasses

    from orchestrator.monitor.senders import test_senders

    results = test_senders(settings, sender)
    if not results:
        needed = {
            "webhook": "TRUTHGPT_ALERT_WEBHOOK_URL", "slack": "TRUTHGPT_ALERT_SLACK_URL",
            "email": "TRUTHGPT_ALERT_EMAIL_TO and TRUTHGPT_SMTP_URL",
        }  # fmt: skip
        wanted = "; ".join(needed.values()) if sender is None else needed[sender]
        raise CommandError(f"{sender or 'no sender'} is{' not' if sender else ''} configured", f"set {wanted}")
    if as_json:
        print_json([dataclasses.asdict(result) for result in results])
    for result in results if not as_json else ():
        click.echo(f"{result.sender:<8} {'ok' if result.ok else 'FAILED'}  {result.detail}  ({result.seconds:.1f} s)")
    if not all(result.ok for result in results):
        raise click.exceptions.Exit(1)


def _sorted(document: Document) -> list[Alert]:
    """Firing first, then the critical ones, then the oldest."""
    order = {"critical": 0, "warning": 1}
    key = lambda alert: (not alert.firing, order.get(alert.severity, 2), alert.since, alert.id)  # noqa: E731
    return sorted(document.alerts.values(), key=key)


def _name(text: str, document: Document) -> str:
    """The alert's name, for it or for a short form such as redis_away. Raises CommandError."""
    import difflib

    from orchestrator.monitor.rules import RULES

    known = sorted({*RULES, *(alert.name for alert in document.alerts.values())})
    plain = {"".join(filter(str.isalnum, name.lower())): name for name in known}
    wanted = "".join(filter(str.isalnum, text.lower()))
    for candidate in (wanted, f"truthgpt{wanted}"):
        if candidate in plain:
            return plain[candidate]
    near = difflib.get_close_matches(wanted.removeprefix("truthgpt"), [name.removeprefix("truthgpt") for name in plain])
    hint = f"did you mean {plain.get(f'truthgpt{near[0]}', near[0])}?" if near else "docs/alerts.md lists the alerts"
    raise CommandError(f"there is no alert named {text[:60]!r}", hint)


def _warn_if_behind(settings: Settings, document: Document) -> bool:
    """Old news are said to be old; whether the running stack knows more than the book, and what fires by that."""
    from orchestrator.monitor.alertstate import absent_s

    seen, names, why = document.seen(), *_in_memory(settings)
    if why:
        as_of = "" if seen is None else f", and is as of {_shown(seen)}"
        click.echo(f"warning: the alert book cannot be written ({why}){as_of}", err=True)
        click.echo(f"warning: what fires now: {', '.join(names) or 'nothing'}", err=True)
    elif seen is None:
        click.echo("warning: no running stack has looked at its alerts in this home", err=True)
    elif abs(time.time() - seen) > absent_s(settings.alert_interval_s):
        click.echo(f"warning: nobody looks at the alerts now; this is as of {_shown(seen)}", err=True)
    return bool(why)


def _in_memory(settings: Settings) -> tuple[list[str], str]:
    """What fires by the running stack, and why the book has not got that: empty where it has, or nobody answers."""
    from orchestrator.cli import stack
    from orchestrator.client import GatewayClient, GatewayError

    found = stack.running(settings)
    if found is None:
        return [], ""
    try:
        known = GatewayClient(found.ops, stack.ASK_S).summary().get("alerts")
    except GatewayError:
        return [], ""
    if not isinstance(known, dict) or not known.get("unwritten"):
        return [], ""
    return [str(name) for name in known.get("names") or ()], str(known["unwritten"])


def _not_there(settings: Settings, name: str, since: str, hint: str) -> CommandError:
    """The book has no such alert. One that is in the memory of the running stack alone fires all the same."""
    names, why = _in_memory(settings)
    if name in names:
        what = f"see whose {settings.home} is and whether its disk is full (`truthgpt cleanup plan`)"
        return CommandError(f"{name} fires, but the alert book cannot be written: {why}", what)
    return CommandError(f"{name} does not fire{since}", hint)


def _titled(alert: Alert) -> str:
    labels = ", ".join(f"{key}={value}" for key, value in alert.labels.items())
    return f"{alert.name} {labels}".strip()


def _what(alert: Alert) -> str:
    """For a column. The labels, where its sentence does not have them."""
    missing = [f"{key}={value}" for key, value in alert.labels.items() if value not in alert.summary]
    return f"{alert.summary} ({', '.join(missing)})" if missing else alert.summary


def _acknowledged(alert: Alert) -> str:
    if alert.acknowledged is None:
        return ""
    by, at, note = alert.acknowledged.by, _shown(alert.acknowledged.at), alert.acknowledged.note
    return f"by {by}, {at}{f': {note}' if note else ''}"


def _shown(at: float) -> str:
    from orchestrator.monitor.notice import shown

    return shown(at)


def _short(at: float) -> str:
    """For a column, UTC."""
    return time.strftime("%m-%d %H:%M", time.gmtime(at))


def _json(alert: Alert) -> dict[str, Any]:
    """All that is shown of an alert. Times are RFC 3339, in UTC."""
    from orchestrator.monitor.notice import rfc3339
    from orchestrator.monitor.rules import RULES

    acknowledged = alert.acknowledged
    return {
        "name": alert.name, "state": alert.state, "severity": alert.severity, "since": rfc3339(alert.since),
        "summary": alert.summary, "labels": alert.labels, "value": alert.value, "threshold": alert.threshold,
        "resolved": rfc3339(alert.resolved) if alert.resolved is not None else None, "host": alert.host,
        "acknowledged": None if acknowledged is None
        else {"by": acknowledged.by, "at": rfc3339(acknowledged.at), "note": acknowledged.note},
        "told": {sender: told.outcome for sender, told in alert.told.items()},
        "runbook": RULES[alert.name].runbook if alert.name in RULES else "",
    }  # fmt: skip
