"""`truthgpt generate`: one prompt through a gateway, the answer on standard output."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.base import Command, CommandError, json_option, print_json, settings_options
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.cli.ask import Kind
    from orchestrator.client import Answer, GatewayClient

_EPILOG = """\b
Examples:
  truthgpt generate "Hola, ¿cómo estás?"
  echo "Tell me about TruthGPT" | truthgpt generate - --no-stream
  truthgpt generate "Once upon a time" --raw --max-tokens 40 --temperature 0
  truthgpt generate "¿Qué hora es?" --seed 7 --stop "." --json
  truthgpt generate "Once upon a time" --raw --min-p 0.05 --repetition-penalty 1.2 --min-tokens 20
"""


@click.command("generate", cls=Command, epilog=_EPILOG, short_help="Answer a prompt.")
@click.argument("prompt")
@click.option("--model", metavar="NAME", help="Model to ask.  [default: the one that the stack serves]")
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="New tokens at most.")
@click.option("--temperature", type=click.FloatRange(0, 2), metavar="X", help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), metavar="X", help="Nucleus of this probability.")
@click.option("--top-k", type=click.IntRange(min=-1), metavar="N", help="The N likeliest tokens; 0 is all.")
@click.option("--min-p", type=click.FloatRange(0, 1), metavar="X", help="Least part of the likeliest's probability.")
@click.option("--typical-p", type=click.FloatRange(0, 1, min_open=True), metavar="X", help="Locally typical sampling.")
@click.option("--repetition-penalty", type=click.FloatRange(0, 10, min_open=True), metavar="X",
              help="Above 1: what was said is less likely.")  # fmt: skip
@click.option("--presence-penalty", type=click.FloatRange(-2, 2), metavar="X", help="Off each token that was said.")
@click.option("--frequency-penalty", type=click.FloatRange(-2, 2), metavar="X", help="Off it each time it was said.")
@click.option("--min-tokens", type=click.IntRange(min=0), metavar="N", help="New tokens at least.")
@click.option("--seed", type=int, metavar="N", help="The same seed gives the same answer.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times.")
@click.option("--system", metavar="TEXT", help="System message of the chat.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--stream/--no-stream", default=True, help="Print text as it comes (the default) or at the end.")
@click.option("--url", metavar="URL", help="Gateway to ask.  [default: the running stack's]")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
              help="Give up after this long.  [default: request_timeout_s]")  # fmt: skip
@json_option
@settings_options("home", "api_key")
def generate(
    settings: Settings, prompt: str, model: str | None, max_tokens: int | None, system: str | None, raw: bool,
    stream: bool, url: str | None, timeout_s: float | None, as_json: bool, **sampling: Any,
) -> None:  # fmt: skip
    """Answer PROMPT with the running stack; `-` reads it from standard input.

    A model with a chat template is asked as a chat, another one (or with --raw) continues the prompt. --json prints
    text, finish_reason, usage, model, ttft_s (seconds to the first text) and latency_s.
    """
    if raw and system is not None:
        raise click.UsageError("--system needs a chat, --raw is none")
    from orchestrator.cli import ask

    text = _read() if prompt == "-" else _checked(prompt)
    client, model = target(settings, url, model, timeout_s)
    kind = ask.kind_of(client, model)
    require_generation(client, model, kind)
    chat = not raw and kind.chat
    if system is not None and not chat:
        raise CommandError(f"{model} has no chat template, so --system means nothing to it", "leave --system out")
    given = {name: value for name, value in sampling.items() if value is not None and value != ()}
    if "stop" in given:
        given["stop"] = list(given["stop"])
    question = ask.Question(text, model, chat, system, max_tokens, given)
    live = stream and not as_json
    answer = ask.ask(client, question, (lambda piece: click.echo(piece, nl=False)) if live else None)
    if as_json:
        print_json(document(answer, model))
    else:
        click.echo("" if live else answer.text)


def target(
    settings: Settings, url: str | None, model: str | None, timeout_s: float | None
) -> tuple[GatewayClient, str]:
    """The gateway to ask and the model. Raises CommandError when nothing runs or nothing is served."""
    from orchestrator.cli import stack
    from orchestrator.client import GatewayClient

    limit_s = settings.request_timeout_s if timeout_s is None else timeout_s
    if url is None:
        found = stack.require(settings)
        return GatewayClient(found.http, limit_s, settings.api_key), model or found.model
    client = GatewayClient(url, limit_s, settings.api_key)
    if model is None:
        served = client.models()
        if not served:
            raise CommandError(f"{url} serves no model", "`truthgpt models list` shows what could be served")
        model = served[0]
    return client, model


def require_generation(client: GatewayClient, model: str, kind: Kind) -> None:
    """Raise CommandError for a model that does not generate, with how it is asked."""
    if kind.operation != "generate":
        what = {"embed": "makes embeddings", "classify": "classifies texts"}.get(kind.operation, "is of another kind")
        raise CommandError(f"{model} does not generate text, it {what}", _instead(client, model, kind))


def _instead(client: GatewayClient, model: str, kind: Kind) -> str:
    """How to ask a model that does not generate."""
    from orchestrator.cli import ask

    if kind.operation not in ask.ENCODERS:
        return f"ask it with a KServe client at {client.url}/v2/models/{model}/infer, or name another with --model"
    path, _ = ask.ENCODERS[kind.operation]
    body = json.dumps({"model": model, "input": ["…"]}, ensure_ascii=False)
    return f"curl {client.url}{path} -H 'content-type: application/json' -d '{body}'; or name another with --model"


def _read() -> str:
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"standard input is not UTF-8 (byte {error.start})", "convert it with iconv") from error
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


def _checked(prompt: str) -> str:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CommandError("the prompt is not UTF-8 text", "check the terminal's encoding") from error
    return prompt


def document(answer: Answer, model: str) -> dict[str, object]:
    """What --json prints of an answer."""
    facts = asdict(answer)
    usage = {name: facts.pop(name) for name in ("prompt_tokens", "completion_tokens")}
    return {
        "text": facts["text"], "finish_reason": facts["finish_reason"], "usage": usage, "model": model,
        "ttft_s": facts["ttft_s"], "latency_s": facts["latency_s"],
    }  # fmt: skip
