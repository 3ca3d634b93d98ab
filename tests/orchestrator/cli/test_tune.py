"""`truthgpt tune` as people meet it, where no server is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.ops.tune import applying, undoing
from orchestrator.ops.tune.choosing import Verdict
from orchestrator.ops.tune.errors import TuneError
from orchestrator.ops.tune.figures import Bounds, Figures, Workload
from orchestrator.ops.tune.history import History, Row, Subject
from orchestrator.ops.tune.knobs import Knob
from orchestrator.ops.tune.tuning import Plan, Result, Trial

NOW, BEST = {"slots": "4", "threads": "0"}, {"slots": "8", "threads": "0"}


def config(place: Any) -> Path:
    return Path(place.repository / "demo" / "config.pbtxt")


def changed(place: Any) -> str:
    """As a tuning leaves it; the former text."""
    path = config(place).resolve()
    before = path.read_text()
    with applying.held(place.home):
        undoing.write(path, before.replace('"slots" value { string_value: "4"', '"slots" value { string_value: "8"'))
        undoing.push(place.home, "demo", undoing.document(path, before, path.read_text(), time.time()))
    assert path.read_text() != before
    return before


@pytest.mark.parametrize(("arguments", "said"), [
    (("nobody",), "there is no model nobody"),
    (("demo", "--version", "7"), "demo has no version 7"),
    (("demo", "--bound", "speed:1"), "'speed:1' is not one of ttft, itl, latency"),
    (("demo", "--plot", "frontier.pdf"), "neither in .png nor in .svg"),
    (("demo", "--html", "nowhere/a.html"), "there is no folder nowhere"),
    (("demo", "--prompt-tokens", "5000"), "takes 4096 tokens in all"),
    (("demo", "--undo"), "nothing to undo for demo"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_at_once(place: Any, arguments: tuple[str, ...], said: str) -> None:
    """With a hint, and no server was started for it."""
    place.export()
    assert said in place.refused("tune", *arguments)
    assert not [*(place.home / "tune").glob("scratch-*")]


def test_wrong_usage(place: Any) -> None:
    """What excludes each other, and numbers out of range, are wrong usage."""
    for text in ("--undo --history", "--force", "--trials 0", "--minutes nan", "--margin -1"):
        arguments = text.split()
        assert place.run("tune", "demo", *arguments).exit_code == 2, arguments


def test_a_damaged_model_is_not_measured(place: Any) -> None:
    """The file that is wrong is named."""
    (place.export() / "1" / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is damaged" in place.refused("tune", "demo")


@pytest.mark.parametrize(("missing", "arguments"), [("optuna", ()), ("matplotlib", ("--html", "x.html"))])
def test_what_has_to_be_installed_is_said(place: Any, missing: str, arguments: tuple[str, ...]) -> None:
    """Before anything is measured."""
    place.export()
    code = f"import sys; sys.modules[{missing!r}] = None; from orchestrator.cli import cli; cli.main()"
    command = [sys.executable, "-c", code, "tune", "demo", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 1 and f"{missing} is not installed" in done.stderr and "truthgpt[measure]" in done.stderr


def test_undo_puts_the_former_file_back(place: Any) -> None:
    """With the difference, once; a file that was changed since only with --force."""
    place.export()
    before = changed(place)
    document = place.json("tune", "demo", "--undo")
    assert document["undone"] and not document["reloaded"] and '+parameters { key: "slots"' in document["diff"]
    assert config(place).read_text() == before
    changed(place)
    config(place).write_text(before + "# mine\n")
    assert "was changed after the tuning" in place.refused("tune", "demo", "--undo")
    result = place.run("tune", "demo", "--undo", "--force", "--yes")
    assert "-# mine" in result.stdout and config(place).read_text() == before


def test_an_interrupted_one_is_recovered_and_told_of(place: Any) -> None:
    """The next tuning, and `up` before it starts anything, put back what was half done."""
    place.export()
    path = config(place).resolve()
    before = path.read_text()
    for command in (("tune", "demo", "--undo"), ("up", "--model", "nobody")):
        path.write_text("half done")
        (place.home / "tune").mkdir(parents=True, exist_ok=True)
        (place.home / "tune" / applying.NOTE).write_text(json.dumps({
            "format": 1, "model": "demo", "path": str(path), "before": before, "after": "half done", "undoes": None,
            "record": {}, "done": False,
        }))  # fmt: skip
        assert "a tuning of demo that was interrupted is undone" in place.run(*command).stderr
        assert path.read_text() == before


def test_two_at_once_are_refused(place: Any) -> None:
    """The second one says why."""
    place.export()
    with applying.held(place.home):
        assert "another tuning runs" in place.refused("tune", "demo")


def test_the_history_is_a_table_by_mean_throughput(place: Any) -> None:
    """Each point with its mean and how often it was measured, and the batch sizes by theirs, the best first."""
    assert place.json("tune", "demo", "--history") == []
    history = History(place.home, Subject("demo", "e", "a machine", 8, 128, 64))
    for slots, speed in (("4", 100.0), ("8", 150.0), ("8", 250.0), ("16", None)):
        figures = None if speed is None else Figures(speed, 0.5, 0.1, 0.01)
        history.add(Row({"slots": slots, "threads": "0"}, figures, "r", 1.0, "" if figures else "no memory"))
    (document,) = place.json("tune", "demo", "--history")
    assert [(row["settings"]["slots"], row["mean_throughput"], row["measurements"]) for row in document["points"]] == [
        ("8", 200.0, 2), ("4", 100.0, 1), ("16", None, 1),
    ]  # fmt: skip
    assert [row["batch_size"] for row in document["batch_sizes"]] == ["8", "4"]
    text = place.run("tune", "demo", "--history").stdout
    assert "8 clients, 128 prompt tokens, 64 output tokens" in text and "the best first: 8: 200 tokens/s" in text


def result(winner: bool = True) -> Result:
    knobs = (Knob("slots", ("parameters", "slots"), ("4", "8", "16"), "4"),
             Knob("threads", ("parameters", "threads"), ("0", "1"), "0"))  # fmt: skip
    rows = [("current", NOW, Figures(100, 1.0, 0.1, 0.01)), ("search", BEST, Figures(150, 0.9, 0.1, 0.01)),
            ("search", {"slots": "16", "threads": "1"}, Figures(200, 9.0, 0.1, 0.01))]  # fmt: skip
    trials = [Trial(stage, point, figures) for stage, point, figures in rows]
    trials.append(Trial("search", {"slots": "4", "threads": "1"}, None, "no memory"))
    best = Verdict(BEST, rows[1][2], 1.5, True, True)
    plan = Plan(Workload(8, 128, 64))
    return Result(knobs, plan, Bounds(latency_s=1.1), rows[0][2], trials, [best], best if winner else None, 5, ["<b>"])


def test_the_frontier_is_shown_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is set, the winner and what is beyond the bounds are marked, in the table, the plot and the page."""
    from orchestrator.cli import tuneshow
    from orchestrator.ops.tune import picture

    tuneshow.show_frontier(result())
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "winner, frontier" in lines["8"] and "1.50" in lines["8"] and "set now" in lines["4"]
    assert "beyond the bounds" in lines["16"] and "bounds (p99): latency 1.1 s" in out
    for name, begins in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        picture.draw(tmp_path / name, "$de_mo$", result())
        assert (tmp_path / name).read_bytes().startswith(begins)
    titles, rows = tuneshow.frontier(result())
    picture.page(tmp_path / "a.html", "<demo>", titles, rows, result())
    page = (tmp_path / "a.html").read_text()
    assert "<svg" in page and "<script" not in page and "&lt;demo&gt;" in page and "&lt;b&gt;" in page
    assert page.count("class=winner") == 1 and "<b>" not in page
    with pytest.raises(TuneError, match="cannot be written"):
        picture.draw(tmp_path / "nowhere" / "a.png", "demo", result(winner=False))
