"""What a person sees when the stack is ready: a first answer, the addresses, and what to try next."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import click

from orchestrator.cli import ask, stack
from orchestrator.cli.base import print_json
from orchestrator.cli.demo import HELLO
from orchestrator.client import GatewayClient, GatewayError
from orchestrator.local.state import State
from orchestrator.settings import Settings

HELLO_TIMEOUT_S = 60.0
HELLO_TOKENS = 60

_TEXT = """\
TruthGPT serves {model}.
  OpenAI API  {http}/v1
  KServe v2   {kserve}
  health      {http}/health
  Triton      {triton}
  Redis       {redis}
  logs        {logs}

{first_key}Try next, in another shell:
{examples}
To stop: {stop}
"""
_EXAMPLES = {
    "generate": """\
{command} generate "What is TruthGPT?"{flags}

curl -N {http}/v1/chat/completions -H 'content-type: application/json' \\{curl_key}
  -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hola, ¿cómo estás?"}}], "stream": true}}'

Or in Python:
{import_os}from openai import OpenAI
client = OpenAI(base_url="{http}/v1", api_key={api_key})
messages = [{{"role": "user", "content": "Tell me about TruthGPT"}}]
for chunk in client.chat.completions.create(model="{model}", messages=messages, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
""",
    "embed": """\
curl {http}/v1/embeddings -H 'content-type: application/json' \\{curl_key}
  -d '{{"model": "{model}", "input": ["Hola, ¿cómo estás?", "How are you?"]}}'

Or in Python:
{import_os}from openai import OpenAI
client = OpenAI(base_url="{http}/v1", api_key={api_key})
answer = client.embeddings.create(model="{model}", input=["Hola, ¿cómo estás?", "How are you?"])
print([len(row.embedding) for row in answer.data])
""",
    "classify": """\
curl {http}/v1/classify -H 'content-type: application/json' \\{curl_key}
  -d '{{"model": "{model}", "input": ["Hola, ¿cómo estás?", "How are you?"]}}'

Or in Python:
{import_os}from openai import OpenAI
client = OpenAI(base_url="{http}/v1", api_key={api_key})
body = {{"model": "{model}", "input": ["Hola, ¿cómo estás?", "How are you?"]}}
for row in client.post("/classify", cast_to=object, body=body)["data"]:
    print(row["label"], row["score"])
""",
    "infer": """\
curl {http}/v2/models/{model}{only_key}
""",
}
_FIRST_KEY = """\
Every request needs an API key. Make the first one, and set it as the command says:
{command} keys create --tenant NAME{flags}

"""


def present(settings: Settings, found: State, as_json: bool, hello: bool, detached: bool) -> bool:
    """Say hello if asked, then print the addresses. False when the stack did not answer the greeting."""
    answered = _greet(settings, found, show=not as_json) if hello else True
    if as_json:
        print_json(stack.addresses(found))
        return answered
    try:
        kind = ask.kind_of(GatewayClient(found.http, stack.ASK_S, settings.api_key), found.model)
    except GatewayError:  # it was there a moment ago: what was asked for is told all the same
        kind = ask.Kind()
    flags = stack.flags(settings)
    command = _command()
    down = f"{command} down{flags}"
    facts = stack.addresses(found) | {"model": found.model, "logs": settings.home.absolute() / "logs"}
    facts |= {"flags": flags, "command": command, "stop": down if detached else f"Ctrl-C, or `{down}`"}
    facts["kserve"] = f"{found.http}/v2" + (f", {found.grpc} (gRPC)" if found.grpc else "")
    facts["triton"] = _tritons(found)
    keys = settings.auth == "keys"
    facts |= {
        "first_key": _FIRST_KEY.format(command=command, flags=flags) if keys and settings.api_key is None else "",
        "curl_key": '\n  -H "authorization: Bearer $TRUTHGPT_API_KEY" \\' if keys else "",
        "import_os": "import os\n" if keys else "",
        "api_key": 'os.environ["TRUTHGPT_API_KEY"]' if keys else '"none"',
        "only_key": ' -H "authorization: Bearer $TRUTHGPT_API_KEY"' if keys else "",
    }  # fmt: skip
    examples = _EXAMPLES.get(kind.operation, _EXAMPLES["infer"]).format(**facts)
    click.echo(_TEXT.format(**facts, examples=examples), nl=False)
    return answered


def _tritons(found: State) -> str:
    """A line for each server."""
    own = [f"{place.http} (HTTP), {place.grpc} (gRPC)" for place in found.tritons]
    return "\n              ".join(own) or f"{found.triton_http} (not of this stack)"


def _command() -> str:
    """How this command can be called again: by its name if the shell finds it, else by its path."""
    path = Path(sys.argv[0])
    if path.name != "truthgpt":
        return f"{sys.executable} -m orchestrator.cli"
    near = os.path.relpath(path)
    return "truthgpt" if shutil.which("truthgpt") else str(path.absolute()) if near.startswith("..") else near


def _greet(settings: Settings, found: State, show: bool) -> bool:
    """Send one prompt and show the answer as it comes. An error is told; the stack goes on."""
    if settings.auth == "keys" and settings.api_key is None:  # no error: the first key is made once the stack runs
        click.echo("no prompt was sent: it needs an API key, and TRUTHGPT_API_KEY is not set", err=True)
        make = f"make one with `{_command()} keys create --tenant NAME{stack.flags(settings)}`"
        click.echo(f"hint: {make}", err=True)
        return True
    try:
        client = GatewayClient(found.http, HELLO_TIMEOUT_S, settings.api_key)
        kind = ask.kind_of(client, found.model)
        if kind.operation not in ("generate", *ask.ENCODERS):
            click.echo(f"no text was sent: {found.model} takes none", err=True)
            return True
        if show:
            click.echo(f"> {HELLO}")
        if kind.operation in ask.ENCODERS:
            said = ask.encode(client, found.model, kind.operation, HELLO)
            if show:
                click.echo(f"{said}\n")
            return True
        question = ask.Question(HELLO, found.model, kind.chat, max_tokens=HELLO_TOKENS)
        ask.ask(client, question, (lambda text: click.echo(text, nl=False)) if show else None)
        if show:
            click.echo("\n")
    except GatewayError as error:
        click.echo(f"error: the stack is ready but its first answer failed: {error}", err=True)
        click.echo(f"hint: {error.hint}", err=True)
        return False
    return True
