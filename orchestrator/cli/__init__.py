"""The `truthgpt` command: noun-verb, each command in the module of its noun. Parse, call, print, exit code."""

from __future__ import annotations

from orchestrator.cli.base import Root

__all__ = ["cli", "main"]

cli = Root(
    name="truthgpt",
    help="Serve Hugging Face models through Triton: export, run, ask, operate.",
    epilog="""\b
Examples:
  truthgpt up --detach
  truthgpt generate "Hola, ¿cómo estás?"
  truthgpt status
  truthgpt down
""",
    # name -> module:attribute, in the order in which they are listed; imported when asked for
    commands_at={
        "up": "orchestrator.cli.up:up",
        "down": "orchestrator.cli.down:down",
        "status": "orchestrator.cli.status:status",
        "top": "orchestrator.cli.top:top",
        "generate": "orchestrator.cli.generate:generate",
        "chat": "orchestrator.cli.chat:chat",
        "batch": "orchestrator.cli.batch:batch",
        "bench": "orchestrator.cli.bench:bench",
        "keys": "orchestrator.cli.keys:keys",
        "limits": "orchestrator.cli.limits:limits",
        "cache": "orchestrator.cli.cache:cache",
        "breaker": "orchestrator.cli.breaker:breaker",
        "audit": "orchestrator.cli.audit:audit",
        "alerts": "orchestrator.cli.alerts:alerts",
        "metrics": "orchestrator.cli.metrics:metrics",
        "jobs": "orchestrator.cli.jobs:jobs",
        "cleanup": "orchestrator.cli.cleanup:cleanup",
        "backup": "orchestrator.cli.backup:backup",
        "models": "orchestrator.cli.models:models",
        "tune": "orchestrator.cli.tune:tune",
        "tritons": "orchestrator.cli.tritons:tritons",
        "config": "orchestrator.cli.config:config",
        "doctor": "orchestrator.cli.doctor:doctor",
    },
)


def main() -> None:
    """The console script."""
    cli.main(prog_name="truthgpt")
