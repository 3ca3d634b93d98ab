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
from dataclasses import dataclass, field
from typing import Any

from orchestrator.ops.backup.errors import BackupError, Damaged, Newer

BLOCK = 512
FORMAT = 1
MANIFEST = "MANIFEST.json"
MANIFEST_BYTES = 32 << 20  # that it has at most
HEAD_BYTES = 1 << 20  # of that what is not about members
MOST_MEMBERS = 100_000
END = bytes(2 * BLOCK)
TREES = ("settings", "redis", "home", "models")

_OCTAL_SIZE = 1 << 33
_ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")
_FOOTER = re.compile(rb"truthgpt-backup 1 (\d{20}) ([0-9a-f]{64})\n")
_OTHER_FOOTER = re.compile(rb"truthgpt-backup (?!1 )[1-9]\d{0,3} [ -~]*\n\Z")
_OTHER_FORMAT = re.compile(rb'\{"format": ?(?!1[,}])[1-9]\d{0,3}[,}]')


@dataclass(frozen=True, slots=True)
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

    def encode(self) -> bytes:
        document = {"format": FORMAT, **{name: getattr(self, name) for name in _HEAD}}
        return json.dumps(document, separators=(",", ":")).encode()[:-1] + _listed(self.members)

    @classmethod
    def decode(cls, data: bytes, members: list[Member]) -> Manifest:
        """What is said of an archive that has these members. They are not parsed but compared with the text that there
        has to be of them: nothing can be said that takes more memory than they do. Raises Damaged and Newer.
        """
        if _OTHER_FORMAT.match(data):
            raise Newer("its manifest has another form")
        listed = _listed(members)
        if not data.endswith(listed):
            raise Damaged("its manifest cannot be read, or says something else than what is in it")
        head = data[: len(data) - len(listed)] + b"}"
        try:
            if len(head) > HEAD_BYTES:
                raise ValueError
            found = json.loads(head)
            if found.keys() != {"format", *_HEAD} or found["format"] != FORMAT:
                raise ValueError
            made = cls(**{name: found[name] for name in _HEAD}, members=members)
            texts = [made.id, made.version, *made.origins.items(), *made.redis, made.redis.get("source", "")]
            counts = [count for name, count in made.redis.items() if name != "source"]
            if not all(_shown(text) for item in texts for text in (item if isinstance(item, tuple) else (item,))):
                raise ValueError
            if not all(type(count) is int and 0 <= count < 1 << 63 for count in counts):
                raise ValueError
            if _ID.fullmatch(made.id) is None or type(made.created) not in (int, float) or not 0 <= made.created < 1e11:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise Damaged("its manifest cannot be read") from error
        return made


_HEAD = ("id", "created", "version", "origins", "redis")


def _listed(members: list[Member]) -> bytes:
    """The end of a manifest: one line of JSON has all members, in their order."""
    return b',"members":' + json.dumps([_row(member) for member in members], separators=(",", ":")).encode() + b"}"


def _shown(text: object) -> bool:
    """Whether this is text that a terminal may be given."""
    return isinstance(text, str) and text.isprintable()


def _row(member: Member) -> dict[str, Any]:
    row = {"name": member.name, "bytes": member.bytes, "mode": member.mode, "mtime": member.mtime}
    if member.folder:
        del row["bytes"]
        return row
    return {**row, "sha256": member.sha256}


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
TAIL_BYTES = 512  # in which any version's footer fits


def read_footer(tail: bytes) -> tuple[int, str]:
    """Bytes and SHA-256 of what is before the line that the last TAIL_BYTES end with. Raises Damaged and Newer."""
    found = _FOOTER.fullmatch(tail[-FOOTER_BYTES:])
    if found is None:
        if _OTHER_FOOTER.search(tail):
            raise Newer("its end has another form")
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
