"""`truthgpt chat`: a conversation at the terminal, or one line a turn from standard input."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.base import Command, CommandError, settings_options
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.cli.conversation import Conversation
    from orchestrator.client import Answer, GatewayClient, GatewayError

HISTORY = "chat_history"  # in the home
_LINE_BYTES = 1 << 20
_COMMANDS = """\
/reset           begin anew; the system message stays
/system [TEXT]   show the system message, or set another one from here on
/save FILE       write the conversation as JSON
/exit            end, as Ctrl-D does
//TEXT           say something that begins with /
Ctrl-C stops an answer and keeps what has come of it."""
_EPILOG = """\b
Examples:
  truthgpt chat
  truthgpt chat --system "Answer in one sentence." --max-tokens 60
  printf 'Hola\\n¿Qué es TruthGPT?\\n' | truthgpt chat --json
"""


@click.command("chat", cls=Command, epilog=_EPILOG, short_help="Talk with a model.")
@click.option("--model", metavar="NAME", help="Model to talk with.  [default: the one that the stack serves]")
@click.option("--system", metavar="TEXT", help="System message of the chat.")
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="New tokens of an answer at most.")
@click.option("--temperature", type=click.FloatRange(0, 2), metavar="X", help="0 is greedy.")
@click.option("--url", metavar="URL", help="Gateway to ask.  [default: the running stack's]")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
              help="Give an answer up after this long.  [default: request_timeout_s]")  # fmt: skip
@click.option("--history/--no-history", default=True, help=f"Remember lines in the home's {HISTORY} (the default).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document a turn, on one line.")
@settings_options("home", "api_key")
def chat(
    settings: Settings, model: str | None, system: str | None, url: str | None, timeout_s: float | None,
    history: bool, as_json: bool, **sampling: Any,
) -> None:  # fmt: skip
    """Talk with a model of the running stack; every turn knows those before it.

    At a terminal lines are edited and remembered, and /help lists what else can be typed. From a pipe each line is a
    turn, its answer follows on standard output, and the first failure ends it. What no longer fits the model's context
    is left out from the beginning, which is told.
    """
    from orchestrator.cli import ask
    from orchestrator.cli.conversation import Conversation
    from orchestrator.cli.generate import require_generation, target

    client, model = target(settings, url, model, timeout_s)
    kind = ask.kind_of(client, model)
    require_generation(client, model, kind)
    if not kind.chat:
        hint = "continue a text with `truthgpt generate`, or export the model again with --chat-template FILE"
        raise CommandError(f"{model} has no chat template, so it cannot chat", hint)
    given = {name: value for name, value in sampling.items() if value is not None}
    talk = Talk(client, model, Conversation(system, settings.max_input_chars), given)
    if as_json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        _piped(talk, as_json)
    else:
        _at_terminal(talk, settings.home / HISTORY if history else None)


@dataclass
class Talk:
    """A conversation with one model of one gateway; `sampling` are the OpenAI parameters that were given."""

    client: GatewayClient
    model: str
    conversation: Conversation
    sampling: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str, show: Callable[[str], None] | None) -> tuple[Answer, int]:
        """Send what was said; the answer, and how many of the oldest turns were left out for it from here on.

        Raises GatewayError, with the conversation as it was. When the person interrupts, what has come is the answer.
        """
        from orchestrator.cli import ask
        from orchestrator.cli.conversation import too_long
        from orchestrator.client import GatewayError

        parts: list[str] = []

        def heard(piece: str) -> None:
            parts.append(piece)
            if show is not None:
                show(piece)

        now = self.conversation
        while now.overflows(text) and (shorter := now.shorter()) is not None:
            now = shorter
        while True:
            body = {"model": self.model, **self.sampling, "messages": now.messages(text)}
            try:
                answer = ask.send(self.client, "/v1/chat/completions", body, heard)
                break
            except GatewayError as error:
                fewer = now.shorter() if too_long(error.status, str(error)) else None
                if fewer is None:
                    raise
                now = fewer
            except KeyboardInterrupt:
                if parts:
                    self._keep(now, text, "".join(parts))
                raise
        return answer, self._keep(now, text, answer.text)

    def _keep(self, now: Conversation, text: str, answer: str) -> int:
        left_out = len(self.conversation.turns) - len(now.turns)
        now.add(text, answer)
        self.conversation = now
        return left_out


def _piped(talk: Talk, as_json: bool) -> None:
    from orchestrator.cli.generate import document

    for text in _lines():
        answer, left_out = talk.say(text, None if as_json else lambda piece: click.echo(piece, nl=False))
        if as_json:
            click.echo(json.dumps(document(answer, talk.model) | {"left_out_turns": left_out}, ensure_ascii=False))
        else:
            click.echo()
            _note(answer, left_out)


def _lines() -> Iterator[str]:
    """What people said, a line each; empty ones are none. Raises CommandError for what is no text."""
    number = 0
    while raw := sys.stdin.buffer.readline(_LINE_BYTES + 1):
        number += 1
        if len(raw) > _LINE_BYTES:
            raise CommandError(f"line {number} is longer than {_LINE_BYTES} bytes", "send shorter lines")
        try:
            text = raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise CommandError(f"line {number} is not UTF-8 (byte {error.start})", "convert it with iconv") from error
        if text.strip():
            yield text


def _note(answer: Answer, left_out: int) -> None:
    if left_out:
        turns = "turn is" if left_out == 1 else f"{left_out} turns are"
        click.echo(f"note: the model's context is full; the oldest {turns} left out from here on", err=True)
    if answer.finish_reason == "length":
        click.echo("note: the answer was cut at its limit of tokens", err=True)


def _at_terminal(talk: Talk, history: Path | None) -> None:
    from orchestrator.cli.lineedit import Lines

    lines = Lines(history)
    click.echo(f"{talk.model} at {talk.client.url}; /help lists what can be typed, Ctrl-D ends", err=True)
    while True:
        try:
            text = lines.read("you> ").strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            continue
        except UnicodeDecodeError:
            _tell(CommandError("this line is not UTF-8 text", "check the terminal's encoding"))
            continue
        if text.startswith("/") and not text.startswith("//"):
            if _command(talk, text) == "end":
                return
        elif text:
            _turn(talk, text.removeprefix("/") if text.startswith("//") else text)


def _turn(talk: Talk, text: str) -> None:
    """One turn at the terminal. A failure is told and the chat goes on."""
    from orchestrator.cli.conversation import shown
    from orchestrator.client import GatewayError

    begun = False

    def show(piece: str) -> None:
        nonlocal begun
        click.echo(("" if begun else f"{talk.model}> ") + shown(piece), nl=False)
        begun = True

    try:
        text.encode("utf-8")
        answer, left_out = talk.say(text, show)
    except UnicodeEncodeError:
        _tell(CommandError("this line is not UTF-8 text", "check the terminal's encoding"))
    except GatewayError as error:
        if begun:
            click.echo()
        _tell(error)
    except KeyboardInterrupt:
        click.echo("\nnote: the answer was stopped", err=True)
    else:
        click.echo()
        _note(answer, left_out)


def _command(talk: Talk, line: str) -> str:
    """Do what a line that begins with / says; "end" when it ends the chat."""
    from orchestrator.cli.conversation import shown

    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name in ("/exit", "/quit"):
        return "end"
    if name == "/help":
        click.echo(_COMMANDS)
    elif name == "/reset":
        talk.conversation.turns.clear()
        click.echo("the conversation begins anew")
    elif name == "/system":
        if rest:
            talk.conversation.system = rest
        click.echo(f"system message: {shown(talk.conversation.system or 'none')}")
    elif name == "/save" and rest:
        _save(talk, Path(rest).expanduser())
    else:
        missing = "/save needs the name of a file" if name == "/save" else f"there is no {name}"
        _tell(CommandError(missing, "/help lists what can be typed; // begins a line that begins with /"))
    return ""


def _save(talk: Talk, path: Path) -> None:
    """Write the conversation, for its owner alone; a file that is there already stays as it is."""
    fresh = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    text = json.dumps(talk.conversation.document(talk.model), ensure_ascii=False, indent=2) + "\n"
    try:
        with open(
            os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w", encoding="utf-8"
        ) as file:
            file.write(text)
        os.link(fresh, path)  # which fails where there is one, unlike a rename
        click.echo(f"saved to {path}")
    except OSError as error:
        _tell(CommandError(f"{path} cannot be written: {error.strerror}", "give another name"))
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)


def _tell(error: CommandError | GatewayError) -> None:
    """As base.py prints what ends a command. A gateway may quote what it was sent."""
    from orchestrator.cli.conversation import shown

    click.echo(f"error: {shown(str(error))}", err=True)
    click.echo(f"hint: {error.hint}", err=True)
