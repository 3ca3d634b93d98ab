"""Results as files, their comparison, and the report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator.bench import report, result
from orchestrator.bench.answers import Answer, BenchError, Fault
from orchestrator.bench.figures import Run
from orchestrator.bench.plan import Load, Target


def document(
    model: str = "m", clients: tuple[int, ...] = (1, 8), speed: float = 1.0, said: str = "no"
) -> dict[str, Any]:
    """A result whose requests took a second divided by `speed`."""
    runs = []
    for number in clients:
        run = Run(Load(concurrency=number, requests=2), seconds=2.0 / speed)
        for _ in range(2):
            answer = Answer(4)
            for moment in (0.5, 0.7, 1.0):
                answer.piece(moment / speed)
            answer.count(3, 10)
            run.took(answer, 0.0, 1.0 / speed)
        run.failed(Fault("in_band", said))
        runs.append(run.to_json())
    return result.document(Target("http://h", "openai", model), runs)


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    """A file has the document, nothing of a temporary one stays, and another one is replaced whole."""
    path = tmp_path / "a.json"
    path.write_text("old")
    result.write(path, json.dumps(document()))
    assert result.read(path) == document() | {"time": result.read(path)["time"]}
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"format": "other/1", "runs": []}', '{"format": "truthgpt-bench/1", "runs": []}',
     '{"format": "truthgpt-bench/1", "runs": [{"concurrency": "<b>"}], "target": {}}',
     '{"format": "truthgpt-bench/1", "runs": [{"concurrency": 1, "ttft_s": 3}], "target": {}}',
     '{"format": "truthgpt-bench/1", "runs": [{"concurrency": 1, "errors": NaN}], "target": {}}',
     '{"format": "truthgpt-bench/1", "runs": [{"concurrency": 1}]}'],
)  # fmt: skip
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    """Another file, a damaged one, and one with figures that are none: told with its name."""
    path = tmp_path / "b.json"
    path.write_text(text)
    with pytest.raises(BenchError, match=re.escape(str(path))):
        result.read(path)


def test_runs_at_the_same_place_are_compared() -> None:
    """Each place of the sweep that both have, by ratios after to before; what was not measured alike is told."""
    slow, fast = document(clients=(1, 8)), document(clients=(8, 16), speed=2.0)
    ((before, after),) = result.pairs(slow, fast)
    assert (before["concurrency"], after["concurrency"]) == (8, 8)
    assert result.ratio(result.figure(before, "output_tokens_per_s"), result.figure(after, "output_tokens_per_s")) == 2
    assert result.ratio(result.figure(before, "latency_s.p50"), result.figure(after, "latency_s.p50")) == 0.5
    assert result.ratio(None, 1.0) is None and result.ratio(0.0, 1.0) is None
    assert result.differences(slow, fast) == []
    assert any("model" in text for text in result.differences(slow, document("other")))
    with pytest.raises(BenchError, match="no run in common"):
        result.pairs(document(clients=(1,)), document(clients=(2,)))


def test_a_report_is_one_file_without_scripts() -> None:
    """It has the figures and the plots, loads nothing, and what a server or a file said is text in it."""
    pytest.importorskip("matplotlib")
    hostile = "<script>alert(1)</script>$\\frac{"
    for results in (
        [("a", document(hostile, said=hostile))],
        [(hostile, document(hostile)), ("b", document(speed=2.0))],
    ):
        text = report.html(results)
        assert "<svg" in text and "8 clients" in text
        assert "<script" not in text and "alert(1)" in text
        links = set(re.findall(r"(?:https?:)?//[^\s\"'<]+", text))
        assert links <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink", "//h", "http://h;", "http://h"}
    assert "2.000 ×" in text and "0.500 ×" in text
