"""`truthgpt models verify|load|unload|reload` where no server is needed: what is wrong on disk, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.local import modelset
from orchestrator.ops import verification
from tests.orchestrator.gateway import write_state


def damage(version: Path, how: str) -> None:
    manifest = json.loads((version / "manifest.json").read_text())
    if how == "flipped bit":
        data = bytearray((version / "model.onnx").read_bytes())
        data[len(data) // 2] ^= 1
        (version / "model.onnx").write_bytes(data)
    elif how == "missing":
        (version / "tokenizer.json").unlink()
    elif how == "unlisted":
        (version / "weights").mkdir()
        (version / "weights" / "more.bin").write_bytes(b"x")
    elif how == "format":
        (version / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    elif how == "leads out":
        (version / "manifest.json").write_text(json.dumps(manifest | {"files": {"../1/model.onnx": {}}}))
    elif how == "no manifest":
        (version / "manifest.json").unlink()
    else:
        (version.parent / "config.pbtxt").write_text("name: [")


DAMAGES = {
    "flipped bit": ("files", "model.onnx is damaged"),
    "missing": ("files", "tokenizer.json cannot be read"),
    "unlisted": ("files", "weights/more.bin is not in the manifest"),
    "format": ("manifest", "has format 99"),
    "leads out": ("files", "leads out of the folder"),
    "no manifest": ("manifest", "manifest.json cannot be read"),
    "config": ("config", "config.pbtxt cannot be read"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_verify_names_what_is_wrong(place: Any, how: str) -> None:
    """Exit code 1, the check and a sentence with the file; an intact model beside it is ok."""
    place.export("good")
    damage(place.export("bad") / "1", how)
    rows = {row["name"]: row for row in json.loads(place.run("models", "verify", "--json").stdout)}
    assert rows["good"]["ok"] and rows["good"]["problems"] == [] and rows["good"]["files"] == 3
    assert not rows["bad"]["ok"]
    check, text = DAMAGES[how]
    assert any(row["check"] == check and text in row["message"] for row in rows["bad"]["problems"])
    result = place.run("models", "verify", "bad")
    assert result.exit_code == 1 and "hint: " in result.stderr and "Traceback" not in result.stderr
    assert place.run("models", "verify", "good").exit_code == 0


def test_verify_chooses_versions(place: Any) -> None:
    """The newest unless one or all are asked for; an empty repository is no error."""
    assert place.json("models", "verify") == []
    place.export(versions=3)

    def versions(*arguments: str) -> list[str]:
        return [row["version"] for row in place.json("models", "verify", *arguments)]

    assert versions() == versions("demo") == ["3"]
    assert versions("demo", "--version", "1") == ["1"]
    assert versions("--all") == versions("demo", "--all") == ["3", "2", "1"]
    assert place.run("models", "verify", "--version", "1").exit_code == 2
    assert "no version 9" in place.refused("models", "verify", "demo", "--version", "9")


def test_what_a_backend_makes_by_itself_is_no_fault(place: Any) -> None:
    """Files and folders that the manifest names as generated may be there or not."""
    version = place.export() / "1"
    manifest = json.loads((version / "manifest.json").read_text())
    (version / "manifest.json").write_text(json.dumps(manifest | {"generated": ["timing", "engine.plan"]}))
    assert place.json("models", "verify")[0]["ok"]
    (version / "timing").mkdir()
    for name in ("timing/cache", "engine.plan"):
        (version / name).write_text("x")
    assert place.json("models", "verify")[0]["ok"]


def test_a_further_check_counts(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that a target brings refuses a version as the others do."""
    monkeypatch.setitem(verification.CHECKS, "engine", lambda entry, version, advance: ["made for another GPU"])
    place.export()
    problems = json.loads(place.run("models", "verify", "--json").stdout)[0]["problems"]
    assert problems == [{"check": "engine", "message": "made for another GPU"}]


def test_all_bytes_are_told_of_while_they_are_read(place: Any) -> None:
    """Progress adds up to what the manifest lists."""
    place.export()
    from orchestrator import models

    entry, counts = models.get(place.repository, "demo"), list[int]()
    verdict = verification.verify(entry, entry.newest, counts.append)
    assert verdict.ok and sum(counts) == verdict.bytes == verification.size(entry.newest) > 0


@pytest.mark.parametrize("verb", ["load", "reload", "unload"])
def test_without_a_stack_there_is_nothing_to_change(place: Any, verb: str) -> None:
    """The hint says how to start one."""
    place.export()
    assert "truthgpt up" in place.refused("models", verb, "demo")


def test_what_is_refused_before_triton_is_asked(place: Any) -> None:
    """Names and versions that are not there, the default model, and a second operator; each with a hint."""
    place.export()
    write_state(place.home, "http://127.0.0.1:1")
    assert "hint: it has demo" in place.refused("models", "load", "nope")
    assert "no version 7" in place.refused("models", "reload", "demo", "--version", "7")
    assert "--force" in place.refused("models", "unload", "demo")
    with modelset.changing(place.home, "other", 1.0):
        assert "working on other" in place.refused("models", "load", "demo", "--timeout-s", "0.1")
    assert "Triton at http://127.0.0.1:1 does not answer" in place.refused("models", "load", "demo")


def test_what_servers_of_others_have_is_theirs(place: Any) -> None:
    """The stack's own commands refuse, whatever is in the repository; the hint says who may change it and where."""
    write_state(place.home, "http://127.0.0.1:1", servers=[], triton_http="http://elsewhere:8000")
    for arguments in (("load", "demo"), ("reload", "demo"), ("unload", "demo")):
        said = place.refused("models", *arguments)
        assert "no Triton of its own, it uses http://elsewhere:8000" in said
        assert "POST http://127.0.0.1:1/v2/repository/models/NAME/load" in said


def test_remove_refuses_the_version_that_is_to_be_served(place: Any) -> None:
    """Also while nothing answers; another version may go, the newest included."""
    place.export(versions=3)
    write_state(place.home, "http://127.0.0.1:1")
    modelset.write(place.home, {"demo": 2})
    assert "models unload demo" in place.refused("models", "remove", "demo", "--version", "2", "--yes")
    assert place.run("models", "remove", "demo", "--version", "3", "--yes").exit_code == 0


def export_pair(place: Any) -> Path:
    """`mood`, whose graph is `mood--engine`; the manifest of the latter."""
    graph = place.export("mood--engine") / "1" / "manifest.json"
    graph.write_text(json.dumps({**json.loads(graph.read_text()), "graph_only": True}))
    front = place.export("mood") / "1" / "manifest.json"
    digest = hashlib.sha256(graph.read_bytes()).hexdigest()
    served_by = {"name": "mood--engine", "version": 1, "manifest_sha256": digest}
    front.write_text(json.dumps({**json.loads(front.read_text()), "served_by": served_by}))
    return Path(graph)


def test_a_model_is_verified_with_its_graph(place: Any) -> None:
    """A graph that is another one than it was exported with, or that is missing, is named; nothing is loaded then."""
    manifest = export_pair(place)
    assert all(row["ok"] for row in place.json("models", "verify"))
    manifest.write_text(manifest.read_text() + " ")
    rows = json.loads(place.run("models", "verify", "mood", "--json").stdout)
    assert "not the one that mood version 1 was exported with" in rows[0]["problems"][0]["message"]
    shutil.rmtree(manifest.parents[1])
    rows = json.loads(place.run("models", "verify", "mood", "--json").stdout)
    assert [row["check"] for row in rows[0]["problems"]] == ["graph"]
    assert "mood version 1 needs mood--engine version 1" in rows[0]["problems"][0]["message"]


def test_a_graph_is_not_loaded_or_unloaded_by_itself(place: Any) -> None:
    """Whoever names it is told the command for the model that it belongs to."""
    export_pair(place)
    write_state(place.home, "http://127.0.0.1:1")
    for verb in ("load", "reload"):
        assert "models load mood" in place.refused("models", verb, "mood--engine")
    modelset.write(place.home, {"mood--engine": 1, "mood": 1})
    assert "the graph of mood, which is served" in place.refused("models", "unload", "mood--engine")


def test_a_graph_is_removed_with_its_model_only(place: Any) -> None:
    """It cannot be removed by itself; it goes when no version is left that needs it."""
    export_pair(place)
    shutil.copytree(place.repository / "mood" / "1", place.repository / "mood" / "2")
    path = place.repository / "mood" / "2" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": "2"}))
    assert "is the graph of mood" in place.refused("models", "remove", "mood--engine", "--yes")
    assert len(place.json("models", "remove", "mood", "--version", "2", "--yes")["paths"]) == 1
    assert len(place.json("models", "remove", "mood", "--yes")["paths"]) == 2
    assert list(place.repository.iterdir()) == []
