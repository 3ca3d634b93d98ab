"""`truthgpt tritons`: the Triton servers behind the gateway, and taking one out of use for a while."""

from __future__ import annotations

from typing import Any

import click

from orchestrator.cli import table
from orchestrator.cli.base import Command, CommandError, Group, audited, json_option, print_json, settings_options
from orchestrator.settings import Settings

_url_option = click.option("--url", "gateway", metavar="URL", help="Gateway to ask.  [default: the running stack's]")


@click.group("tritons", cls=Group)
def tritons() -> None:
    """List the Triton servers that the gateway drives; drain one, and let it take requests again."""


_LIST_EPILOG = """\b
Examples:
  truthgpt tritons list
  truthgpt tritons list --url http://127.0.0.1:8080 --json
"""


@tritons.command("list", cls=Command, epilog=_LIST_EPILOG)
@_url_option
@json_option
@settings_options("home")
def list_servers(settings: Settings, gateway: str | None, as_json: bool) -> None:
    """List the servers as one worker of the gateway sees them, with the requests that it has there.

    \b
    STATE  ready     takes requests
           ejected   failed; rests, and comes back by itself
           draining  takes no new requests: drained, or its name has other addresses now
           down      does not answer, or has no model that does
    """
    rows = _servers(settings, gateway)
    if as_json:
        print_json({"tritons": rows})
    elif not rows:
        click.echo("no Triton server is known; TRUTHGPT_TRITON_URLS says where they are looked for")
    else:
        shown = [(str(row["url"]), str(row["state"]), str(row["outstanding"]), _ago(row["answered_s"])) for row in rows]
        table.show(("URL", "STATE", "REQUESTS", "ANSWERED"), shown, right=("REQUESTS", "ANSWERED"))


_DRAIN_EPILOG = """\b
Examples:
  truthgpt tritons drain http://10.0.0.5:8000
  truthgpt tritons drain http://127.0.0.1:8000 --force
"""


@tritons.command("drain", cls=Command, epilog=_DRAIN_EPILOG)
@click.argument("url")
@click.option("--force", is_flag=True, help="Also the last server that takes requests: then all are refused.")
@_url_option
@json_option
@settings_options("home")
def drain(settings: Settings, url: str, force: bool, gateway: str | None, as_json: bool) -> None:
    """Send no new request to the server at URL; what runs there ends by itself. Holds within a second, everywhere.

    It stays drained, whatever is restarted, until `truthgpt tritons resume`.
    """
    from orchestrator.ops import servers
    from orchestrator.ops.redis import connect

    url, rows = _spelling(url), _servers(settings, gateway)
    row = next((row for row in rows if row["url"] == url), None)
    if row is None:
        known = ", ".join(str(row["url"]) for row in rows) or "none is known"
        raise CommandError(f"{url} is no server of this gateway", f"its servers: {known}")
    last = row["state"] in ("ready", "ejected") and not any(r["state"] == "ready" for r in rows if r is not row)
    if last and not force:
        hint = "resume or mend another one first; --force drains it all the same, and every request is refused then"
        raise CommandError(f"{url} is the last server that takes requests", hint)
    with connect(settings) as client:
        changed = servers.drain(client, url)
    if changed:
        audited(settings, "tritons drain", detail=f"url={url}{' the last one' if last else ''}")
    if as_json:
        print_json({"url": url, "drained": True, "changed": changed, "last": last})
        return
    click.echo(f"{url} {'is drained' if changed else 'was drained already'}")
    if last:
        click.echo("warning: no server takes requests now: they are refused with 503", err=True)


_RESUME_EPILOG = """\b
Examples:
  truthgpt tritons resume http://10.0.0.5:8000
  truthgpt tritons resume http://10.0.0.5:8000 --json
"""


@tritons.command("resume", cls=Command, epilog=_RESUME_EPILOG)
@click.argument("url")
@json_option
@settings_options("home")
def resume(settings: Settings, url: str, as_json: bool) -> None:
    """Send requests to the drained server at URL again; to one that has left, as soon as it is back."""
    from orchestrator.ops import servers
    from orchestrator.ops.redis import connect

    url = _spelling(url)
    with connect(settings) as client:
        changed = servers.resume(client, url)
        drained = servers.drained(client)
    if not changed:
        raise CommandError(f"{url} is not drained", f"drained: {', '.join(sorted(drained)) or 'none'}")
    audited(settings, "tritons resume", detail=f"url={url}")
    if as_json:
        print_json({"url": url, "drained": False})
    else:
        click.echo(f"{url} takes requests again")


def _servers(settings: Settings, gateway: str | None) -> list[dict[str, Any]]:
    """What a gateway says of its servers. Raises CommandError and GatewayError."""
    from orchestrator.cli import stack
    from orchestrator.client import GatewayClient

    client = GatewayClient(gateway or stack.require(settings).http, stack.ASK_S)
    rows = client.health().get("tritons")
    names = {"url", "state", "outstanding", "answered_s"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and names <= row.keys() for row in rows):
        raise CommandError(f"{client.url} does not say which servers it has", "it may be of an older version")
    return rows


def _spelling(url: str) -> str:
    """A server's URL as the gateway spells it. Raises BadParameter."""
    from orchestrator.resolving import ServersError, entries

    try:
        (server,) = entries(url if "://" in url else f"http://{url}")
    except (ServersError, ValueError) as error:
        raise click.BadParameter(f"{url!r} is not the URL of one server, such as http://10.0.0.5:8000") from error
    return (server.literal or server).url


def _ago(seconds: object) -> str:
    return f"{seconds:.1f} s ago" if isinstance(seconds, (int, float)) else "never"
