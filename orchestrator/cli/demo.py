"""The demo model: exported by a child process, because serving may not import torch, and greeted."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

import orchestrator
from orchestrator import models
from orchestrator.cli.base import CommandError
from orchestrator.settings import Settings

HELLO = "Hola, ¿cómo estás?"
STOP_S = 10.0
STDERR = 2  # the file descriptor


def folder() -> Path:
    """The committed checkpoint, beside this package."""
    return Path(orchestrator.__file__).resolve().parents[1] / "demo" / "model"


def export(settings: Settings) -> None:
    """Export the demo model into the repository with its progress on standard error. Raises CommandError."""
    repository = settings.model_repository
    if not (folder() / "config.json").is_file():
        raise CommandError(f"the demo model is not in {folder()}", "train it with `make demo-model`")
    if importlib.util.find_spec("torch") is None:
        raise CommandError(
            f"{repository} is empty, and exporting the demo model needs torch, which is not installed",
            "pip install 'truthgpt[export]', or let TRUTHGPT_MODEL_REPOSITORY name a repository with a model",
        )
    click.echo(f"{repository} is empty: exporting the demo model first (once)", err=True)
    precision = "int8" if settings.precision == "int8" else "fp32"  # mixed is fp32 on a CPU
    argv = [sys.executable, "-m", "export", str(folder()), "--name", models.DEMO]
    argv += ["--repository", str(repository), "--precision", precision]
    code = _run(argv)
    if code != 0:
        again = f"truthgpt export {folder()} --name {models.DEMO} --repository {repository} --debug"
        raise CommandError(f"the demo model was not exported (exit code {code})", f"see above, or run `{again}`")


def _run(argv: list[str]) -> int:
    """Run a program whose standard output is our standard error; it never outlives us."""

    def stop(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    former = signal.signal(signal.SIGTERM, stop)
    child = subprocess.Popen(argv, stdout=STDERR, stdin=subprocess.DEVNULL)  # noqa: S603 (our own program, no shell)
    try:
        return child.wait()
    finally:
        if child.poll() is None:  # interrupted: a terminal has told the child as well
            child.terminate()
            try:
                child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        signal.signal(signal.SIGTERM, former)
