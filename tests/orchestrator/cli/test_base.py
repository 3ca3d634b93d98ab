"""What all commands share: help, exit codes, errors, JSON, how commands are found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import click
import pytest

from orchestrator.cli import base, cli
from tests.orchestrator.gateway import eventually

PROCESS = [sys.executable, "-m", "orchestrator.cli"]


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


LEAVES = [(path, command) for path, command in commands() if not isinstance(command, click.Group)]


def test_every_promised_command_is_there() -> None:
    """The commands of the interface, no more and no less."""
    assert {" ".join(path) for path, _ in LEAVES} == {
        "up", "down", "status", "generate", "chat", "export", "models list", "models show", "models remove",
        "models verify", "models load", "models reload", "models unload", "config show",
        "tritons list", "tritons drain", "tritons resume", "config check", "doctor", "bench", "batch run",
        "keys create", "keys list", "keys show", "keys revoke", "keys rotate",
        "limits show", "limits set", "limits reset", "cache stats", "cache clear", "cache inspect", "cache ttl",
        "breaker show", "breaker reset", "audit tail", "audit verify", "audit stats", "audit export", "audit hash",
        "metrics history",
        "alerts list", "alerts show", "alerts ack", "alerts clear", "alerts test",
        "jobs list", "jobs run", "jobs pause", "jobs resume", "jobs history", "cleanup plan", "cleanup run", "top",
        "backup create", "backup list", "backup verify", "backup restore", "backup prune", "backup keygen",
        "tune",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "command"), LEAVES, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_every_command_explains_itself(place: Any, path: tuple[str, ...], command: click.Command) -> None:
    """`--help` and `-h` of every command show a sentence, examples that begin with the command, and --debug."""
    result = place.run(*path, "--help")
    assert result.exit_code == 0 and result.output == place.run(*path, "-h").output
    examples = result.output.split("Examples:\n")[1].strip().splitlines()
    assert len(examples) >= 2 and all(f"truthgpt {' '.join(path)}" in line for line in examples)
    assert "--debug" in result.output
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert parameter.help and parameter.help.strip().endswith((".", "]")), parameter.name


def test_help_loads_hardly_anything() -> None:
    """`truthgpt --help` loads click and no other library, and few modules at all: so it takes 0.2 s, not two."""
    code = (
        "import sys; from orchestrator.cli import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Commands:" in done.stdout
    loaded = set(done.stderr.split())
    ours = {"click", "orchestrator", "export"}
    others = {name.split(".")[0] for name in loaded} - ours - set(sys.stdlib_module_names)
    assert {name for name in others if not name.startswith("_")} == set()  # these are of the installation
    assert len(loaded) < 320


def test_version() -> None:
    """`--version` is the distribution's."""
    done = subprocess.run([*PROCESS, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"truthgpt {metadata.version('truthgpt')}\n"


@pytest.mark.parametrize("arguments", [(), ("models",), ("config",)])
def test_a_group_alone_shows_its_help_as_wrong_usage(place: Any, arguments: tuple[str, ...]) -> None:
    """Without a command there is help on standard error and exit code 2."""
    result = place.run(*arguments)
    assert result.exit_code == 2 and result.stdout == "" and "Commands:" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [("bogus",), ("up", "--bogus"), ("generate",), ("models", "show"), ("up", "--http-port", "many"),
     ("up", "--precision", "fp8"), ("up", "--http-port", "0"), ("generate", "x", "--max-tokens", "0"),
     ("generate", "x", "--raw", "--system", "y")],
)  # fmt: skip
def test_wrong_usage_is_code_2(place: Any, arguments: tuple[str, ...]) -> None:
    """Unknown commands and options, missing arguments and values that the settings table refuses are wrong usage."""
    assert "--help`" in place.refused(*arguments, code=2)


def test_wrong_settings_are_all_told(place: Any) -> None:
    """Every problem of the settings is an error line of its own, with one hint at the end."""
    place.set(HTTP_PORT="many", MODEL="!", STALL_S="0")
    lines = place.refused("status").strip().splitlines()
    assert [line.split()[0] for line in lines] == ["error:", "error:", "error:", "hint:"]
    assert all(
        any(name in line for line in lines) for name in ("TRUTHGPT_HTTP_PORT", "TRUTHGPT_MODEL", "TRUTHGPT_STALL_S")
    )


def test_an_unknown_variable_is_a_warning(place: Any) -> None:
    """A TRUTHGPT_ variable that nobody knows is told on standard error and stops nothing."""
    place.set(HTTP_PROT="1")
    result = place.run("models", "list", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout) == []
    assert "warning: unknown environment variable TRUTHGPT_HTTP_PROT" in result.stderr


@pytest.mark.parametrize("arguments", [("--debug", "models", "show", "x"), ("models", "show", "x", "--debug")])
def test_a_traceback_needs_debug(place: Any, arguments: tuple[str, ...]) -> None:
    """--debug shows where an error came from, before or after the command, and changes neither error nor code."""
    done = subprocess.run([*PROCESS, *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert "error: there is no model x" in done.stderr and "hint: " in done.stderr


def test_an_unexpected_error_is_told_as_our_fault(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the program is one sentence that asks for a report, not a traceback."""
    monkeypatch.setattr("orchestrator.models.read", lambda repository: 1 / 0)
    stderr = place.refused("models", "list")
    assert "ZeroDivisionError" in stderr and "--debug" in stderr


@pytest.mark.parametrize(("module", "extra"), [("torch", "export"), ("onnxscript.ir", "export"), ("uvicorn", "serve")])
def test_a_missing_package_names_its_extra(
    place: Any, monkeypatch: pytest.MonkeyPatch, module: str, extra: str
) -> None:
    """Whatever is not installed, the hint is the pip command with the right extra."""

    def fail(repository: object) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr("orchestrator.models.read", fail)
    assert f"hint: pip install 'truthgpt[{extra}]'" in place.refused("models", "list")


def test_a_command_whose_package_is_missing_is_listed_and_says_what_to_install(
    place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the export package `truthgpt --help` still works, and `truthgpt export` names the extra."""
    missing = metadata.EntryPoint("export", "export_that_is_not_there.cli:command", base.ENTRY_POINTS)
    monkeypatch.setattr(base, "_entry_points", lambda: [missing])
    assert "pip install" in place.run("--help").output
    stderr = place.refused("export", "gpt2", "--name", "x")
    assert "error: `truthgpt export` needs export_that_is_not_there, which is not installed" in stderr


def test_export_is_mounted_by_its_entry_point(place: Any) -> None:
    """`truthgpt export` is the export package's own command, and its errors are told the same way."""
    place.set(MODEL_REPOSITORY=place.repository)
    result = place.run("export", "--help")
    assert result.exit_code == 0 and "Export MODEL" in result.output
    assert "error: " in place.refused("export", code=2)


def test_ctrl_c_is_code_130(place: Any, gateway: Any) -> None:
    """An interrupt ends a command with 130 and one line."""
    gateway.stall_s = 5
    process = place.process("generate", "Hola")
    eventually(lambda: gateway.asked)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=10)
    assert (process.returncode, stdout) == (130, "")
    assert stderr.strip() == "error: interrupted"


def test_a_broken_pipe_is_quiet(place: Any, gateway: Any) -> None:
    """Who stops reading ends the command with 141 and without a word."""
    gateway.events = [gateway.events[1]] * 20_000 + gateway.events[-3:]
    process = place.process("generate", "Hola", text=False)
    assert process.stdout.read(5)
    process.stdout.close()
    assert process.wait(10) == 141
    with process.stderr as stderr:
        assert stderr.read() == b""


def test_output_that_nobody_can_take_is_an_error(place: Any) -> None:
    """A full disk behind standard output is exit code 1, not a success."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*PROCESS, "config", "show", "--json"], stdout=full, stderr=subprocess.PIPE, text=True, env=os.environ
        )
    assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr
