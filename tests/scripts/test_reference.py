"""The generated reference says what the code does, and a difference is noticed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from orchestrator.settings import Settings
from scripts import reference


def test_the_reference_is_up_to_date() -> None:
    """docs/cli.md and docs/settings.md are what `make docs` writes: a new command or setting has to be documented."""
    done = subprocess.run(
        [sys.executable, "scripts/reference.py", "--check"], cwd=reference.ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the pages to be changed."""
    (tmp_path / "docs").mkdir()
    for name, page in reference.PAGES.items():
        (tmp_path / name).write_text(page(), encoding="utf-8")
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    return tmp_path


def test_check_notices_a_change_and_writes_nothing(
    pages: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page that differs by one character, or is missing, fails the check with the command that mends it."""
    monkeypatch.setattr(sys, "argv", ["reference.py", "--check"])
    assert reference.main() == 0
    page = pages / "docs" / "cli.md"
    page.write_text(page.read_text() + " ")
    (pages / "docs" / "settings.md").unlink()
    changed = page.read_text()
    assert reference.main() == 1
    stderr = capsys.readouterr().err
    assert "docs/cli.md, docs/settings.md" in stderr and "make docs" in stderr
    assert page.read_text() == changed and not (pages / "docs" / "settings.md").exists()
    monkeypatch.setattr(sys, "argv", ["reference.py"])
    assert reference.main() == 0
    monkeypatch.setattr(sys, "argv", ["reference.py", "--check"])
    assert reference.main() == 0


def test_a_new_option_changes_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that is added to a command appears in the page, so the check fails until it is written."""
    before = reference.cli_page()
    (command,) = [command for path, command in reference.walk(reference.cli, ["truthgpt"]) if path[-1] == "status"]
    option = click.Option(["--brand-new"], is_flag=True, help="Is new.")
    monkeypatch.setattr(command, "params", [*command.params, option])
    assert "--brand-new" not in before and "| `--brand-new` | Is new. |" in reference.cli_page()


def test_every_setting_and_no_machine_is_in_the_pages() -> None:
    """Every setting is documented with its variable, and nothing of the machine that wrote the page is."""
    settings = reference.settings_page()
    for name, spec in Settings.table().items():
        assert f"| `{name}` | `{spec.env}` |" in settings
    assert str(reference.ROOT) not in settings + reference.cli_page()
