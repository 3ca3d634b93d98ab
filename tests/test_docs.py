"""The documentation: links lead somewhere, the commands and settings it names exist, its protocol is the backend's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest

from backends.inflight import request
from orchestrator.cli import cli
from orchestrator.ops import entrycheck
from orchestrator.secretfiles import FILE
from orchestrator.settings import CONFIG_ENV, Settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file of the repository, and its anchor a heading there."""
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_variables_that_are_named_exist(page: Path) -> None:
    """`truthgpt …` in a page is a command with these options, TRUTHGPT_… a setting, `make …` a target."""
    text = page.read_text(encoding="utf-8")
    table = Settings.table().values()
    known = {spec.env for spec in table} | {f"{spec.env}{FILE}" for spec in table if spec.secret} | {CONFIG_ENV}
    assert {name for name in re.findall(r"\bTRUTHGPT_[A-Z_]+[A-Z]\b", text)} <= known
    for line in re.findall(r"(?:^|`|\| )truthgpt ([a-z][^`\n|\\]*)", text, re.MULTILINE):
        check_command(line.split())
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {target for target in re.findall(r"`make ([a-z-]+)", text)} <= targets


def check_command(words: list[str]) -> None:
    command: click.Command = cli
    while isinstance(command, click.Group) and words:
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, f"truthgpt {' '.join(words)}"
        command, words = found, words[1:]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    given = {word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)}
    assert given <= options | {"--help", "-h", "-"}, f"{command.name}: {given - options}"


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading of docs/protocol.md, header left out."""
    part = re.split(r"^#+ +", PROTOCOL.split(f"# {heading}\n")[1], flags=re.MULTILINE)[0]
    table = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
    return table[2:]


def test_the_tensors_are_the_checked_ones() -> None:
    """The tensor tables of docs/protocol.md list the names and types that `truthgpt doctor` demands of config.pbtxt, or
    allows there.
    """
    inputs, outputs = entrycheck.INPUTS | entrycheck.INPUTS_MAY, entrycheck.OUTPUTS | entrycheck.OUTPUTS_MAY
    for heading, tensors in (("Inputs", inputs), ("Outputs", outputs)):
        assert {name.strip("`"): f"TYPE_{kind}" for name, kind, *_ in rows(heading)} == tensors


def test_the_sampling_parameters_are_the_backends() -> None:
    """docs/protocol.md lists exactly the sampling parameters that the backend reads."""
    listed = {name.strip("`") for name, *_ in rows("Sampling parameters")}
    assert listed == {*request._READERS, "messages", "prompt_token_ids"}


def test_the_error_kinds_are_the_backends() -> None:
    """docs/protocol.md lists every kind that the backend's error tree can send."""
    from backends.inflight import errors

    kinds = {value.kind for value in vars(errors).values() if isinstance(value, type) and hasattr(value, "kind")}
    assert kinds <= {name.strip("`") for name, *_ in rows("Errors")}


def test_the_examples_are_json_that_the_backend_takes() -> None:
    """Every request body in docs/protocol.md parses, and the backend takes its sampling parameters."""
    bodies = [json.loads(body) for body in re.findall(r"-d '(\{.*?\})'", PROTOCOL, re.DOTALL)]
    assert len(bodies) >= 3
    for body in bodies:
        raw = body.get("sampling_parameters")
        if raw is not None:
            request.parse(body["text_input"].encode(), raw.encode())
