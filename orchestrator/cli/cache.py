"""`truthgpt cache`: what the answer cache does, what is in it, and how long it is kept."""

from __future__ import annotations

import re
from typing import Any

import click

from orchestrator.cli import table
from orchestrator.cli.base import Command, CommandError, Group, audited, json_option, print_json, settings_options
from orchestrator.cli.keyflags import NAME, confirmed
from orchestrator.domain import TASKS
from orchestrator.settings import Settings

_MAX_TTL_S = 30 * 86_400


@click.group("cache", cls=Group)
def cache() -> None:
    """Statistics of the answer cache, its entries, and how long answers are kept."""


_STATS_EPILOG = """\b
Examples:
  truthgpt cache stats
  truthgpt cache stats --json
"""


@cache.command("stats", cls=Command, epilog=_STATS_EPILOG)
@json_option
@settings_options("home")
def stats(settings: Settings, as_json: bool) -> None:
    """Show how often answers came from the cache, over all workers, and what it holds.

    \b
    HITS    answered from the cache or by an answer that was being made
    MISSES  answered by the model
    BYPASS  asked not to be cached (Cache-Control: no-store)
    LARGE   answers over cache_entry_bytes, not stored
    """
    from orchestrator.ops import cachetools
    from orchestrator.ops.redis import connect

    with connect(settings) as client:
        found = cachetools.stats(client)
    tasks = found.pop("tasks")
    if as_json:
        print_json(found)
        return
    rows = [(task, *(str(row[what]) for what in ("hits", "misses", "bypass", "large"))) for task, row in tasks.items()]
    table.show(("TASK", "HITS", "MISSES", "BYPASS", "LARGE"), rows)
    click.echo(f"hit rate {found['hit_rate']:.1%}, {found['entries']} entries, {_bytes(found['bytes'])}, "
               f"{found['evictions']} evictions")  # fmt: skip


_CLEAR_EPILOG = """\b
Examples:
  truthgpt cache clear
  truthgpt cache clear --tenant acme --model demo --yes
"""


@cache.command("clear", cls=Command, epilog=_CLEAR_EPILOG)
@click.option("--tenant", type=NAME, metavar="T", help="This tenant's answers only.")
@click.option("--model", metavar="M", help="This model's answers only.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.  [default: ask only where somebody types]")
@json_option
@settings_options("home")
def clear(settings: Settings, tenant: str | None, model: str | None, yes: bool, as_json: bool) -> None:
    """Forget answers. Statistics, keys and limits stay; a model that is exported again needs no clearing."""
    from orchestrator.ops import cachetools
    from orchestrator.ops.redis import connect

    of = " ".join(f"of {what} {name}" for what, name in (("tenant", tenant), ("model", model)) if name is not None)
    with connect(settings) as client:
        confirmed(yes, f"Forget the answers {of}?" if of else "Forget every cached answer?")
        removed = cachetools.clear(client, tenant, model)
    audited(settings, "cache clear", detail=f"{of or 'everything'}: {removed} entries")
    if as_json:
        print_json({"removed": removed})
    else:
        click.echo(f"removed {removed} {'entry' if removed == 1 else 'entries'}")


_INSPECT_EPILOG = """\b
Examples:
  truthgpt cache inspect
  truthgpt cache inspect 3fa9 --json
  truthgpt cache inspect 3fa9 --show-text
"""


@cache.command("inspect", cls=Command, epilog=_INSPECT_EPILOG)
@click.argument("key", default="", metavar="[KEY_OR_PREFIX]")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, metavar="N", help="At most.")
@click.option("--show-text", is_flag=True, help="Show what the model said, too.")
@json_option
@settings_options("home")
def inspect(settings: Settings, key: str, limit: int, show_text: bool, as_json: bool) -> None:
    """Show entries whose key begins so: task, model, age, remaining life and size. Prompts are not in the cache."""
    from orchestrator.ops import cachetools
    from orchestrator.ops.redis import connect

    if re.fullmatch(r"[0-9a-f]{0,64}", key) is None:
        raise click.BadParameter("a key is up to 64 of the characters 0-9 a-f", param_hint="KEY_OR_PREFIX")
    with connect(settings) as client:
        found = cachetools.inspect(client, key, limit, show_text)
    if key and not found:
        raise CommandError(f"no entry's key begins with {key}", "`truthgpt cache inspect` lists entries")
    if as_json:
        print_json(found)
        return
    if not found:
        click.echo("the cache is empty", err=True)
        return
    table.show(("KEY", "TENANT", "TASK", "MODEL", "AGE", "TTL", "SIZE"), [_shown(row, len(key)) for row in found])
    for row in found if show_text else ():
        click.echo(f"\n{row['key']}\n{_printable(row['text'])}")


_TTL_EPILOG = """\b
Examples:
  truthgpt cache ttl
  truthgpt cache ttl translation 86400
  truthgpt cache ttl --adapt
"""


@cache.command("ttl", cls=Command, epilog=_TTL_EPILOG)
@click.argument("task", required=False, type=click.Choice(TASKS), metavar="[TASK]")
@click.argument("seconds", required=False, type=click.IntRange(1, _MAX_TTL_S), metavar="[SECONDS]")
@click.option("--adapt", is_flag=True, help="Fit every task's to its use since the last time: over 100 requests double "
              "it, up to 7200 s; under 10 halve it, down to 300 s.")  # fmt: skip
@json_option
@settings_options("home")
def ttl(settings: Settings, task: str | None, seconds: int | None, adapt: bool, as_json: bool) -> None:
    """Show or set for how many seconds a task's answers are kept. Every worker knows within a second."""
    from orchestrator.ops import cachetools
    from orchestrator.ops.redis import connect

    if adapt and task is not None:
        raise click.UsageError("--adapt is for all tasks; give no TASK")
    with connect(settings) as client:
        if adapt:
            adapted = cachetools.adapt_ttls(client)
            audited(settings, "cache ttl", detail="adapt")
            if as_json:
                print_json(adapted)
            else:
                rows = [(row["task"], *map(str, (row["requests"], row["before_s"], row["ttl_s"]))) for row in adapted]
                table.show(("TASK", "REQUESTS", "BEFORE", "SECONDS"), rows)
            return
        if task is not None and seconds is not None:
            cachetools.set_ttl(client, task, seconds)
            audited(settings, "cache ttl", detail=f"{task}={seconds}")
        found = cachetools.ttls(client)
    if task is not None:
        found = {task: found[task]}
    if as_json:
        print_json(found)
    else:
        table.show(("TASK", "SECONDS"), [(name, str(value)) for name, value in found.items()])


def _shown(row: dict[str, Any], given: int) -> tuple[str, ...]:
    age = "?" if row["age_s"] is None else f"{row['age_s']:.0f} s"
    key = row["key"][: max(12, given)]  # enough to name it again
    return (
        key, row["tenant"], row["task"] or "?", _printable(row["model"] or "?"), age, f"{row['ttl_s']:.0f} s",
        _bytes(row["bytes"]),
    )  # fmt: skip


def _printable(text: str | None) -> str:
    """What a terminal may be given: no control characters but line ends."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text or "")


def _bytes(count: int) -> str:
    return (
        f"{count} B" if count < 1024 else f"{count / 1024:.1f} KiB" if count < 1 << 20 else f"{count / 2**20:.1f} MiB"
    )
