"""The output of a batch: in order, whole, and resumed from whatever an earlier run has left of it."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.ops import batch
from orchestrator.ops.batchfile import BatchError, Line, Source, answered
from orchestrator.ops.batchjournal import Journal

from .batches import Echo, Row, do, line, rows, write


async def test_the_output_has_the_order_of_the_input(tmp_path: Path) -> None:
    """Every line has its answer at its place, in OpenAI's form, and nothing else stays in the folder."""
    names = [f"r{n}" for n in range(40)]
    file = write(tmp_path / "in", *map(line, names), b"{", b"")
    whole, tally = await do(file, tmp_path / "out", Echo(seed=1, concurrency=7))
    found = rows(tmp_path / "out")
    assert whole and [row["custom_id"] for row in found] == [*names, None]
    assert all(set(row) == {"id", "custom_id", "response", "error"} for row in found)
    assert found[0]["response"]["status_code"] == 200 and found[0]["error"] is None
    assert found[-1]["response"] is None and found[-1]["error"]["line"] == 41
    assert len({row["id"] for row in found}) == 41 and all(row["id"].startswith("batch_req_") for row in found)
    assert (tally.total, tally.succeeded, tally.failed, tally.skipped, tally.output_tokens) == (41, 40, 1, 0, 80)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@settings(max_examples=60)
@given(st.data())
def test_whatever_is_left_each_line_is_there_once(data: st.DataObject) -> None:
    """A partial file that is cut at any byte resumes to the same output: every line once, and only what lacks is
    asked.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "in", Path(folder) / "out"
        names = [f"r{n}" for n in range(data.draw(st.integers(0, 12), "lines"))]
        write(file, *map(line, names), b"{", line("r0"))
        stop, first = asyncio.Event(), Echo(seed=data.draw(st.integers(0, 99), "order"))
        partial = out.with_name("out.partial")

        async def begin() -> None:
            source = Source.open(file)
            journal = Journal.open(out, source, False, lambda row: None)
            await batch.run(source, journal, batch.Tally(source.lines), first, stop)
            journal.close()  # as kill -9: before it is finished

        asyncio.run(begin())
        content = partial.read_bytes()
        partial.write_bytes(content[: data.draw(st.integers(0, len(content)), "cut")])
        kept = max(0, partial.read_bytes().count(b"\n") - 1)
        second = Echo()
        whole, tally = asyncio.run(do(file, out, second))
        found = rows(out)
        expected = [*names, None, None if names else "r0"]
        assert whole and [row["custom_id"] for row in found] == expected
        assert tally.skipped == kept and tally.done == tally.total == len(expected)
        assert len(second.asked) <= len(expected) - kept and not partial.exists()
        assert tally.output_tokens == 2 * (len(names) or 1)


async def test_stopping_keeps_what_is_done(tmp_path: Path) -> None:
    """A stop ends the run at once, though an answer never comes, and the next run asks only what is not done."""
    file, stop = write(tmp_path / "in", *(line(f"r{n}") for n in range(9))), asyncio.Event()

    class Stuck(Echo):
        async def ask(self, line: Line, id: str) -> Row:
            if line.custom_id == "r4":
                stop.set()
                await asyncio.sleep(3600)
            return await super().ask(line, id)

    whole, tally = await do(file, tmp_path / "out", Stuck(concurrency=1), stop)
    assert (whole, tally.done) == (False, 4) and not (tmp_path / "out").exists()
    echo = Echo()
    whole, tally = await do(file, tmp_path / "out", echo)
    assert whole and tally.skipped == 4 and sorted(echo.asked) == ["r4", "r5", "r6", "r7", "r8"]


async def test_zeros_of_a_power_failure_are_cut_off(tmp_path: Path) -> None:
    """A block of zeros at the end of the partial file, as a file system can leave it, costs only those lines."""
    file, out = write(tmp_path / "in", line("a"), line("b")), tmp_path / "out"
    await do(file, out, Echo())
    source = Source.open(file)
    header = json.dumps({"truthgpt_batch": 1, "input": {"sha256": source.sha256, "bytes": source.size}}) + "\n"
    first = out.read_bytes().splitlines(keepends=True)[0]
    Path(f"{out}.partial").write_bytes(header.encode() + first + b"\0" * 500 + b"\n")
    out.unlink()
    echo = Echo()
    await do(file, out, echo)
    assert echo.asked == ["b"] and [row["custom_id"] for row in rows(out)] == ["a", "b"]


async def test_an_answer_of_any_letters_is_one_line(tmp_path: Path) -> None:
    """Half surrogates, line separators and newlines in an answer stay inside their line and come back unchanged."""
    text = "\ud83d \u2028 \n \x00 ñ"

    class Strange(Echo):
        async def ask(self, line: Line, id: str) -> Row:
            return answered(id, line.custom_id, 200, "", {"text": text})

    await do(write(tmp_path / "in", line("a")), tmp_path / "out", Strange())
    (row,) = [json.loads(each) for each in (tmp_path / "out").read_bytes().split(b"\n") if each]
    assert row["response"]["body"]["text"] == text


async def test_what_belongs_to_something_else_is_refused(tmp_path: Path) -> None:
    """An existing output, another input's partial file and a file that is no batch's are left as they are."""
    file, other, out = write(tmp_path / "in", line("a")), write(tmp_path / "in2", line("b")), tmp_path / "out"
    partial = tmp_path / "out.partial"
    out.write_text("mine")
    with pytest.raises(BatchError, match="exists already"):
        await do(file, out, Echo())
    with pytest.raises(BatchError, match="input itself"):
        await do(file, file, Echo(), overwrite=True)
    assert out.read_text() == "mine" and not partial.exists()
    assert (await do(file, out, Echo(), overwrite=True))[0] and rows(out)[0]["custom_id"] == "a"
    out.unlink()
    Journal.open(out, Source.open(file), False, lambda row: None).close()
    with pytest.raises(BatchError, match="begun with another input"):
        await do(other, out, Echo())
    partial.write_text("notes of mine\n")
    with pytest.raises(BatchError, match="not a batch's output"):
        await do(file, out, Echo())
    assert partial.read_text() == "notes of mine\n"


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    """While one batch has an output another cannot begin it; afterwards it can."""
    source = Source.open(write(tmp_path / "in", line("a")))
    first = Journal.open(tmp_path / "out", source, False, lambda row: None)
    with pytest.raises(BatchError, match="another process"):
        Journal.open(tmp_path / "out", source, False, lambda row: None)
    first.close()
    Journal.open(tmp_path / "out", source, False, lambda row: None).close()


def test_a_full_disk_costs_no_line(tmp_path: Path) -> None:
    """A line that could be written in part only is taken back, and the error says where what is done stays."""
    source = Source.open(write(tmp_path / "in", line("a"), line("b")))
    journal = Journal.open(tmp_path / "out", source, False, lambda row: None)
    row = answered(journal.id(1), "a", 200, "", {})
    journal.append(1, row)
    size = journal.partial.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
    try:
        with pytest.raises(BatchError, match="cannot be written"):
            journal.append(2, answered(journal.id(2), "b", 200, "", {"text": "x" * 100}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
        journal.close()
    assert journal.partial.stat().st_size == size and not journal.done(2)
