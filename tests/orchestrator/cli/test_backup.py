"""`truthgpt backup` as people and scripts use it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import pytest

from orchestrator.ops.backup.tarform import Manifest, Member
from tests.orchestrator.cli.conftest import Place
from tests.orchestrator.ops.deployments import ID, archive
from tests.redis import RealRedis


@pytest.fixture
def ready(place: Place) -> Place:
    place.export("demo", 2)
    place.home.mkdir()
    return place


def test_create_list_verify_and_prune(ready: Place) -> None:
    """Each prints one document; what they say of the file agrees with it, and the audit log has what was done."""
    made = ready.json("backup", "create")
    path = Path(made["path"])
    assert path.parent == ready.home / "backups" and re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{8}", made["id"])
    assert made["bytes"] == path.stat().st_size
    assert made["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    (row,) = ready.json("backup", "list")
    assert {name: row[name] for name in ("id", "path", "bytes", "encrypted")} == {
        "id": made["id"], "path": made["path"], "bytes": made["bytes"], "encrypted": False,
    }  # fmt: skip
    assert isinstance(row["created"], float)
    verified = ready.json("backup", "verify", str(path))
    assert verified["ok"] and verified["files"] == made["files"]
    ready.json("backup", "create", "--no-models", "--no-cache")
    ready.set(BACKUP_KEEP=1)
    planned = ready.json("backup", "prune", "--dry-run")
    assert len(planned["removed"]) == 1 and len(ready.json("backup", "list")) == 2
    assert ready.json("backup", "prune")["removed"] == planned["removed"]
    assert len(ready.json("backup", "list")) == 1
    assert ready.json("backup", "prune")["removed"] == []
    told = [row["operation"] for row in ready.json("audit", "tail", "-n", "50")]
    assert told == ["backup create", "backup create", "backup prune"]


def test_what_people_read(ready: Place) -> None:
    """Without a key a note says what is in the file; list, verify and the diff are lines."""
    done = ready.run("backup", "create")
    assert done.exit_code == 0 and "not be encrypted" in done.stderr and "keygen" in done.stderr
    assert "in the clear, the secrets in truthgpt.toml" in done.stderr
    assert "no stack has ever run" in done.stderr
    path = done.stdout.partition(":")[0]
    assert path in ready.run("backup", "list").stdout
    assert ready.run("backup", "verify", path).stdout.startswith("ok: ")
    (ready.repository / "demo" / "config.pbtxt").write_text("changed")
    shown = ready.run("backup", "restore", path, "--dry-run").stdout
    assert "  ~ demo/config.pbtxt" in shown and "1 changed" in shown
    done = ready.run("backup", "restore", path, "--yes")
    assert done.exit_code == 0, done.output
    assert "what was there before is in" in done.stdout
    assert (ready.repository / "demo" / "config.pbtxt").read_text() != "changed"
    assert ready.run("backup", "list", "--backup-dir", str(ready.home / "none")).stderr.startswith("there are no")


def test_restore_into_another_home(ready: Place, tmp_path: Path) -> None:
    """The restore is in the restored home's audit log, which verifies; the settings file and how to use it are told."""
    config = tmp_path / "own.toml"
    config.write_text("max_concurrency = 9\n")
    ready.set(CONFIG=config)
    made = ready.json("backup", "create")
    ready.set(CONFIG="")
    target = tmp_path / "other"
    arguments = ("backup", "restore", made["path"], "--target", str(target), "--model-repository", str(tmp_path / "r"))
    found = ready.json(*arguments, "--dry-run")
    assert not found["restored"] and not target.exists() and found["trees"]["models"]["same"] == 0
    assert ["max_concurrency", "9", "256"] in found["settings"]
    found = ready.json(*arguments)
    assert found["restored"] and found["config"] == str(target / "truthgpt.toml")
    assert (target / "truthgpt.toml").read_text() == config.read_text()
    ready.set(HOME=target)
    # the backup's own event was written once it was complete
    assert [row["operation"] for row in ready.json("audit", "tail")] == ["backup restore"]
    assert ready.run("audit", "verify").exit_code == 0
    assert (tmp_path / "r" / "demo" / "2" / "model.onnx").exists()
    done = ready.run(*arguments, "--yes")
    assert f"export TRUTHGPT_CONFIG={target}/truthgpt.toml" in done.stdout


def typed(place: Place, answer: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code and outputs of a command at whose terminal somebody types."""
    ours, theirs = os.openpty()
    try:
        process = place.process(*arguments, stdin=theirs)
        os.write(ours, answer.encode())
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("as_json", [False, True])
def test_what_is_replaced_is_shown_and_asked(ready: Place, tmp_path: Path, as_json: bool) -> None:
    """At a terminal it asks about home, models and Redis, no password shown; --json tells the rest on stderr first."""
    with RealRedis("--requirepass", "secret-word") as server:
        ready.set(REDIS_URL=f"unix://:secret-word@{server.path}")
        path = ready.json("backup", "create")["path"]
        bare = ready.json("backup", "create", "--no-models")["path"]
        (ready.home / "models.json").write_text("{}")
        flags = ["--json"] * as_json
        redis = f"what is in the Redis unix://:***@{server.path}"
        for file, listed in (
            (path, f"the home {ready.home} and the model repository {ready.repository} and {redis}"),
            (bare, f"the home {ready.home} and {redis}"),
        ):  # fmt: skip
            code, out, err = typed(ready, "n\n", "backup", "restore", file, *flags)
            assert code == 1 and f"Replace {listed}? [y/N]" in err and "nothing was changed" in err
            assert "secret-word" not in out + err
            shown, other = (err, out) if as_json else (out, err)
            assert "- models.json" in shown and f"replaces  {listed}" in shown and "models.json" not in other
        code, out, err = typed(ready, "y\n", "backup", "restore", bare, *flags)
        assert code == 0, err
        assert not as_json or json.loads(out)["replaces"]["redis"].startswith("unix://:***@")
        assert as_json or "is in " in out
        found = typed(ready, "", "backup", "restore", bare, "--yes", "--json")
        assert found[0] == 0 and "Replace" not in found[2] and "models.json" not in found[2]


def test_a_drill_beside_a_deployment(ready: Place, tmp_path: Path) -> None:
    """Other models are replaced in a named folder only; how to use its keys is told, and --redis says otherwise."""
    with RealRedis() as server:
        ready.set(REDIS_URL=server.url)
        path = ready.json("backup", "create")["path"]
        drill = ("backup", "restore", path, "--yes", "--target", str(tmp_path / "drill"))
        (ready.repository / "demo" / "later.txt").write_text("a later export")
        assert "--model-repository" in ready.refused(*drill)
        assert ready.json(*drill, "--dry-run")["replaces"]["models"] == str(ready.repository)
        assert not (tmp_path / "drill").exists()
        ready.set(REDIS_URL="")
        assert "no Redis is set" in ready.refused(*drill, "--model-repository", str(tmp_path / "r"), "--redis")
        ready.set(REDIS_URL=server.url)
        done = ready.run(*drill, "--model-repository", str(tmp_path / "r"))
        assert done.exit_code == 0, done.output
        assert f"its keys are in {tmp_path}/drill/redis, and used with: export TRUTHGPT_REDIS_URL=\n" in done.stdout
        found = ready.json(*drill, "--model-repository", str(tmp_path / "r"), "--redis")
        assert found["replaces"] == {"home": f"{tmp_path}/drill", "models": f"{tmp_path}/r", "redis": server.url}


def test_a_hostile_manifest_at_a_terminal(ready: Place, tmp_path: Path) -> None:
    """Whatever a backup says of itself, no escape reaches the terminal: neither by verify nor by restore."""
    evil = {"source": "given", "keys": "\x1b[2J", "limits": 0, "entries": 0}
    for number, redis in enumerate((evil, {**evil, "keys": 0, "source": "\x1b]0;"})):
        (tmp_path / f"{number}.tar").write_bytes(
            archive([(Member("home", 0, 0o700, 0), b"")],
                    Manifest(ID, 1.8e9, "0", {"home": ""}, redis, [Member("home", 0, 0o700, 0)]))
        )  # fmt: skip
        for command in (("verify",), ("restore", "--dry-run"), ("restore", "--yes")):
            done = ready.run("backup", command[0], str(tmp_path / f"{number}.tar"), *command[1:])
            assert done.exit_code == 1 and "\x1b" not in done.output


@pytest.mark.parametrize("command", ["create", "restore"])
def test_what_stood_in_the_way_is_named(ready: Place, tmp_path: Path, command: str) -> None:
    """A restore that was killed is undone by the next command, which says where it has put what was made since."""
    path = ready.json("backup", "create")["path"]
    alerts = ready.home / "alerts.json"
    alerts.write_text("[1]")
    note = {"moves": [[str(alerts), str(tmp_path / "away")]], "inodes": [alerts.stat().st_ino], "staging": [],
            "kept": []}  # fmt: skip
    alerts.rename(tmp_path / "away")
    alerts.write_text("[2]")
    (ready.home / "restore.json").write_text(json.dumps(note))
    done = ready.run("backup", *(("create",) if command == "create" else ("restore", path, "--yes")))
    assert done.exit_code == 0 and "interrupted was undone" in done.stderr
    (aside,) = ready.home.glob(".alerts.json.aside-*")
    assert f"is in {aside}" in done.stderr and aside.read_text() == "[2]"
    assert command == "restore" or alerts.read_text() == "[1]"


def test_paths_are_absolute(ready: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever --backup-dir is, --json names files so that they are found from anywhere."""
    monkeypatch.chdir(ready.home)
    made = ready.json("backup", "create", "--backup-dir", "here")
    (row,) = ready.json("backup", "list", "--backup-dir", "here")
    assert made["path"] == row["path"] and Path(made["path"]).parent == ready.home / "here"


def test_a_mistyped_home(ready: Place, tmp_path: Path) -> None:
    """It is an error, and nothing is made: no home, no audit log, no backup."""
    before = sorted(tmp_path.rglob("*"))
    assert "there is no home" in ready.refused("backup", "create", "--home", str(tmp_path / "hmoe"))
    assert "there is no model" in ready.refused("backup", "create", "--model-repository", str(tmp_path / "r"))
    assert sorted(tmp_path.rglob("*")) == before


def test_encrypted(ready: Place) -> None:
    """keygen's key encrypts; without it and with another verify and restore fail with a hint that names the setting."""
    key = ready.json("backup", "keygen")
    assert ready.run("backup", "keygen").stdout.startswith("AGE-SECRET-KEY-1")
    ready.set(BACKUP_KEY=key["key"])
    done = ready.run("backup", "create", "--json")
    assert done.stderr == ""
    path = json.loads(done.stdout)["path"]
    assert path.endswith(".tar.age") and ready.json("backup", "verify", path)["encrypted"]
    assert key["key"] not in ready.run("config", "show").output
    for other, what in ((ready.json("backup", "keygen")["key"], "another key"), (None, "is encrypted")):
        ready.set(BACKUP_KEY=other)
        for command in (("verify", path), ("restore", path, "--yes")):
            error = ready.refused("backup", *command)
            assert what in error and "TRUTHGPT_BACKUP_KEY" in error


def test_what_is_no_backup(ready: Place, tmp_path: Path) -> None:
    """A damaged file is exit code 1, one that is not there wrong usage; names in it cannot move the cursor."""
    path = tmp_path / "bad.tar"
    path.write_bytes(b"\x1b[2J" * 1000)
    assert "\x1b" not in ready.refused("backup", "verify", str(path))
    ready.refused("backup", "restore", str(path), "--yes")
    ready.refused("backup", "verify", str(tmp_path / "nowhere"), code=2)


def test_nobody_else_may_read_them(ready: Place) -> None:
    """Folder and file are their owner's alone, whatever the umask."""
    before = os.umask(0)
    try:
        path = Path(ready.json("backup", "create")["path"])
    finally:
        os.umask(before)
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
