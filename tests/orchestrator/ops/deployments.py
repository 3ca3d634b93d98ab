"""Deployments to back up, small and without servers, and archives that no `create` would write."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from orchestrator.ops import auditing
from orchestrator.ops.backup.tarform import END, MANIFEST, Manifest, Member, footer, header, padding
from orchestrator.settings import Settings

ID = "20261126T183000Z-1a2b3c4d"


def deployment(base: Path, **changes: object) -> Settings:
    """Two versions of a model, a link among them, an audit log, metrics, alerts, and things that no backup has."""
    settings = replace(
        Settings.load({"home": base / "home", "model_repository": base / "repository"}, {"TRUTHGPT_CONFIG": ""}),
        backup_dir=base / "backups", **changes,  # type: ignore[arg-type]
    )  # fmt: skip
    for name, data in {
        "repository/demo/1/model.onnx": b"\x00\x01" * 5000, "repository/demo/2/model.onnx": b"",
        "repository/demo/config.pbtxt": b'name: "demo"', "repository/.staging/half/1/model.onnx": b"half",
        "elsewhere/weights": b"w" * 1500, "home/metrics/2026-11-26.jsonl": b'{"a": 1}\n', "home/alerts.json": b"{}",
        "home/models.json": b'{"models": {"demo": 2}}', "home/logs/gateway.log": b"log", "home/state.json": b"{}",
        "home/triton/x": b"x",
    }.items():  # fmt: skip
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (base / "repository" / "demo" / "3").mkdir()  # an ensemble's version is an empty folder
    (base / "repository" / "linked").symlink_to(base / "elsewhere")
    os.chmod(base / "repository" / "demo" / "1" / "model.onnx", 0o640)
    for number in range(5):
        assert auditing.note(settings, "keys create", detail=str(number)) == ""
    return settings


def files(root: Path) -> dict[str, bytes]:
    """Every file below a folder; folders end with a slash."""
    return {
        str(path.relative_to(root)) + "/" * path.is_dir(): b"" if path.is_dir() else path.read_bytes()
        for path in sorted(root.rglob("*"))
    }


Part = Member | bytes


def archive(parts: list[tuple[Member, bytes]], manifest: Manifest | None = None, tail: bytes = b"") -> bytes:
    """A backup of these members, its manifest and footer right unless they are given."""
    out = io.BytesIO()
    listed = []
    for member, data in parts:
        block = header(member) if len(member.name) < 200 else bytes(512)
        out.write(block + data + padding(len(data)))
        listed.append(member if member.folder else replace(member, sha256=hashlib.sha256(data).hexdigest()))
    names = {member.name.partition("/")[0]: "" for member in listed}
    made = manifest or Manifest(ID, 1.8e9, "0", origins=names, members=listed)
    data = made.encode()
    out.write(header(Member(MANIFEST, len(data), 0o600, 0, "")) + data + padding(len(data)) + END)
    text = out.getvalue() + tail
    return text + footer(len(text), hashlib.sha256(text).hexdigest())


def sealed(text: bytes) -> bytes:
    """Any bytes with a footer that fits them."""
    return text + footer(len(text), hashlib.sha256(text).hexdigest())


def spread(size: int, count: int) -> Iterator[int]:
    """Places all over a file, its first and last byte among them."""
    return ((size - 1) * number // (count - 1) for number in range(count))
