"""What the commands about keys and limits share: their kinds of values, flags and questions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import click

from orchestrator import keys
from orchestrator.cli.base import CommandError

_F = TypeVar("_F", bound=Callable[..., Any])

# domain.Limits' field -> what it bounds
_LIMITS = {
    "per_minute": "Requests in any 60 s, at each endpoint",
    "per_hour": "Requests in any hour, at each endpoint",
    "per_day": "Requests in any 24 hours, at each endpoint",
    "tokens_per_minute": "Tokens, prompt and answer, in any 60 s",
    "tokens_per_day": "Tokens, prompt and answer, in any 24 hours",
    "concurrency": "Requests at the same time",
}


class _Name(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic in newer versions of click
    """A tenant or a key's id."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not isinstance(value, str) or keys.NAME.fullmatch(value) is None:
            self.fail("must be 1 to 64 of the characters A-Z a-z 0-9 . _ -", param, ctx)
        return value


class _Duration(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # as above
    """Seconds of a duration such as 30d."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return keys.parse_duration(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Limit(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # as above
    """A whole number of at least `minimum`; where 0 may be given, `default` is -1 and gives the limit back."""

    name = "number"

    def __init__(self, minimum: int) -> None:
        self._minimum = minimum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if self._minimum == 0 and value == "default":
            return UNSET
        text = str(value)
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 16 else -1
        if not self._minimum <= number <= keys.LIMIT_MAX:
            what = "a whole number, 0 for no limit, or `default`" if self._minimum == 0 else "a whole number from 1 on"
            self.fail(f"must be {what}; got {text[:40]!r}", param, ctx)
        return number


UNSET = -1
NAME, DURATION = _Name(), _Duration()


def limit_options(minimum: int) -> Callable[[_F], _F]:
    """A flag for each limit, by the names of domain.Limits; None where it is not given."""

    def decorate(function: _F) -> _F:
        for name, what in reversed(_LIMITS.items()):
            flag = "--" + name.replace("_", "-")
            function = click.option(flag, name, type=_Limit(minimum), metavar="N", help=f"{what}.")(function)
        return function

    return decorate


def asks(yes: bool) -> bool:
    """Whether `confirmed` asks: where somebody sits at a terminal and has not said yes."""
    return not yes and sys.stdin.isatty()


def confirmed(yes: bool, question: str) -> None:
    """Ask where somebody sits at a terminal; a script has said what it wants. Raises CommandError after a no."""
    if asks(yes) and not click.confirm(question, err=True):
        raise CommandError("nothing was changed", "--yes does not ask")


def when(time: float | None) -> str:
    """A Unix time for people, in UTC; empty for None."""
    if time is None:
        return ""
    try:
        return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return str(time)
