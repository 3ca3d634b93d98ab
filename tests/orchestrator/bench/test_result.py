"""Result files: written whole, read with suspicion, compared."""

from __future__ import annotations

import copy
import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.bench import result
from orchestrator.bench.answers import Answer, BenchError, Fault
from orchestrator.bench.figures import Run
from orchestrator.bench.result import COMPARED, differences, document, figure, pairs, place, ratio, read, write

from .servers import chats, load


def found(*clients: int, scale: float = 1.0, model: str = "demo", errors: int = 0) -> dict[str, Any]:
    """The document of a sweep, as --json prints it; every time is so many times as long."""
    runs = []
    for number in clients or (1, 8):
        run = Run(load(concurrency=number, requests=2))
        for at in range(2):
            answer = Answer(8)
            for now in (0.1 * scale, 0.2 * scale, 0.35 * scale):
                answer.piece(now)
            answer.count(3, 4)
            answer.finish((0.4 + at / 10) * scale, streams=True)
            run.took(answer, due=0.0)
        for _ in range(errors):
            run.failed(Fault("http_503", "<script>alert(1)</script> & busy"))
        run.seconds, run.cpu_s = 1.0 * scale, 0.1
        runs.append(run.to_json())
    target = chats("http://127.0.0.1:8080", api_key="secret-key-1")
    return dict(json.loads(json.dumps(document(replace(target, model=model), runs))))


def saved(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_a_document_has_what_was_promised() -> None:
    """The keys that others rely on, the load, the machine, and no key."""
    told = found()
    assert told["format"] == result.FORMAT and told["client"]["cores"] and told["time"].endswith("+00:00")
    for run in told["runs"]:
        assert {"concurrency", "output_tokens_per_s", "requests_per_s", "errors"} <= run.keys()
        for name in ("ttft_s", "itl_s", "latency_s"):
            assert {"p50", "p90", "p99"} <= run[name].keys()
        assert run["load"]["output_tokens"] == 8
    assert "secret" not in json.dumps(told)
    assert all(figure(told["runs"][0], name) is not None for name in COMPARED if name != "goodput_per_s")


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    """A file of before is replaced whole, with ordinary rights; a link stays a link."""
    path, link = tmp_path / "a.json", tmp_path / "link.json"
    link.symlink_to("a.json")
    path.write_text("old")
    write(link, json.dumps(found()))
    assert read(path) == read(link) and link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o644
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.json", "link.json"]


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither a half file nor a temporary one."""
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write(tmp_path / "taken", "text")
    with pytest.raises(UnicodeEncodeError):
        write(tmp_path / "a.json", "\ud800")
    assert [one.name for one in tmp_path.iterdir()] == ["taken"]


def changed(**more: Any) -> dict[str, Any]:
    """A good document with one thing wrong in its first run."""
    wrong = copy.deepcopy(found())
    wrong["runs"][0].update(more)
    return wrong


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "not JSON"), ("{", "not JSON"), ("[" * 100_000, "not JSON"), ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        ("[]", "no result"), ({}, "no result"), ({"runs": []}, "no result"),
        ({"format": "truthgpt-bench/2", "runs": []}, "no result"), ({"format": result.FORMAT}, "without figures"),
        ({"format": result.FORMAT, "runs": []}, "without figures"), ({**found(), "target": [1]}, "what was measured"),
        ({**found(), "client": "x"}, "what was measured"), ({**found(), "runs": [3]}, "without figures"),
        (changed(concurrency=None), "without figures"), (changed(rate=3), "without figures"),
        (changed(concurrency="8"), "without figures"), (changed(concurrency=0), "without figures"),
        (changed(errors="none"), "without figures"), (changed(requests_per_s=True), "without figures"),
        (changed(requests_per_s=10**400), "without figures"), (changed(requests_per_s=-1), "without figures"),
        (changed(ttft_s=[1]), "without figures"), (changed(ttft_s={"p50": "x"}), "without figures"),
        (changed(latency_s={"p90": "x"}), "without figures"), (changed(load=[1]), "without figures"),
        (changed(error_kinds=["a"]), "without figures"), (changed(latency_s={"p50": float("nan")}), "without figures"),
        (changed(latency_s={"p50": float("inf")}), "without figures"),
    ],
)  # fmt: skip
def test_what_is_no_result_is_refused_with_the_reason(tmp_path: Path, value: object, said: str) -> None:
    """Damaged, foreign, from another version, with values that are none: nothing of it is compared."""
    with pytest.raises(BenchError, match=said) as caught:
        read(saved(tmp_path / "odd.json", value))
    assert "odd.json" in str(caught.value) and "--output" in caught.value.hint


def test_a_file_without_end_is_not_read_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device, a folder, bytes that are no text."""
    monkeypatch.setattr(result, "MAX_BYTES", 10_000)
    with pytest.raises(BenchError, match="larger"):
        read(Path("/dev/zero"))
    with pytest.raises(OSError):
        read(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BenchError, match="not JSON"):
        read(tmp_path / "bytes")


def test_runs_are_paired_by_their_place_in_the_sweep() -> None:
    """Those that only one of them has are left out; none in common is an error that names both."""
    one, other = found(1, 8, 16), found(8, 1)
    assert [(place(a), place(b)) for a, b in pairs(one, other)] == [
        ("1 client", "1 client"),
        ("8 clients", "8 clients"),
    ]
    with pytest.raises(BenchError, match="1 client; 8 clients"):
        pairs(found(1), found(8))
    assert place({"concurrency": None, "rate": 2.5}) == "2.5 requests/s"


def test_a_ratio_needs_two_figures() -> None:
    """After to before; of nothing there is none."""
    assert ratio(2.0, 3.0) == 1.5 and ratio(None, 1.0) is None and ratio(1.0, None) is None and ratio(0.0, 1.0) is None


def test_what_differs_is_said() -> None:
    """Parameters, target and machine, on one line each whatever the file holds; the sweep itself is no difference."""
    one, other = found(1, 8), found(1, 8)
    assert differences(one, other) == []
    other["runs"][0]["load"]["prompt_tokens"] = 99
    other["target"]["model"] = "other\n\x1b[31m"
    other["client"]["cores"] = {"a": [1]}
    told = differences(one, other)
    assert len(told) == 3 and told[0] == "prompt_tokens: 4 and 99"
    assert all(line.isprintable() for line in told)
    del other["client"], other["runs"][0]["load"]
    assert differences(one, other)
