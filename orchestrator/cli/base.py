"""What every command shares: how it is found, how it fails, how it prints JSON, and its flags for settings.

A failure is one exception with a sentence and, in its `hint`, what to do about it; it becomes `error:` and `hint:` on
standard error here and nowhere else. Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted, 141 broken pipe.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module, metadata
from typing import Any, NoReturn, TypeVar

import click

from orchestrator.settings import Settings, SettingsError
from orchestrator.spec import Spec

ENTRY_POINTS = "truthgpt.commands"
INTERRUPTED, BROKEN_PIPE = 130, 141
_CONTEXT = {"help_option_names": ["-h", "--help"]}
_F = TypeVar("_F", bound=Callable[..., Any])


class CommandError(Exception):
    """A command cannot do what was asked; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class Command(click.Command):
    """A command that takes `--debug` and `-h` as all do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["context_settings"] = {**_CONTEXT, **(kwargs.get("context_settings") or {})}
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())


class Group(click.Group):
    """A noun with its verbs, listed in the order of their definition."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["context_settings"] = {**_CONTEXT, **(kwargs.get("context_settings") or {})}
        super().__init__(*args, **kwargs)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(2)
        return super().parse_args(ctx, args)


class Root(Group):
    """`truthgpt`: imports a command when it is asked for, and finds those that other packages bring by entry point."""

    def __init__(self, *args: Any, commands_at: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._at = dict(commands_at)
        self.params += [_version_option(), _debug_option()]

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self._at, *(point.name for point in _entry_points())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self._at:
            module, _, attribute = self._at[cmd_name].partition(":")
            command = getattr(import_module(module), attribute)
            return command if isinstance(command, click.Command) else None
        for point in _entry_points():
            if point.name == cmd_name:
                return _plugin(point)
        return None

    def invoke(self, ctx: click.Context) -> None:
        try:
            super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # Who reads is gone (`truthgpt … | head`): what Python still holds goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(BROKEN_PIPE) from None

    # Whoever asks for another mode gets the same: this one is for people.
    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run and exit; the only place where an error becomes text and an exit code."""
        extra["standalone_mode"] = False
        debug = "--debug" in (sys.argv[1:] if args is None else args)
        try:
            sys.exit(super().main(args, prog_name, **extra) or 0)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else prog_name or self.name
            _fail([error.format_message()], f"see `{path} --help`", error.exit_code)
        except click.ClickException as error:
            _fail([error.format_message()], "", error.exit_code)
        except click.Abort:
            _fail(["interrupted"], "", INTERRUPTED)
        except SettingsError as error:
            where = "flag, environment or file"
            _fail(list(error.problems), f"correct the {where} named above; docs/settings.md describes every setting", 1)
        except Exception as error:
            if debug:
                traceback.print_exc()
            message, hint = _explain(error)
            _fail([message], hint, 1)


def _explain(error: Exception) -> tuple[str, str]:
    """Sentence and hint of an exception. One with a `hint` was made for people, whichever package it comes from."""
    if hasattr(error, "hint"):
        return str(error), str(error.hint or "")
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name} is not installed", f"pip install 'truthgpt[{_extra_of(error.name)}]'"
    if isinstance(error, OSError) and error.strerror:
        where = error.filename or "the operating system"
        return f"{where}: {error.strerror}", "check that the path exists and is yours"
    return (
        f"unexpected {type(error).__name__}: {error}",
        "this is a fault of truthgpt; run it again with --debug and report what it prints",
    )


def _extra_of(module: str) -> str:
    if module.split(".")[0] in ("matplotlib", "optuna"):
        return "measure"
    return "export" if module.split(".")[0] in ("torch", "transformers", "onnx", "onnxscript", "export") else "serve"


def _fail(messages: Sequence[str], hint: str, code: int) -> NoReturn:
    for message in messages:
        click.echo(f"error: {message.strip()}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
    sys.exit(code)


def _entry_points() -> list[metadata.EntryPoint]:
    return sorted(metadata.entry_points(group=ENTRY_POINTS), key=lambda point: point.name)


def _plugin(point: metadata.EntryPoint) -> click.Command:
    try:
        command = point.load()
    except ModuleNotFoundError as error:
        missing = error.name or "a package"
        return _unavailable(point.name, missing)
    if not isinstance(command, click.Command):
        raise CommandError(f"{point.value} is not a command", "reinstall truthgpt")
    return command


def _unavailable(name: str, missing: str) -> click.Command:
    """Stands for a command whose package is not installed, so that asking for it says what to install."""

    def refuse() -> NoReturn:
        raise CommandError(f"`truthgpt {name}` needs {missing}, which is not installed", install)

    install = f"pip install 'truthgpt[{_extra_of(missing)}]'"
    settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    help = f"Not installed: {install}."
    return Command(name, callback=refuse, help=help, context_settings=settings, add_help_option=False)


def _debug_option() -> click.Option:
    return click.Option(["--debug"], is_flag=True, expose_value=False, help="Show the traceback of an error.")


def _version_option() -> click.Option:
    def show(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            click.echo(f"truthgpt {metadata.version('truthgpt')}")
            ctx.exit()

    return click.Option(
        ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=show, help="Show the version and exit."
    )


class _SettingType(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic in newer versions of click
    """A value that the settings table checks, so that a wrong flag is wrong usage."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self.name = "|".join(spec.choices) or {bool: "true|false", int: "integer", float: "number"}.get(
            spec.kind, spec.kind.__name__.lower()
        )

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._spec.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{self.describe()}]" if self._spec.choices else self.describe()

    def describe(self) -> str:
        """What stands for a value in help: PATH, TEXT, N, X or the choices."""
        kinds = {"path": "PATH", "str": "TEXT", "integer": "N", "number": "X"}
        return kinds.get(self.name, self.name)


def settings_options(*names: str, load: bool = True) -> Callable[[_F], _F]:
    """Flags for these settings. The command gets the loaded Settings as its first argument.

    What `Settings.load` warns about goes to standard error. With `load` false the command gets the flags as they are, a
    mapping for `Settings.load`, because wrong settings are what it looks for.
    """
    table = Settings.table()

    def decorate(function: _F) -> _F:
        def command(**values: Any) -> Any:
            overrides = {name: values.pop(name) for name in names}
            if not load:
                return function(overrides, **values)
            settings = Settings.load(overrides)
            for warning in settings.warnings:
                click.echo(f"warning: {warning}", err=True)
            return function(settings, **values)

        command.__doc__ = function.__doc__
        command.__name__ = function.__name__
        command.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
        for name in reversed(names):
            spec = table[name]
            option = click.option(spec.flag, name, type=_SettingType(spec), help=f"{spec.help}  [{spec.env}]")
            command = option(command)
        return command  # type: ignore[return-value]

    return decorate


def audited(settings: Settings, operation: str, subject: str = "", detail: str = "") -> None:
    """Write what a command has changed into the audit log. It is done: that nobody can write it down is a warning."""
    from orchestrator.ops.auditing import note

    problem = note(settings, operation, subject, detail)
    if problem:
        click.echo(f"warning: this is not in the audit log: {problem}", err=True)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def print_json(document: object) -> None:
    """The one JSON document of a command, on standard output."""
    click.echo(json.dumps(document, ensure_ascii=False, indent=2))
