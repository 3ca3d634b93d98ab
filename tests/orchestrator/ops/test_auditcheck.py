"""Checking the chain: whatever is done to the files afterwards is found, and nothing else is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orchestrator.auditlog import CURRENT, HEAD, Mark, encode, folder_of
from orchestrator.auditwriter import AuditLog
from orchestrator.fingerprint import Fingerprint
from orchestrator.ops.auditcheck import Report, verify

PRINTS = Fingerprint(b"k" * 32)
LINES = 24


@pytest.fixture(scope="module")
def original() -> Iterator[Path]:
    """A log of 24 lines in several files."""
    with tempfile.TemporaryDirectory() as name:
        log = AuditLog(Path(name), PRINTS, 1000)
        for number in range(LINES):
            log.append([encode("generation", 1_800_000_000.0 + number, {"n": number, "model": "m"})])
        log.sync()
        log.close()
        yield folder_of(Path(name))


def check(files: dict[str, bytes], **wanted: object) -> Report:
    with tempfile.TemporaryDirectory() as name:
        for file, data in files.items():
            (Path(name) / file).write_bytes(data)
        return verify(Path(name), PRINTS, **wanted)  # type: ignore[arg-type]


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def split(files: dict[str, bytes]) -> dict[str, list[bytes]]:
    return {name: data.splitlines(keepends=True) for name, data in sorted(files.items()) if name != HEAD}


def test_the_original_is_good(original: Path) -> None:
    """What nobody has touched verifies, in several files, up to what `head` knows."""
    report = check(read(original))
    assert report.broken is None and report.files > 3
    assert (report.lines, report.first, report.last.seq, report.last) == (LINES, 1, LINES, report.head)


@settings(max_examples=150)
@given(data=st.data())
def test_any_changed_byte_is_found(original: Path, data: st.DataObject) -> None:
    """There is no byte in any file, `head` included, that can be another one."""
    files = read(original)
    name = data.draw(st.sampled_from(sorted(files)))
    at = data.draw(st.integers(0, len(files[name]) - 1))
    value = data.draw(st.integers(0, 255))
    assume(value != files[name][at])
    files[name] = files[name][:at] + bytes([value]) + files[name][at + 1 :]
    assert check(files).broken is not None


@settings(max_examples=150)
@given(data=st.data())
def test_any_line_removed_put_in_exchanged_or_moved_is_found(original: Path, data: st.DataObject) -> None:
    """Removing lines, repeating one, exchanging two, or removing a file breaks the chain, wherever it is done."""
    before = split(read(original))
    files = {name: list(lines) for name, lines in before.items()}
    places = [(name, index) for name, lines in files.items() for index in range(len(lines))]
    (one, i), (other, j) = data.draw(st.sampled_from(places)), data.draw(st.sampled_from(places))
    match data.draw(st.sampled_from(["remove", "remove many", "repeat", "exchange", "remove file"])):
        case "remove":
            del files[one][i]
        case "remove many":
            del files[one][i:]
        case "repeat":
            files[other].insert(j, files[one][i])
        case "exchange":
            files[one][i], files[other][j] = files[other][j], files[one][i]
        case "remove file":
            del files[one]
    assume(files != before)
    head = {HEAD: read(original)[HEAD]}
    assert check({**head, **{name: b"".join(lines) for name, lines in files.items()}}).broken is not None


@settings(max_examples=60)
@given(data=st.data())
def test_any_end_cut_off_is_found(original: Path, data: st.DataObject) -> None:
    """However much is cut off the end, in the middle of a line too, `head` knows that there was more."""
    files = read(original)
    files[CURRENT] = files[CURRENT][: data.draw(st.integers(0, len(files[CURRENT]) - 1))]
    report = check(files)
    assert report.broken is not None and "which head knows, are missing" in report.broken.why


def test_the_first_broken_place_is_named(original: Path) -> None:
    """The report says the file and the line in it, and counts what is good before it."""
    files = read(original)
    name = sorted(files)[2]
    lines = files[name].splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"model":"m"', b'"model":"n"')
    files[name] = b"".join(lines)
    report = check(files)
    assert report.broken is not None and report.broken.place.endswith(f"{name}:2")
    assert report.broken.why == "the line was changed, or written with another key"
    assert report.lines == report.last.seq == int(name.removeprefix("audit-").removesuffix(".jsonl"))


def test_without_the_key_everything_looks_changed(original: Path) -> None:
    """Another key finds the first line changed: nobody without the key can make a chain, or check one."""
    report = verify(original, Fingerprint(b"another"))
    assert report.broken is not None and report.lines == 0 and report.broken.line == 1


def test_a_mark_kept_elsewhere_finds_a_log_that_was_set_back(original: Path) -> None:
    """Files and `head` of an earlier day verify by themselves, but not against a later mark; nor does another chain."""
    with tempfile.TemporaryDirectory() as name:
        log = AuditLog(Path(name), PRINTS, 1 << 20)
        log.append([encode("generation", 1.8e9, {"n": number}) for number in range(3)])
        log.sync()
        early = read(folder_of(Path(name)))
        log.append([encode("generation", 1.8e9, {"n": 3})])
        log.sync()
        log.close()
        mark = verify(folder_of(Path(name)), PRINTS).last
    assert check(early).broken is None
    report = check(early, known=mark)
    assert report.broken is not None and "the mark that was given" in report.broken.why
    assert check(read(original), known=Mark(4, "0" * 32)).broken is not None
    assert check(read(original), known=check(read(original)).last).broken is None


def test_a_beginning_that_was_removed_on_purpose(original: Path) -> None:
    """Without its first file the log is broken, unless the line is named where it begins; lines before it may stay."""
    files = read(original)
    second = sorted(files)[1]
    first = int(second.removeprefix("audit-").removesuffix(".jsonl"))
    assert check(files, first=first + 1).lines == LINES - first
    del files[sorted(files)[0]]
    report = check(files)
    assert report.broken is not None and report.broken.why == f"the chain begins with line {first} instead of 1"
    report = check(files, first=first)
    assert report.broken is None and (report.first, report.lines) == (first, LINES - first + 1)
    assert check(files, first=first - 1).broken is not None


def test_a_missing_head_is_no_small_thing(original: Path) -> None:
    """Without `head` nobody can tell whether the end was cut off, and a writer that finds it gone says so for good."""
    files = read(original)
    del files[HEAD]
    report = check(files)
    assert report.broken is not None and report.broken.place.endswith(HEAD)
    with tempfile.TemporaryDirectory() as name:
        folder = folder_of(Path(name))
        folder.mkdir()
        for file, data in files.items():
            (folder / file).write_bytes(data)
        log = AuditLog(Path(name), PRINTS, 1 << 20)
        log.append([encode("generation", 1.8e9, {})])
        log.sync()
        log.close()
        report = verify(folder, PRINTS)
        assert report.broken is not None and "`head` was gone" in report.broken.why
        assert verify(folder, PRINTS, first=LINES + 1).broken is None
