"""`truthgpt models`: disk and running server in one table; removal that never takes what is served."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from orchestrator.local import state
from tests.orchestrator.gateway import write_state


def states(place: Any) -> dict[tuple[str, str], str]:
    return {(row["name"], row["version"]): row["state"] for row in place.json("models", "list")}


def test_list_has_the_promised_keys(place: Any) -> None:
    """One row a version, newest first, with the manifest's task and precision."""
    place.export("demo", versions=2)
    place.export("other")
    rows = place.json("models", "list")
    assert rows[0] == {
        "name": "demo", "version": "2", "task": "text_generation", "precision": "fp32", "target": "onnx",
        "graph_only": False, "state": "NOT_LOADED",
    }  # fmt: skip
    assert [(row["name"], row["version"]) for row in rows] == [("demo", "2"), ("demo", "1"), ("other", "1")]
    shown = place.run("models", "list").stdout
    assert "NOT_LOADED" in shown and len(shown.splitlines()) == 4


def test_list_shows_what_is_served(place: Any, gateway: Any) -> None:
    """READY and UNAVAILABLE are the running stack's word for the version that it serves, the rest is on disk only."""
    place.export("demo", versions=2)
    assert states(place) == {("demo", "2"): "NOT_LOADED", ("demo", "1"): "READY"}
    gateway.row["ready"] = False
    assert states(place)[("demo", "1")] == "UNAVAILABLE"


def test_list_of_nothing(place: Any) -> None:
    """An empty or missing repository is an empty list, with a word to people on standard error."""
    assert place.json("models", "list") == []
    result = place.run("models", "list")
    assert (result.exit_code, result.stdout) == (0, "") and "truthgpt export" in result.stderr


def test_a_broken_manifest_is_listed_as_invalid(place: Any) -> None:
    """INVALID, with null for what cannot be known."""
    (place.export() / "1" / "manifest.json").write_text("{")
    row = place.json("models", "list")[0]
    assert (row["state"], row["task"], row["precision"]) == ("INVALID", None, None)
    assert place.run("models", "list").exit_code == 0
    assert "manifest.json cannot be read" in place.refused("models", "show", "demo")


def test_show_explains_manifest_and_batching(place: Any) -> None:
    """People read sentences; --json has the manifest and the parameters of config.pbtxt as they are."""
    place.export()
    shown = place.run("models", "show", "demo").stdout
    assert (
        "demo version 1" in shown
        and "4 sequences at once, 256 more may wait" in shown
        and "max_queue 256: requests that wait for a slot" in shown
        and "chat and completions" in shown
    )
    document = place.json("models", "show", "demo", "--version", "1")
    assert document["manifest"]["graph"]["max_len"] == 4096 and document["parameters"]["slots"] == "4"
    assert {"slots", "prefill_chunk", "max_queue", "threads"} <= {setting["name"] for setting in document["batching"]}
    assert all(set(setting) == {"name", "value", "words"} for setting in document["batching"])
    assert "no version 9" in place.refused("models", "show", "demo", "--version", "9")
    assert "hint: it has demo" in place.refused("models", "show", "nope")


def write_manifest(place: Any, name: str, **changes: Any) -> None:
    path = place.repository / name / "1" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


ENCODER = {"graph": {"width": 384}, "limits": {"max_len": 256}, "parity": {"max_abs_diff": 2e-7, "batch_effect": 1e-7}}
SHOWN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "embeddings": (
        {**ENCODER, "embedding": {"pooling": ["mean"], "head": ["normalize"], "normalized": True}},
        ["asked at /v1/embeddings", "384 numbers, of length 1 (mean pooling, normalize)", "256 tokens, a text",
         "numbers differ from transformers' by at most 2.0e-07", "up to 16384 tokens a run"],
    ),
    "classes": (
        {**ENCODER, "classes": {"labels": ["malo", "bueno"], "problem": "multi_label"}},
        ["asked at /v1/classify", "malo, bueno (each by itself)"],
    ),
    "front": (
        {"served_by": {"name": "demo--engine", "version": 3, "manifest_sha256": "0" * 64}},
        ["demo--engine version 3, run by Triton itself"],
    ),
    "graph": ({"graph_only": True}, ["asked by another entry only", "for the entry in front"]),
    "fp16": ({"precision": "fp16", "fp32_layers": [3, 11]}, ["2 layers stay fp32: 3, 11"]),
    "int4": (
        {"precision": "int4", "quantization": {"bits": 4, "calibration": {"tokens": 9}, "allowed_drift": 0.3}},
        ["weights of 4 bits, calibrated by a text; published up to a drift of 30%"],
    ),
    "tensorrt": (
        {"target": "tensorrt", "parity": {"of": "the graph in fp32; the engine has not been run", "batch_effect": 0.0}},
        ["tensorrt, its engine is built by the first load", "of the graph in fp32; the engine has not been run, what"],
    ),
    "engine": (
        {"target": "tensorrt", "engine": {"gpu": "NVIDIA L4", "compute_capability": "8.9", "tensorrt": "10.13.3"}},
        ["tensorrt, engine for NVIDIA L4 (compute capability 8.9) made by tensorrt 10.13.3"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SHOWN)
def test_show_says_what_an_entry_is_for(place: Any, kind: str) -> None:
    """What an encoder makes, whose graph is whose, what a precision hides, and which GPU an engine is for."""
    place.export()
    changes, told = SHOWN[kind]
    write_manifest(place, "demo", **changes)
    shown = place.run("models", "show", "demo").stdout
    assert [text for text in told if text not in shown] == [], shown


def test_list_tells_graphs_and_engines_apart(place: Any) -> None:
    """A graph that another entry is in front of is no model of its own, and an entry for TensorRT says so."""
    place.export("fast")
    place.export("mood--engine")
    write_manifest(place, "fast", target="tensorrt")
    write_manifest(place, "mood--engine", graph_only=True)
    facts = [(row["name"], row["target"], row["graph_only"]) for row in place.json("models", "list")]
    assert facts == [("fast", "tensorrt", False), ("mood--engine", "onnx", True)]
    assert "graph only" in place.run("models", "list").stdout


@pytest.mark.parametrize("name", ["../demo", ".staging", "demo/1", "", "."])
def test_a_name_that_leads_elsewhere_is_no_model(place: Any, name: str) -> None:
    """Only names of the repository's own entries are taken, never paths."""
    place.export()
    assert "there is no model" in place.refused("models", "remove", "--yes", "--", name)
    assert states(place) == {("demo", "1"): "NOT_LOADED"}


def test_remove_with_yes(place: Any) -> None:
    """--yes removes a version or the whole model and says which."""
    place.export(versions=3)
    assert place.json("models", "remove", "demo", "--version", "2", "--yes")["versions"] == ["2"]
    assert set(states(place)) == {("demo", "3"), ("demo", "1")}
    assert place.run("models", "remove", "demo", "--yes").stdout == "removed demo (version 3, version 1)\n"
    assert list(place.repository.iterdir()) == []


@pytest.mark.parametrize(("answer", "code", "left"), [("y\n", 0, 0), ("n\n", 1, 1), ("\n", 1, 1), ("", 1, 1)])
def test_remove_asks_first(place: Any, answer: str, code: int, left: int) -> None:
    """Without --yes somebody has to agree; no answer means no."""
    place.export()
    result = place.run("models", "remove", "demo", input=answer)
    assert result.exit_code == code and len(states(place)) == left
    assert ("hint: " in result.stderr) == bool(code)


def test_remove_refuses_what_is_served(place: Any, gateway: Any) -> None:
    """The served version stays, ready or not, gateway answering or not; an older version may go."""
    place.export(versions=2)
    gateway.row["version"] = "2"
    for version in ((), ("--version", "2")):
        assert "is served" in place.refused("models", "remove", "demo", *version, "--yes")
    place.run("models", "remove", "demo", "--version", "1", "--yes")
    write_state(place.home, "http://127.0.0.1:1")  # the supervisor runs, its gateway does not
    assert "is served" in place.refused("models", "remove", "demo", "--yes")
    assert set(states(place)) == {("demo", "2")}
    state.clear(place.home)
    assert place.run("models", "remove", "demo", "--yes").exit_code == 0


def test_remove_refuses_what_another_home_serves(place: Any) -> None:
    """A Triton of any home that was told to load the model keeps it."""
    place.export()
    argv = [f"--model-repository={place.repository.resolve()}", "--load-model=demo"]
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *argv]) as server:
        assert "is served by a Triton server" in place.refused("models", "remove", "demo", "--yes")
        server.kill()
    assert place.run("models", "remove", "demo", "--yes").exit_code == 0
