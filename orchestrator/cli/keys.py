"""`truthgpt keys`: API keys, written straight to the stack's Redis, so that the first one needs no other."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli import table
from orchestrator.cli.base import Command, Group, audited, json_option, print_json, settings_options
from orchestrator.cli.keyflags import DURATION, NAME, confirmed, limit_options, when
from orchestrator.keys import OPEN_TENANT
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.keys import Key


@click.group("keys", cls=Group)
def keys() -> None:
    """Create, list, show, revoke and rotate API keys.

    Every worker of the running stack knows a change within a second. Keys are in Redis; the embedded one appends every
    second to a file that survives restarts.
    """


_CREATE_EPILOG = """\b
Examples:
  truthgpt keys create --tenant acme
  truthgpt keys create --tenant acme --per-minute 60 --tokens-per-day 1000000 --expires 30d --note "web shop"
  truthgpt keys create --tenant ops --scope admin --json
"""


@keys.command("create", cls=Command, epilog=_CREATE_EPILOG)
@click.option("--tenant", required=True, type=NAME, metavar="T", help="Whose key: answers are cached per tenant.")
@click.option("--scope", type=click.Choice(("inference", "admin")), default="inference", show_default=True,
              help="admin may also use the admin API.")  # fmt: skip
@limit_options(minimum=1)
@click.option("--expires", "expires_s", type=DURATION, metavar="TIME", help="From now, such as 30d, 12h or 90m.  "
              "[default: never]")  # fmt: skip
@click.option("--note", default="", metavar="TEXT", help="For people: who has the key, what it is for.")
@json_option
@settings_options("home")
def create(
    settings: Settings, tenant: str, scope: str, expires_s: int | None, note: str, as_json: bool,
    **limits: int | None,
) -> None:  # fmt: skip
    """Make a key and show it, this once. Limits that are not given are those of the settings."""
    from orchestrator.ops.keyring import Keyring
    from orchestrator.ops.redis import connect

    if tenant == OPEN_TENANT:
        raise click.UsageError(f"--tenant {tenant}: callers without a key are that tenant, and share its answers")
    given = {name: value for name, value in limits.items() if value is not None}
    with connect(settings) as client:
        key, credential = Keyring(client).create(tenant, scope, given, expires_s, _printable(note))
    shown = "".join(f" {name}={value}" for name, value in given.items())
    audited(settings, "keys create", key.id, f"tenant={tenant} scope={scope}{shown}")
    _hand_over(settings, key, credential, as_json)


_LIST_EPILOG = """\b
Examples:
  truthgpt keys list
  truthgpt keys list --tenant acme --json
"""


@keys.command("list", cls=Command, epilog=_LIST_EPILOG)
@click.option("--tenant", type=NAME, metavar="T", help="This tenant's only.")
@json_option
@settings_options("home")
def list_keys(settings: Settings, tenant: str | None, as_json: bool) -> None:
    """List keys, oldest first, with their state: active, expired or revoked. Secrets are never shown."""
    from orchestrator.ops.keyring import Keyring
    from orchestrator.ops.redis import connect

    with connect(settings) as client:
        found = Keyring(client).all(tenant)
    if as_json:
        print_json([_document(key) for key in found])
    elif not found:
        click.echo("there are no keys; `truthgpt keys create --tenant NAME` makes one", err=True)
    else:
        now = time.time()
        rows = [(key.id, key.tenant, key.scope, key.state(now), when(key.expires) or "never", key.note)
                for key in found]  # fmt: skip
        table.show(("ID", "TENANT", "SCOPE", "STATE", "EXPIRES", "NOTE"), rows, folds=("NOTE",))


_SHOW_EPILOG = """\b
Examples:
  truthgpt keys show k2s7dhq3mzpa
  truthgpt keys show k2s7dhq3mzpa --json
"""


@keys.command("show", cls=Command, epilog=_SHOW_EPILOG)
@click.argument("id", type=NAME)
@json_option
@settings_options("home")
def show(settings: Settings, id: str, as_json: bool) -> None:
    """Show one key: tenant, scope, limits and times. Its secret is not known to anybody but its owner."""
    from orchestrator.ops.keyring import Keyring
    from orchestrator.ops.redis import connect

    with connect(settings) as client:
        key = Keyring(client).get(id)
    if as_json:
        print_json(_document(key))
        return
    limits = ", ".join(f"{name} {value}" for name, value in key.limits.items())
    rows = {
        "tenant": key.tenant, "scope": key.scope, "state": key.state(time.time()), "created": when(key.created),
        "expires": when(key.expires) or "never", "revoked": when(key.revoked), "note": key.note,
        "limits": limits or "those of the settings",
    }  # fmt: skip
    click.echo(key.id)
    for name, value in rows.items():
        if value:
            click.echo(f"  {name:<8} {value}")


_REVOKE_EPILOG = """\b
Examples:
  truthgpt keys revoke k2s7dhq3mzpa
  truthgpt keys revoke k2s7dhq3mzpa --yes
"""


@keys.command("revoke", cls=Command, epilog=_REVOKE_EPILOG)
@click.argument("id", type=NAME)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.  [default: ask only where somebody types]")
@json_option
@settings_options("home")
def revoke(settings: Settings, id: str, yes: bool, as_json: bool) -> None:
    """Refuse a key from now on, everywhere within a second. There is no way back."""
    from orchestrator.ops.keyring import Keyring
    from orchestrator.ops.redis import connect

    with connect(settings) as client:
        keyring = Keyring(client)
        key = keyring.get(id)
        confirmed(yes, f"Revoke the key {id} of {key.tenant}{f' ({key.note})' if key.note else ''}?")
        key = keyring.revoke(id)
    audited(settings, "keys revoke", id, f"tenant={key.tenant}")
    if as_json:
        print_json(_document(key))
    else:
        click.echo(f"revoked {id} of {key.tenant}")


_ROTATE_EPILOG = """\b
Examples:
  truthgpt keys rotate k2s7dhq3mzpa
  truthgpt keys rotate k2s7dhq3mzpa --grace 1h --json
"""


@keys.command("rotate", cls=Command, epilog=_ROTATE_EPILOG)
@click.argument("id", type=NAME)
@click.option("--grace", "grace_s", type=DURATION, metavar="TIME", help="How long the key before still works, such as "
              "1h.  [default: not at all]")  # fmt: skip
@json_option
@settings_options("home")
def rotate(settings: Settings, id: str, grace_s: int | None, as_json: bool) -> None:
    """Give a key a new secret and show it, this once. Id, tenant, limits and what was used stay."""
    from orchestrator.ops.keyring import Keyring
    from orchestrator.ops.redis import connect

    with connect(settings) as client:
        key, credential = Keyring(client).rotate(id, float(grace_s or 0))
    audited(settings, "keys rotate", id, f"tenant={key.tenant} grace_s={grace_s or 0}")
    _hand_over(settings, key, credential, as_json)


def _hand_over(settings: Settings, key: Key, credential: str, as_json: bool) -> None:
    """The only place where a secret is printed."""
    from orchestrator.cli import stack

    if as_json:
        print_json({"id": key.id, "key": credential, "tenant": key.tenant, "scope": key.scope})
        return
    until = f", for good until {when(key.expires)}" if key.expires is not None else ""
    click.echo(f"{key.scope} key {key.id} of {key.tenant}{until}:\n\n  {credential}\n")
    if key.old_hash is not None:
        click.echo(f"The key before it works until {when(key.old_until)}.")
    click.echo("It is not shown again. To use it:\n")
    click.echo(f"  export TRUTHGPT_API_KEY={credential}")
    click.echo(f'  truthgpt generate "Hola"{stack.flags(settings)}')
    found = stack.running(settings)
    url = found.http if found is not None else f"http://{settings.host}:{settings.http_port}"
    click.echo(f'  curl {url}/v1/models -H "Authorization: Bearer $TRUTHGPT_API_KEY"')


def _document(key: Key) -> dict[str, Any]:
    """All that may be shown of a key. Times are Unix seconds or null."""
    return {
        "id": key.id, "tenant": key.tenant, "scope": key.scope, "state": key.state(time.time()),
        "limits": dict(key.limits), "created": key.created, "expires": key.expires, "revoked": key.revoked,
        "note": key.note,
    }  # fmt: skip


def _printable(note: str) -> str:
    """The note, which others will read on their terminals."""
    if len(note) > 200 or not all(letter.isprintable() for letter in note):
        raise click.BadParameter("a note is one line of at most 200 printable characters", param_hint="--note")
    return note
