"""The form of a backup: a tar archive (POSIX ustar) whose every byte is determined, and one line after it.

    header, data, zeros up to 512 bytes     each folder and file, folders before what is in them
    MANIFEST.json                           the last member: what the archive is and has, see `Manifest`
    1024 zeros                              the end of the archive
    truthgpt-backup 1 <bytes> <sha256>\\n    of all that is before this line

Only regular files and folders; owners are left out, sizes from 8 GiB on are written as GNU tar writes them. A reader
makes each header anew from what it says and compares: whatever else a header can say, links, devices, sparse files,
long names of other forms, is no backup.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator.ops.backup.errors import BackupError, Damaged

BLOCK = 512
FORMAT = 1
MANIFEST = "MANIFEST.json"
MANIFEST_BYTES = 64 << 20  # that it has at most
MOST_MEMBERS = 200_000
END = bytes(2 * BLOCK)
TREES = ("settings", "redis", "home", "models")

_OCTAL_SIZE = 1 << 33
_ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")
_FOOTER = re.compile(rb"truthgpt-backup 1 (\d{20}) ([0-9a-f]{64})\n")


@dataclass(frozen=True)
class Member:
    """A folder (`sha256` is None) or file. `mode` are permission bits, `mtime` is Unix time in whole seconds."""

    name: str
    bytes: int
    mode: int
    mtime: int
    sha256: str | None = None

    @property
    def folder(self) -> bool:
        return self.sha256 is None


@dataclass
class Manifest:
    """What an archive is: `created` is Unix time in seconds, `version` TruthGPT's, `origins` where each tree was.

    `redis` has the source of the export (running, given, stopped or none), and how many keys, limits and entries.
    """

    id: str
    created: float
    version: str
    origins: dict[str, str] = field(default_factory=dict)
    redis: dict[str, Any] = field(default_factory=dict)
    members: list[Member] = field(default_factory=list)

    @property
    def files(self) -> int:
        return sum(not member.folder for member in self.members)

    @property
    def data_bytes(self) -> int:
        return sum(member.bytes for member in self.members)

    def encode(self) -> bytes:
        document = {"format": FORMAT, **asdict(self)}
        document["members"] = [_row(member) for member in self.members]
        return json.dumps(document, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Raises Damaged."""
        try:
            found = json.loads(data)
            if found["format"] != FORMAT:
                raise Damaged(f"its format is {ascii(found['format'])[:40]}, and this version knows only {FORMAT}")
            members = [
                Member(str(row["name"]), int(row.get("bytes", 0)), int(row["mode"]), int(row["mtime"]),
                       row.get("sha256"))
                for row in found["members"]
            ]  # fmt: skip
            made = cls(str(found["id"]), float(found["created"]), str(found["version"]), dict(found["origins"]),
                       dict(found["redis"]), members)  # fmt: skip
            texts = (made.version, *made.origins, *made.origins.values(), str(made.redis))
            if _ID.fullmatch(made.id) is None or not 0 <= made.created < 1e11 or not all(map(str.isprintable, texts)):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise Damaged("its manifest cannot be read") from error
        return made


def _row(member: Member) -> dict[str, Any]:
    row = asdict(member)
    return {name: row[name] for name in ("name", "mode", "mtime")} if member.folder else row


def header(member: Member) -> bytes:
    """The 512 bytes in front of a member's data. Raises BackupError for a name that does not fit."""
    name, prefix = _split(member.name + "/" * member.folder)
    if member.bytes < _OCTAL_SIZE:
        size = b"%011o\0" % member.bytes
    else:
        size = b"\x80" + member.bytes.to_bytes(11, "big")
    fields = (
        name.ljust(100, b"\0"), b"%07o\0" % member.mode, b"0000000\0", b"0000000\0", size, b"%011o\0" % member.mtime,
        b" " * 8, b"5" if member.folder else b"0", bytes(100), b"ustar\x0000", bytes(32), bytes(32), b"0000000\0",
        b"0000000\0", prefix.ljust(155, b"\0"), bytes(12),
    )  # fmt: skip
    block = b"".join(fields)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def parse(block: bytes) -> Member:
    """What a header says; of a file `sha256` is still empty. Raises Damaged for one that `header` would not make."""
    try:
        name = block[:100].rstrip(b"\0")
        prefix = block[345:500].rstrip(b"\0")
        text = (prefix + b"/" + name if prefix else name).decode("utf-8")
        size = int.from_bytes(block[125:136], "big") if block[124] == 0x80 else int(block[124:135], 8)
        kind = block[156:157]
        folder = kind == b"5"
        found = Member(text.removesuffix("/") if folder else text, size, int(block[100:107], 8), int(block[136:147], 8),
                       None if folder else "")  # fmt: skip
        check_name(found.name)
        if kind not in (b"0", b"5") or found.mode > 0o777 or (folder and size) or header(found) != block:
            raise ValueError
    except BackupError as error:
        raise Damaged(str(error)) from error
    except ValueError as error:
        raise Damaged("it has a member that is no plain file or folder, or a header that was changed") from error
    return found


def check_name(name: str) -> None:
    """Raises BackupError for a name that leads anywhere but into its tree, or that no backup has."""
    parts = name.split("/")
    shown = ascii(name)[:200]
    if any(part in ("", ".", "..") for part in parts) or (parts[0] not in TREES and name != MANIFEST):
        raise BackupError(f"the name {shown} leads out of the backup", "rename it")
    if not name.isprintable():
        raise BackupError(f"the name {shown} has characters that cannot be shown", "rename it")


def padding(size: int) -> bytes:
    """The zeros behind so many bytes of data."""
    return bytes(-size % BLOCK)


def footer(size: int, sha256: str) -> bytes:
    """The line behind the archive."""
    return b"truthgpt-backup 1 %020d %s\n" % (size, sha256.encode())


FOOTER_BYTES = len(footer(0, "0" * 64))


def read_footer(line: bytes) -> tuple[int, str]:
    """Bytes and SHA-256 of what is before it. Raises Damaged."""
    found = _FOOTER.fullmatch(line)
    if found is None:
        raise Damaged("its end is missing or was changed")
    return int(found[1]), found[2].decode()


def _split(name: str) -> tuple[bytes, bytes]:
    """Name and prefix as ustar divides them, at the last slash that does."""
    data = name.encode("utf-8", "surrogateescape")
    if len(data) <= 100:
        return data, b""
    at = data.rfind(b"/", 0, min(156, len(data) - 1))
    if at < 1 or len(data) - at - 1 > 100:
        raise BackupError(f"the name {ascii(name)[:300]} is too long for a backup", "give it a shorter name")
    return data[at + 1 :], data[:at]
