"""The check before installing: one sentence, and no syntax that an old Python cannot read."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import preflight

GOOD: dict[str, Any] = {
    "system": "linux", "machine": "x86_64", "glibc": "2.36", "python": (3, 11), "has_venv": True,
}  # fmt: skip
SCRIPT = Path(preflight.__file__)


def test_this_machine_passes() -> None:
    """Where the tests run TruthGPT can be installed, without a word."""
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("good", [{}, {"glibc": "2.35"}, {"glibc": "2.41"}, {"glibc": "3.0"}, {"python": (3, 12)}])
def test_what_is_supported_passes(good: dict[str, Any]) -> None:
    """The oldest and newer supported versions are taken."""
    assert preflight.fault(**{**GOOD, **good}) is None


@pytest.mark.parametrize(
    ("bad", "words", "hint"),
    [
        ({"system": "darwin"}, "Linux", "Debian 12"),
        ({"system": "win32"}, "Linux", "Ubuntu 24.04"),
        ({"machine": "aarch64"}, "x86-64", "Debian 12"),
        ({"glibc": "2.31"}, "glibc 2.35", "Debian 12"),
        ({"glibc": "2.4"}, "glibc 2.35", "Debian 12"),
        ({"glibc": ""}, "another C library", "Debian 12"),
        ({"python": (3, 10)}, "Python 3.11 or 3.12, this is 3.10", "PYTHON=python3.12"),
        ({"python": (3, 13)}, "Python 3.11 or 3.12, this is 3.13", "PYTHON=python3.12"),
        ({"has_venv": False}, "virtual environments", "python3.11-venv"),
    ],
)
def test_what_is_not_supported_gets_one_sentence(bad: dict[str, Any], words: str, hint: str) -> None:
    """Each unsupported fact is named in one sentence with a hint."""
    found = preflight.fault(**{**GOOD, **bad})
    assert found is not None
    assert words in found[0] and "\n" not in found[0] and hint in found[1]


def test_a_fault_is_error_hint_and_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The script prints `error:` and `hint:` on standard error and ends with 1, which stops `make install`."""
    monkeypatch.setattr(preflight.platform, "machine", lambda: "riscv64")
    assert preflight.main() == 1
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith(
        "error: TruthGPT needs an x86-64 processor, this one is riscv64\nhint: "
    )


def test_an_old_python_can_read_it() -> None:
    """No syntax newer than Python 3.6 and only the standard library's oldest parts: it has to run where we do not."""
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 6))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert names == {"importlib.util", "os", "platform", "sys"}
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))


def test_make_install_asks_it_first(tmp_path: Path) -> None:
    """`make install` with an interpreter that fails the check stops with its sentence and builds nothing."""
    root = SCRIPT.parents[1]
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\ncase "$1" in *preflight.py) echo "error: no" >&2; exit 1;; esac\ntouch "$0.called"\n')
    python.chmod(0o755)
    argv = ["make", "-C", str(root), f"PYTHON={python}", f"VENV={tmp_path / 'venv'}", "install"]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "MAKEFLAGS": ""})
    assert done.returncode == 2 and "error: no" in done.stderr
    assert not (tmp_path / "venv").exists() and not python.with_suffix(".called").exists()
