"""`truthgpt up`: choose a model, export the demo model if there is none, start the stack, say hello."""

from __future__ import annotations

import click

from orchestrator.cli.base import Command, CommandError, json_option, settings_options
from orchestrator.settings import Settings

_EPILOG = """\b
Examples:
  truthgpt up
  truthgpt up --hello
  truthgpt up --detach --json
  truthgpt up --model chat --models small,embedder
  truthgpt up --model DialoGPT-small --http-port 8090 --home /srv/truthgpt
  truthgpt up --tritons 2 --workers 2
"""


@click.command("up", cls=Command, epilog=_EPILOG, short_help="Start the stack and serve until Ctrl-C.")
@click.option("--detach", "-d", is_flag=True, help="Return when the stack is ready and leave it running.")
@click.option("--hello", is_flag=True, help="Send one text when ready and show the answer.")
@click.option("--background", is_flag=True, hidden=True)
@json_option
@settings_options(
    "model", "models", "model_repository", "home", "environment", "host", "http_port", "grpc_port", "ops_port",
    "triton_http_port", "triton_grpc_port", "triton_metrics_port", "tritons", "triton_urls", "workers", "precision",
    "device", "log_level", "drain_s", "start_timeout_s",
)  # fmt: skip
def up(settings: Settings, detach: bool, hello: bool, background: bool, as_json: bool) -> None:
    """Start Triton, Redis and the gateway, and serve until Ctrl-C.

    Serves the model of the settings (TRUTHGPT_MODEL or --model), and beside it those of TRUTHGPT_MODELS or --models;
    `truthgpt models load` adds others to a running stack. While the profile's model is not exported, the demo
    model is served; into an empty repository it is exported first. Every other setting comes from the environment or
    truthgpt.toml: see `truthgpt config show`.

    With --tritons N there are N Triton servers that share the requests, each on ports 100 above those of the one
    before. With TRUTHGPT_TRITON_URLS or --triton-urls no Triton is started: the gateway uses those servers, with the
    models that they have.

    Ctrl-C lets running requests end and stops everything; a second one does not wait for them.
    """
    from orchestrator import models
    from orchestrator.cli import demo, launch, stack
    from orchestrator.cli.progress import Progress
    from orchestrator.jobs.table import schedules
    from orchestrator.ops.tune import applying

    found = stack.running(settings)
    if found is not None:
        raise CommandError(
            f"a stack is already running from {settings.home} (process {found.pid}, {found.http})",
            f"`truthgpt status{stack.flags(settings)}` shows it, `truthgpt down{stack.flags(settings)}` stops it",
        )
    schedules(settings)  # wrong ones are told before anything starts
    undone = applying.recover(settings)
    if undone is not None:
        click.echo(undone, err=True)
    served = []
    if not settings.triton_urls:
        choice = models.choice(settings)
        if choice.note:
            click.echo(choice.note, err=True)
        if choice.export_demo:
            demo.export(settings)
        served = [choice.model, *choice.further]
    with Progress() as progress:
        if detach:
            model = served[0] if served else settings.model
            launch.detached(settings, model, progress, as_json=as_json, hello=hello)
        else:
            launch.foreground(settings, served, progress, as_json=as_json, hello=hello, quiet=background)
