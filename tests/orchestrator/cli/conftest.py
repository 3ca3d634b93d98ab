"""A clean environment with its own home, repository and ports, and ways to run the command in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from orchestrator.cli import cli
from orchestrator.ops.stopping import lock_holder
from tests.counting import write_entry
from tests.e2e.stack import free_ports
from tests.orchestrator.gateway import Gateway, write_state


@pytest.fixture(scope="session")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real entry named demo, to be copied."""
    return write_entry(tmp_path_factory.mktemp("entry"), name="demo")


class Place:
    """One deployment: folders, variables, and the command run in this process or in one of its own."""

    def __init__(self, base: Path, entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.repository, self._entry = base / "home", base / "repository", entry
        self._monkeypatch = monkeypatch
        for name in list(os.environ):
            if name.startswith("TRUTHGPT_") or name == "ENVIRONMENT":
                monkeypatch.delenv(name)
        names = ("HTTP", "GRPC", "OPS", "TRITON_HTTP", "TRITON_GRPC", "TRITON_METRICS")
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        values = {f"{name}_PORT": port for name, port in self.ports.items()}
        self.set(HOME=self.home, MODEL_REPOSITORY=self.repository, CONFIG="", **values)

    def set(self, **values: object) -> None:
        """Set TRUTHGPT_ variables; None removes one."""
        for name, value in values.items():
            if value is None:
                self._monkeypatch.delenv(f"TRUTHGPT_{name}", raising=False)
            else:
                self._monkeypatch.setenv(f"TRUTHGPT_{name}", str(value))

    def export(self, name: str = "demo", versions: int = 1) -> Path:
        """A model in the repository, as if exported `versions` times."""
        folder = self.repository / name
        for version in range(1, versions + 1):
            shutil.copytree(self._entry / "1", folder / str(version))
            path = folder / str(version) / "manifest.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "name": name, "version": str(version)}))
        config = (self._entry / "config.pbtxt").read_text().replace('name: "demo"', f'name: "{name}"')
        (folder / "config.pbtxt").write_text(config)
        return folder

    def run(self, *arguments: str, input: str | bytes | None = None) -> Result:
        """The command in this process."""
        return CliRunner().invoke(cli, list(arguments), input=input, prog_name="truthgpt")

    def json(self, *arguments: str, code: int = 0) -> Any:
        """What the command prints with --json: one document and nothing else."""
        result = self.run(*arguments, "--json")
        assert result.exit_code == code, result.output
        return json.loads(result.stdout)

    def refused(self, *arguments: str, input: str | bytes | None = None, code: int = 1) -> str:
        """Standard error of a command that must fail as people are promised: error, hint, no output, no traceback."""
        result = self.run(*arguments, input=input)
        assert result.exit_code == code, result.output
        assert result.stdout == "" and "Traceback" not in result.stderr
        lines = result.stderr.strip().splitlines()
        assert any(line.startswith("error: ") for line in lines), result.stderr
        assert lines[-1].startswith("hint: "), result.stderr
        return result.stderr

    def process(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """The command in a process of its own."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        return subprocess.Popen([sys.executable, "-m", "orchestrator.cli", *arguments], **options)


@pytest.fixture
def place(tmp_path: Path, entry: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    made = Place(tmp_path, entry, monkeypatch)
    yield made
    if lock_holder(made.home) is not None:  # a test that failed half-way left its stack running
        assert made.process("down").wait(60) == 0


@pytest.fixture
def gateway(place: Place) -> Iterator[Gateway]:
    """A gateway, and a state file that says it is this home's."""
    with Gateway() as running:
        write_state(place.home, running.url)
        yield running
