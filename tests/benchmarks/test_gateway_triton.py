"""perf_analyzer's runs: no prompt twice, so that no cache answers, and no result from streams that were not streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from benchmarks import gateway_triton
from benchmarks.gateway_systems import System

# Stands for perf_analyzer: notes what it is told to ask, and exports ten streams of as many responses as a file says.
_PERF = """#!/usr/bin/env python3
import json, pathlib, sys
option = lambda name: pathlib.Path(sys.argv[sys.argv.index(name) + 1])
here = pathlib.Path(__file__).parent
with (here / "asked").open("a") as asked:
    asked.writelines(row["text_input"][0] + chr(10) for row in json.loads(option("--input-data").read_text())["data"])
responses = int((here / "responses").read_text())
rows = [{"timestamp": n, "response_timestamps": [n + 1 + i for i in range(responses)]} for n in range(10)]
option("--profile-export-file").write_text(json.dumps({"experiments": [{"requests": rows}]}))
"""


@pytest.fixture
def perf_analyzer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "perf_analyzer"
    program.write_text(_PERF)
    program.chmod(0o755)
    (tmp_path / "responses").write_text("17")
    monkeypatch.setattr(gateway_triton, "PERF_ANALYZER", tmp_path)
    monkeypatch.setattr(gateway_triton, "PROMPTS", 50)
    return tmp_path


async def run(folder: Path) -> dict[str, Any]:
    async def verify() -> str | None:
        return None

    return await gateway_triton.perf(System("triton", 0, None, verify, extra={"grpc": 1}), folder, 1, 10, True, float)


async def test_no_prompt_is_asked_in_two_runs(perf_analyzer: Path) -> None:
    """Each run of streams, which starts at its first prompt, has prompts that no run before it had."""
    for _ in range(2):
        assert (await run(perf_analyzer))["events"] == 17
    asked = (perf_analyzer / "asked").read_text().splitlines()
    assert len({*asked}) == len(asked) == 100


async def test_streams_with_too_few_responses_are_no_result(perf_analyzer: Path) -> None:
    """A stream that came in one piece, as from a cache, fails its run; exactly as many as were asked for are enough."""
    (perf_analyzer / "responses").write_text("16")
    assert (await run(perf_analyzer))["requests"] == 8
    (perf_analyzer / "responses").write_text("15")
    with pytest.raises(click.ClickException, match="15 of 16 responses"):
        await run(perf_analyzer)


def test_one_short_stream_among_many_is_seen() -> None:
    """Every counted stream has to be whole; those of the warm-up, and requests that are no streams, need not be."""
    rows = [{"timestamp": n, "response_timestamps": list(range(n + 1, n + 17))} for n in range(10)]
    rows[0]["response_timestamps"] = [1]
    assert gateway_triton._kept(rows, True)["requests"] == 8
    rows[5]["response_timestamps"] = [6]
    assert gateway_triton._kept(rows, False)["requests"] == 8
    with pytest.raises(click.ClickException, match="1 of 16 responses"):
        gateway_triton._kept(rows, True)
