"""Archives that somebody made to do harm: each is refused before anything is touched."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.ops import backup
from orchestrator.ops.backup import collecting, reading, sealing, writing
from orchestrator.ops.backup.tarform import (
    END,
    FOOTER_BYTES,
    MANIFEST,
    MANIFEST_BYTES,
    Manifest,
    Member,
    footer,
    header,
    padding,
    parse,
)
from orchestrator.settings import Settings
from tests.clock import awake
from tests.orchestrator.ops.deployments import ID, archive, deployment, files, sealed

HOME, MODELS = Member("home", 0, 0o700, 0), Member("models", 0, 0o755, 0)
ALERTS = Member("home/alerts.json", 2, 0o600, 0, "")
GOOD = [(HOME, b""), (ALERTS, b"{}"), (MODELS, b"")]


def refused(tmp_path: Path, data: bytes, match: str) -> None:
    """Verify and restore refuse it, quickly; nothing is made, nothing is left."""
    path = tmp_path / "bad.tar"
    path.write_bytes(data)
    settings = Settings.load({"home": tmp_path / "home", "model_repository": tmp_path / "r"}, {"TRUTHGPT_CONFIG": ""})
    began = awake()
    with pytest.raises(backup.Damaged, match=match):
        backup.verify(path, None)
    with pytest.raises(backup.Damaged, match=match):
        backup.restore(settings, path, lambda *_: True)
    assert awake() - began < 5
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.tar"]


def test_the_archives_of_these_tests_are_good_but_for_what_is_bad_in_them(tmp_path: Path) -> None:
    """The same archive without a fault is taken."""
    (tmp_path / "good.tar").write_bytes(archive(GOOD))
    assert backup.verify(tmp_path / "good.tar", None).manifest.files == 1


@pytest.mark.parametrize(
    "name",
    ["home/../../x", "home/audit/../../../x", "/etc/x", "home//alerts.json", "home/./alerts.json", "..", "x", "home/",
     "home/alerts.json/..", "home/audit\n", "home/audit\x1b[2J", "home/audit\u202e", "elsewhere/x"],
)  # fmt: skip
@pytest.mark.parametrize("folder", [False, True])
def test_names_that_lead_elsewhere(tmp_path: Path, name: str, folder: bool) -> None:
    """`..`, absolute names, empty parts, unknown trees and characters that move a terminal's cursor are refused."""
    member = Member(name, 0, 0o700, 0, None if folder else "")
    refused(tmp_path, archive([(HOME, b""), (member, b"")]), "leads out|cannot be shown|no plain file|in it twice")


@pytest.mark.parametrize(
    "name", ["home/lock", "home/backups", "home/logs", "models/.staging", "redis/dump.rdb", "settings/x"]
)
def test_names_that_no_backup_has(tmp_path: Path, name: str) -> None:
    """What a backup does not collect is not put into a home either."""
    tree = Member(name.partition("/")[0], 0, 0o700, 0)
    refused(tmp_path, archive([(tree, b""), (Member(name, 0, 0o600, 0, ""), b"")]), "nothing that a backup has")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
                                  tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME,
                                  tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, b"\0", b"7"])  # fmt: skip
def test_links_devices_and_other_kinds(tmp_path: Path, kind: bytes) -> None:
    """Only plain files and folders are taken: no links, devices, FIFOs, sparse files and long names of other forms."""
    info = tarfile.TarInfo("home/alerts.json")
    info.type, info.linkname, info.mode = kind, "/etc/passwd", 0o600
    block = info.tobuf(tarfile.GNU_FORMAT)[:512]
    refused(tmp_path, sealed(header(HOME) + block + END), "no plain file")
    block = info.tobuf(tarfile.USTAR_FORMAT)[:512]
    refused(tmp_path, sealed(header(HOME) + block + END), "no plain file")


def test_a_link_disguised_as_a_file(tmp_path: Path) -> None:
    """A plain file's header with a link's target, an owner, or a wrong sum is not one of ours."""
    block = bytearray(header(ALERTS))
    for at in (160, 265, 108, 150, 329, 505):
        bad = bytes(block[:at]) + b"7" + bytes(block[at + 1 :])
        refused(tmp_path, sealed(header(HOME) + bad + b"{}" + bytes(510) + END), "no plain file")
    setuid = header(replace(ALERTS, mode=0o4755))
    refused(tmp_path, sealed(header(HOME) + setuid + b"{}" + bytes(510) + END), "no plain file")


def test_a_name_twice(tmp_path: Path) -> None:
    """Two members of one name, or a file that is a folder as well, are refused."""
    refused(tmp_path, archive([*GOOD, (ALERTS, b"[]")]), "in it twice")
    refused(tmp_path, archive([*GOOD, (HOME, b"")]), "in it twice")
    refused(tmp_path, archive([*GOOD, (Member("home/alerts.json", 0, 0o700, 0), b"")]), "in it twice")
    inside = Member("models/a/x", 0, 0o600, 0, "")
    refused(tmp_path, archive([*GOOD, (Member("models/a", 0, 0o600, 0, ""), b""), (inside, b"")]), "in no folder")
    refused(tmp_path, archive([(ALERTS, b"{}")]), "in no folder")


def test_ten_gigabytes_of_zeros(tmp_path: Path) -> None:
    """A header that claims 10 GB, and a sparse file of 10 GB, are refused without reading or writing them."""
    huge = Member("models/zeros", 10 << 30, 0o600, 0, "")
    refused(tmp_path, sealed(header(MODELS) + header(huge) + END), "more bytes than the whole file")
    path = tmp_path / "bad.tar"
    with path.open("wb") as file:
        file.write(header(MODELS) + header(huge))
        file.truncate((10 << 30) + 4096)
    began = awake()
    with pytest.raises(backup.Damaged, match="end is missing"):
        backup.verify(path, None)
    assert awake() - began < 2
    path.unlink()


def test_a_backup_larger_than_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be right and finds no room is refused before the first byte is written."""
    import shutil

    path = tmp_path / "good.tar"
    path.write_bytes(archive(GOOD))
    settings = Settings.load({"home": tmp_path / "home", "model_repository": tmp_path / "r"}, {"TRUTHGPT_CONFIG": ""})
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: real(folder)._replace(free=1000))
    with pytest.raises(backup.BackupError, match="are free"):
        backup.restore(settings, path, lambda *_: True)
    assert files(tmp_path) == {"good.tar": path.read_bytes()}


def manifest(**changes: object) -> Manifest:
    sha256 = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # of {}
    members = [HOME, replace(ALERTS, sha256=sha256), MODELS]
    return replace(Manifest(ID, 1.8e9, "0", {"home": "", "models": ""}, {}, members), **changes)  # type: ignore[arg-type]


def test_a_manifest_that_lies(tmp_path: Path) -> None:
    """A file more or less, another order, size, mode or hash than the archive has, and what is no manifest at all."""
    assert archive(GOOD, manifest()) == archive(GOOD)
    rows = manifest().members
    for members in (
        rows[:2], [*rows, Member("models/x", 0, 0o700, 0)], [rows[1], rows[0], rows[2]], [rows[0], rows[0], rows[1]],
        [rows[0], replace(rows[1], sha256="0" * 64), rows[2]], [rows[0], replace(rows[1], bytes=3), rows[2]],
        [rows[0], replace(rows[1], mode=0o644), rows[2]], [],
    ):  # fmt: skip
        refused(tmp_path, archive(GOOD, manifest(members=members)), "says something else")
    for origins in ({}, {"home": ""}, {"home": "", "models": "", "redis": ""}, {"home": "", "models": "", "x": ""}):
        refused(tmp_path, archive(GOOD, manifest(origins=origins)), "says something else")
    refused(tmp_path, archive([*GOOD, (Member("redis", 0, 0o700, 0), b"")]), "says something else")
    for changes in ({"id": "../x"}, {"created": float("nan")}, {"version": "\x1b[2J"}, {"origins": {"home": "\n"}}):
        refused(tmp_path, archive(GOOD, manifest(**changes)), "manifest cannot be read")
    start = b"".join(header(member) + data + padding(len(data)) for member, data in GOOD)
    listed = manifest().encode().partition(b',"members":')[2]
    for text in (
        b"", b"[]", b"{", b"[" * 100_000, b"\xff", *(before + b',"members":' + listed for before in (
            b"", b"[]", b"{", b'{"format":1', b"[" * 100_000, b"\xff", b'{"format":1,"id":[],"members":[]',
            manifest().encode().partition(b',"members":')[0] + b',"more":1',
        )),
    ):  # fmt: skip
        data = header(Member(MANIFEST, len(text), 0o600, 0, "")) + text + padding(len(text))
        refused(tmp_path, sealed(start + data + END), "manifest cannot be read")
    refused(tmp_path, sealed(start + END), "no plain file")


def test_counts_and_sources_cannot_move_the_cursor(tmp_path: Path) -> None:
    """Of Redis a manifest has whole numbers and a word that can be shown: escapes and other kinds are refused."""
    for redis in (
        {"source": "\x1b[2J"}, {"source": 1}, {"source": ["a"]}, {"source": "given", "keys": "\x1b[2J"},
        {"source": "given", "keys": 1.5}, {"source": "given", "keys": True}, {"source": "given", "keys": -1},
        {"source": "given", "limits": None}, {"source": "given", "\x1b": 1}, {"source": "given", "keys": {"a": 1}},
    ):  # fmt: skip
        refused(tmp_path, archive(GOOD, manifest(redis=redis)), "manifest cannot be read")
    for changes in ({"origins": {"home": "\x1b[2J", "models": ""}}, {"version": 1}, {"created": "1"}):
        refused(tmp_path, archive(GOOD, manifest(**changes)), "manifest cannot be read")


def test_a_backup_of_a_newer_version(tmp_path: Path) -> None:
    """Another form of the end or of the manifest is no damage: the hint is to upgrade; also where it is encrypted."""
    good = archive(GOOD)
    body = good[:-FOOTER_BYTES]
    texts = [body + end for end in (good[-FOOTER_BYTES:].replace(b"backup 1", b"backup 2"),
                                    b"truthgpt-backup 12 sha512 " + b"0" * 128 + b"\n")]  # fmt: skip
    start = b"".join(header(member) + data + padding(len(data)) for member, data in GOOD)
    for text in (b'{"format":2,"what":[]}', b'{"format": 17}'):
        data = header(Member(MANIFEST, len(text), 0o600, 0, "")) + text + padding(len(text))
        texts.append(sealed(start + data + END))
    key = backup.new_key()[0]
    for text in texts:
        encrypted = io.BytesIO()
        with sealing.encrypted(encrypted.write, key) as write:
            write(text)
        for data in (text, encrypted.getvalue()):
            if data is not text and b"sha512" in text:
                continue  # of an encrypted one the end is found by its length
            (tmp_path / "new.tar").write_bytes(data)
            with pytest.raises(backup.Newer, match="made by a newer version") as failed:
                backup.verify(tmp_path / "new.tar", key)
            assert "upgrade" in failed.value.hint and not isinstance(failed.value, backup.Damaged)


@pytest.mark.parametrize("unit", ["[],", '"",', "{},", "0,", '{"name":"","mode":0,"mtime":0},'])
def test_a_manifest_that_takes_memory(tmp_path: Path, unit: str) -> None:
    """32 MiB of empty lists, texts, numbers and members are refused without being taken apart."""
    inside = unit * ((MANIFEST_BYTES - 4096) // len(unit))
    head = manifest().encode().partition(b',"members":')
    texts = [head[0] + b',"members":[' + inside.encode()[:-1] + b"]}",
             b'{"format":1,"id":[' + inside.encode()[:-1] + b"]" + head[1] + head[2]]  # fmt: skip
    start = b"".join(header(member) + data + padding(len(data)) for member, data in GOOD)
    for text in texts:
        data = header(Member(MANIFEST, len(text), 0o600, 0, "")) + text + padding(len(text))
        (tmp_path / "bad.tar").write_bytes(sealed(start + data + END))
        script = (
            "import sys, resource\nfrom pathlib import Path\nfrom orchestrator.ops import backup\n"
            "try:\n    backup.verify(Path(sys.argv[1]), None)\nexcept backup.Damaged as error:\n"
            "    print(error, file=sys.stderr)\n"
            "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        argv = [sys.executable, "-c", script, str(tmp_path / "bad.tar")]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        assert "manifest cannot be read" in done.stderr and int(done.stdout) < 280_000, done.stderr  # KiB


def test_more_members_than_a_backup_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same number is the most for who writes and who reads; the repository is not walked beyond it."""
    settings = deployment(tmp_path)
    made = backup.create(settings)
    members = len(backup.verify(made.path, None).manifest.members)
    for most in (members, members - 1):
        for module in (reading, writing, collecting):
            monkeypatch.setattr(module, "MOST_MEMBERS", most)
        if most == members:
            assert backup.create(settings).files == made.files and backup.verify(made.path, None)
            continue
        with pytest.raises(backup.BackupError, match=f"more than {most}|more than "):
            backup.create(settings)
        with pytest.raises(backup.Damaged, match=f"more than {most}"):
            backup.verify(made.path, None)
    looked: list[str] = []
    real = collecting._walk

    def walk(path: Path, *rest: object) -> object:
        looked.append(str(path))
        return real(path, *rest)  # type: ignore[arg-type]

    for number in range(100):
        (settings.model_repository / f"m{number:03d}").mkdir()
    monkeypatch.setattr(collecting, "MOST_MEMBERS", 10)
    monkeypatch.setattr(collecting, "_walk", walk)
    with pytest.raises(backup.BackupError, match="more than"):
        backup.create(settings)
    assert len(looked) < 20


def test_what_follows_the_manifest(tmp_path: Path) -> None:
    """A member, data or zeros behind the manifest are refused, and so is a footer for something else."""
    refused(tmp_path, archive(GOOD, tail=header(HOME)), "behind its end|checksum|end is missing|was changed")
    refused(tmp_path, archive(GOOD, tail=bytes(512)), "behind its end|checksum|end is missing|was changed")
    good = archive(GOOD)
    body = good[: -len(footer(0, "0" * 64))]
    refused(tmp_path, body + footer(len(body), "0" * 64), "checksum")
    refused(tmp_path, body + footer(len(body) + 1, "0" * 64), "bytes instead of")
    refused(tmp_path, good.replace(b"{}" + bytes(510), b"{}" + bytes(509) + b"x", 1), "between its members")


@given(st.binary(max_size=3000))
def test_garbage(data: bytes) -> None:
    """Whatever bytes a file has, with or without a footer that fits, reading ends in Damaged or a right report."""
    for text in (data, sealed(data), sealed(header(HOME) + data)):
        file = io.BytesIO(text)
        reader = reading._Reader(file, len(text), reading.Nowhere(), lambda done, total: None)
        with pytest.raises(backup.Damaged):
            reader.all()


@given(
    st.lists(st.text(st.characters(categories=["L", "N", "P"], exclude_characters="/"), min_size=1, max_size=40),
             min_size=1, max_size=6),
    st.integers(0, (1 << 63) - 1), st.integers(0, 0o777), st.integers(0, (1 << 33) - 1), st.booleans(),
)  # fmt: skip
def test_headers_round_trip(parts: list[str], size: int, mode: int, mtime: int, folder: bool) -> None:
    """Any name that fits, size, mode and time come back from a header, and Python's tarfile reads the same."""
    member = Member("/".join(("models", *parts)), 0 if folder else size, mode, mtime, None if folder else "")
    try:
        block = header(member)
    except backup.BackupError as error:
        assert "too long" in str(error) and len(os.fsencode(member.name)) > 100
        return
    if not {".", ".."} & set(parts):
        assert parse(block) == member
    read = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    assert (read.name, read.size, read.mode, read.mtime, read.isdir()) == (
        member.name, member.bytes, mode, mtime, folder,
    )  # fmt: skip


def test_a_folder_and_a_fifo_are_no_backup(tmp_path: Path) -> None:
    """A path that is no file is refused at once; a FIFO is not waited for."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        with pytest.raises((backup.Damaged, IsADirectoryError)):
            backup.verify(path, None)
