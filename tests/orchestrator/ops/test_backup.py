"""Backups of a deployment without a stack: what is in them, and that it comes back as it was."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.audit import fingerprint_of
from orchestrator.auditlog import folder_of
from orchestrator.local import state
from orchestrator.ops import auditcheck, auditing, backup
from orchestrator.ops.backup import redissource
from orchestrator.ops.keyring import Keyring
from orchestrator.ops.redis import NoRedis
from orchestrator.settings import Settings
from tests.orchestrator.gateway import write_state
from tests.orchestrator.ops.deployments import deployment, files, spread
from tests.redis import RealRedis


def back(settings: Settings, path: Path) -> backup.Restored:
    return backup.restore(settings, path, lambda report, difference: True)


def test_what_is_in_a_backup_comes_back_elsewhere(tmp_path: Path) -> None:
    """Models with their modes and empty folders, audit log, key, metrics and lists are as they were; nothing else."""
    settings = deployment(tmp_path)
    made = backup.create(settings)
    assert made.path.parent == settings.backups and hashlib.sha256(made.path.read_bytes()).hexdigest() == made.sha256
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o600 and stat.S_IMODE(settings.backups.stat().st_mode) == 0o700
    assert (made.bytes, made.encrypted, made.redis) == (made.path.stat().st_size, False, "none")
    assert backup.verify(made.path, None).manifest.files == made.files
    other = replace(settings, home=tmp_path / "new" / "home", model_repository=tmp_path / "new" / "repository")
    result = back(other, made.path)
    assert result.done and result.kept == []
    got = files(tmp_path / "new")
    expected = files(tmp_path)
    for name in (
        "repository/demo/", "repository/demo/1/", "repository/demo/1/model.onnx", "repository/demo/2/model.onnx",
        "repository/demo/3/", "repository/demo/config.pbtxt", "home/audit/audit.jsonl", "home/audit/head",
        "home/audit.key", "home/metrics/2026-11-26.jsonl", "home/alerts.json", "home/models.json",
    ):  # fmt: skip
        assert got.pop(name) == expected[name], name
    assert got.pop("repository/linked/weights") == b"w" * 1500
    for folder in ("repository/", "repository/demo/2/", "repository/linked/", "home/", "home/audit/", "home/metrics/"):
        got.pop(folder)
    assert got == {"home/lock": b""}
    mode = (other.model_repository / "demo" / "1" / "model.onnx").stat().st_mode
    assert stat.S_IMODE(mode) == 0o640
    assert stat.S_IMODE((other.home / "audit.key").stat().st_mode) == 0o600
    report = auditcheck.verify(folder_of(other.home), fingerprint_of(other, create=False))
    assert report.broken is None and report.lines == 5
    assert auditing.note(other, "backup restore") == ""
    report = auditcheck.verify(folder_of(other.home), fingerprint_of(other, create=False))
    assert (report.broken, report.lines, report.recovered) == (None, 6, 0)


def test_any_tar_reads_it(tmp_path: Path) -> None:
    """GNU tar lists and extracts a backup that is not encrypted, without a complaint."""
    settings = deployment(tmp_path)
    made = backup.create(settings)
    done = subprocess.run(["tar", "-xf", made.path, "-C", tmp_path / "backups"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "backups/models/demo/1/model.onnx").read_bytes() == b"\x00\x01" * 5000
    manifest = json.loads((tmp_path / "backups/MANIFEST.json").read_text())
    assert manifest["id"] == made.id and manifest["origins"]["home"] == str(settings.home)


def test_what_a_backup_does_not_have_stays(tmp_path: Path) -> None:
    """Logs, backups in the home and unknown files stay; what was replaced is complete beside home and repository."""
    settings = deployment(tmp_path)
    settings = replace(settings, backup_dir=None)
    made = backup.create(settings)
    before = files(settings.home)
    (settings.model_repository / "demo" / "1" / "model.onnx").write_bytes(b"spoilt")
    (settings.model_repository / "new" / "1").mkdir(parents=True)
    (settings.home / "alerts.json").write_bytes(b"[]")
    auditing.note(settings, "keys revoke")
    later = files(settings.home)
    result = back(settings, made.path)
    assert result.difference.trees["models"].changed == ["demo/1/model.onnx"]
    assert sorted(result.difference.trees["home"].changed) == ["alerts.json", "audit/audit.jsonl", "audit/head"]
    now = files(settings.home)
    now.pop("lock")
    assert now == before
    assert made.path.exists()
    kept_home, kept_models = result.kept
    assert kept_home.name.startswith("home.before-") and kept_models.name.startswith("repository.before-")
    assert {name: later[name] for name in files(kept_home)} == files(kept_home)
    assert (kept_home / "alerts.json").read_bytes() == b"[]"
    assert (kept_models / "demo" / "1" / "model.onnx").read_bytes() == b"spoilt"
    assert not (settings.model_repository / "new").exists() and (kept_models / "new").is_dir()
    assert (settings.model_repository / ".staging").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir() if "restoring" in path.name) == []


def test_a_dry_run_shows_and_changes_nothing(tmp_path: Path) -> None:
    """Added, changed, removed and equal files of each tree, and settings that differ; not a byte is touched."""
    settings = deployment(tmp_path)
    made = backup.create(settings)
    (settings.home / "alerts.json").unlink()
    (settings.home / "metrics" / "2026-11-27.jsonl").write_bytes(b"")
    before = files(tmp_path)
    changed = replace(settings, max_concurrency=7)
    result = backup.restore(changed, made.path, lambda *_: pytest.fail("asked"), dry_run=True)
    home = result.difference.trees["home"]
    assert (home.added, home.changed, home.removed) == (["alerts.json"], [], ["metrics/2026-11-27.jsonl"])
    assert home.same == 5 and result.difference.trees["models"].same == 4
    assert ("max_concurrency", "256", "7") in result.difference.settings
    assert not result.done and files(tmp_path) == before


def test_a_no_changes_nothing(tmp_path: Path) -> None:
    """Who answers no keeps what he has, and a home that was not there is not made."""
    settings = deployment(tmp_path)
    made = backup.create(settings)
    other = replace(settings, home=tmp_path / "other")
    result = backup.restore(other, made.path, lambda *_: False)
    assert not result.done and not other.home.exists()


def test_the_settings_file_comes_back_into_the_home(tmp_path: Path) -> None:
    """truthgpt.toml is put into the home as it was; the list of all settings in the backup has no secret."""
    settings = deployment(tmp_path, audit_key="a secret of the audit log", config_file=tmp_path / "own.toml")
    (tmp_path / "own.toml").write_text("max_concurrency = 9\n")
    made = backup.create(settings)
    result = back(settings, made.path)
    assert result.config == settings.home / "truthgpt.toml"
    assert result.config.read_text() == "max_concurrency = 9\n"
    assert b"a secret of the audit log" not in made.path.read_bytes()


def test_without_models(tmp_path: Path) -> None:
    """A backup without models leaves the repository as it is when it is put back."""
    settings = deployment(tmp_path)
    made = backup.create(settings, models=False)
    assert "models" not in backup.verify(made.path, None).manifest.origins
    (settings.model_repository / "demo" / "config.pbtxt").write_bytes(b"changed")
    assert back(settings, made.path).done
    assert (settings.model_repository / "demo" / "config.pbtxt").read_bytes() == b"changed"


@pytest.mark.parametrize("encrypted", [False, True])
def test_each_flipped_bit_and_each_cut_is_found(tmp_path: Path, encrypted: bool) -> None:
    """One bit at 60 places from the first byte to the last, every cut and every byte too many; verify sees them all."""
    key = backup.new_key()[0] if encrypted else None
    settings = deployment(tmp_path, backup_key=key)
    made = backup.create(settings)
    assert made.encrypted is encrypted and made.path.name.endswith(".tar.age" if encrypted else ".tar")
    good = made.path.read_bytes()
    assert backup.verify(made.path, key).sha256
    bad = tmp_path / "bad.tar"
    padded = good.find(b"\0" * 64)
    for at in (*spread(len(good), 60), *(() if encrypted else (padded + 30, len(good) - 700))):
        for bit in (1, 0x20, 0x80):
            bad.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
            with pytest.raises(backup.BackupError):
                backup.verify(bad, key)
    for size in (0, 1, 511, 512, len(good) // 2, len(good) - 105, len(good) - 1):
        bad.write_bytes(good[:size])
        with pytest.raises(backup.BackupError):
            backup.verify(bad, key)
    for more in (b"\0", b"\n", bytes(512), good):
        bad.write_bytes(good + more)
        with pytest.raises(backup.BackupError):
            backup.verify(bad, key)
    bad.write_bytes(good[:-200] + b"x" + good[-200:])
    with pytest.raises(backup.BackupError):
        backup.verify(bad, key)


def test_an_encrypted_backup_needs_its_key(tmp_path: Path) -> None:
    """Nothing readable is in it; without the key or with another it fails, with a hint; with the key it comes back."""
    key, other = backup.new_key()[0], backup.new_key()[0]
    settings = deployment(tmp_path, backup_key=key)
    made = backup.create(settings)
    text = made.path.read_bytes()
    assert b"MANIFEST" not in text and (settings.home / "audit.key").read_bytes() not in text
    with pytest.raises(backup.BackupError, match="is encrypted") as failed:
        backup.verify(made.path, None)
    assert "TRUTHGPT_BACKUP_KEY" in failed.value.hint
    with pytest.raises(backup.BackupError, match="with another key") as failed:
        back(replace(settings, backup_key=other), made.path)
    assert "TRUTHGPT_BACKUP_KEY" in failed.value.hint
    assert back(replace(settings, home=tmp_path / "other"), made.path).done
    assert (tmp_path / "other" / "audit.key").read_bytes() == (settings.home / "audit.key").read_bytes()


@pytest.mark.slow
def test_a_large_file_needs_no_memory(tmp_path: Path) -> None:
    """300 MB are backed up, encrypted, checked and put back by a process that never has more than 160 MB in memory."""
    settings = deployment(tmp_path)
    with (settings.model_repository / "demo" / "1" / "model.onnx").open("wb") as file:
        file.truncate(300_000_000)
    script = """
import sys
from pathlib import Path
from dataclasses import replace
from orchestrator.settings import Settings
from orchestrator.ops import backup
base = Path(sys.argv[1])
settings = Settings.load({"home": base / "home", "model_repository": base / "repository"}, {"TRUTHGPT_CONFIG": ""})
settings = replace(settings, backup_dir=base / "backups", backup_key=sys.argv[2])
made = backup.create(settings)
backup.restore(replace(settings, home=base / "h2", model_repository=base / "r2"), made.path, lambda *_: True)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    argv = [sys.executable, "-c", script, str(tmp_path), backup.new_key()[0]]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 160_000  # KiB
    assert (tmp_path / "r2" / "demo" / "1" / "model.onnx").stat().st_size == 300_000_000


def test_the_log_is_whole_while_it_is_written_to(tmp_path: Path) -> None:
    """Eight backups while a writer appends and moves files aside all the time: each one's chain verifies."""
    settings = deployment(tmp_path, audit_max_bytes=4096)
    ending = threading.Event()

    def work() -> None:
        while not ending.is_set():
            assert auditing.note(settings, "keys create", detail="x" * 200) == ""

    writer = threading.Thread(target=work)
    writer.start()
    try:
        made = [backup.create(settings, models=False) for _ in range(8)]
    finally:
        ending.set()
        writer.join()
    lines = []
    for number, one in enumerate(made):
        other = replace(settings, home=tmp_path / f"home{number}")
        assert back(other, one.path).done
        report = auditcheck.verify(folder_of(other.home), fingerprint_of(other, create=False))
        assert report.broken is None and report.torn_bytes == 0
        lines.append(report.lines)
    assert lines == sorted(lines) and lines[0] >= 5 and lines[-1] > lines[0]


def test_an_unfinished_line_is_left_out(tmp_path: Path) -> None:
    """Of a line that is just being written nothing is copied."""
    settings = deployment(tmp_path)
    whole = (settings.home / "audit" / "audit.jsonl").read_bytes()
    with (settings.home / "audit" / "audit.jsonl").open("ab") as file:
        file.write(b'{"seq":6,"prev"')
    made = backup.create(settings)
    other = replace(settings, home=tmp_path / "other")
    back(other, made.path)
    assert (other.home / "audit" / "audit.jsonl").read_bytes() == whole


@pytest.mark.parametrize("what", ["replaced", "removed"])
def test_a_model_that_changes_meanwhile(tmp_path: Path, what: str) -> None:
    """A file that is replaced or removed while it is copied has the backup begun anew; nothing half is published."""
    settings = deployment(tmp_path)
    config = settings.model_repository / "demo" / "config.pbtxt"
    told: list[int] = []

    def once(done: int, total: int) -> None:
        if not told:
            if what == "replaced":
                (tmp_path / "fresh").write_bytes(b'name: "DEMO"')
                os.replace(tmp_path / "fresh", config)
            else:
                config.unlink()
        told.append(done)

    made = backup.create(settings, progress=once)
    names = {member.name for member in backup.verify(made.path, None).manifest.members}
    assert ("models/demo/config.pbtxt" in names) is (what == "replaced")
    assert backup.infos(settings.backups) == [backup.newest(settings.backups)]

    config.write_bytes(b"")

    def always(done: int, total: int) -> None:
        time.sleep(0.02)  # a file system's clock has ticks
        config.write_bytes(os.urandom(20))

    with pytest.raises(backup.Changed, match="config.pbtxt"):
        backup.create(settings, progress=always)
    assert [path.name for path in settings.backups.iterdir()] == [made.path.name]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A FIFO, a link that leads nowhere and a link to a folder above are errors with a hint; nothing hangs."""
    settings = deployment(tmp_path)
    odd = settings.model_repository / "demo" / "odd"
    os.mkfifo(odd)
    for make in (lambda: None, lambda: odd.symlink_to("nowhere"), lambda: odd.symlink_to("..")):
        make()
        with pytest.raises(backup.BackupError, match="odd") as failed:
            backup.create(settings)
        assert failed.value.hint
        odd.unlink()
    (settings.model_repository / "demo" / ("x" * 150)).write_bytes(b"")
    with pytest.raises(backup.BackupError, match="too long"):
        backup.create(settings)


def test_a_disk_without_room_is_refused_early(tmp_path: Path) -> None:
    """A repository that is larger than the disk is refused before anything is written."""
    settings = deployment(tmp_path)
    with (settings.model_repository / "demo" / "1" / "model.onnx").open("wb") as file:
        file.truncate(8 << 40)
    with pytest.raises(backup.BackupError, match="are free") as failed:
        backup.create(settings)
    assert "--no-models" in failed.value.hint and list(settings.backups.iterdir()) == []


def test_a_running_stack_is_not_restored_into(tmp_path: Path) -> None:
    """While somebody holds the home nothing is changed, and the error says how to stop a stack."""
    settings = deployment(tmp_path)
    made = backup.create(settings)
    write_state(settings.home, "http://127.0.0.1:1")
    before = files(tmp_path)
    with state.lock(settings.home), pytest.raises(backup.BackupError, match="already running") as failed:
        back(settings, made.path)
    assert "truthgpt down" in failed.value.hint
    after = files(tmp_path)
    after.pop("home/lock")
    assert after == before


def test_a_redis_that_is_away_is_no_reason_to_leave_it_out(tmp_path: Path) -> None:
    """With a Redis that does not answer there is no backup, not one without it."""
    settings = deployment(tmp_path, redis_url=f"unix://{tmp_path}/nowhere.sock")
    with pytest.raises(NoRedis):
        backup.create(settings)
    assert not settings.backups.exists() or list(settings.backups.iterdir()) == []


def _fill(client: Any) -> tuple[str, str]:
    key, credential = Keyring(client).create("acme", limits={"per_day": 77})
    Keyring(client).set_limits(key.id, {"per_minute": 5})
    client.set("truthgpt:{acme}:c:abc", b"TG1 p \x00\xff", px=600_000)
    client.set("truthgpt:{acme}:f:abc", b"worker", px=60_000)
    client.hset("truthgpt:breakers", "demo", "{}")
    client.set("foreign", "x")
    return key.id, credential


def test_the_redis_of_a_stopped_home(tmp_path: Path) -> None:
    """Its files are read by a server that runs for that alone; put back, keys, limits and answers are the same."""
    settings = deployment(tmp_path)
    with redissource.held(settings.home), redissource.started(settings, settings.home) as client:
        id, _ = _fill(client)
    made = backup.create(settings)
    assert made.redis == "stopped"
    assert backup.verify(made.path, None).manifest.redis["keys"] == 1
    other = replace(settings, home=tmp_path / ("other" * 25))  # longer than a socket's name may be
    result = back(other, made.path)
    assert result.difference.redis_now is None
    with redissource.held(other.home), redissource.started(other, other.home) as client:
        assert Keyring(client).get(id).limits == {"per_day": 77}
        assert Keyring(client).limits(id) == {"per_minute": 5}
        assert client.get("truthgpt:{acme}:c:abc") == b"TG1 p \x00\xff"
        assert 0 < client.pttl("truthgpt:{acme}:c:abc") <= 600_000
        assert client.exists("truthgpt:{acme}:f:abc", "foreign") == 0
        Keyring(client).revoke(id)
    assert backup.create(replace(other, backup_dir=tmp_path / "b2"), cache=False).redis == "stopped"
    again = back(other, made.path)
    assert again.difference.redis_now == {"keys": 1, "limits": 1}
    with redissource.held(other.home), redissource.started(other, other.home) as client:
        assert Keyring(client).get(id).state(time.time()) == "active"
    leftover = [path.name for path in tmp_path.iterdir() if "restoring" in path.name]
    assert leftover == []


def test_a_given_redis_is_changed_in_one_step_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys made since are gone, workers hear of it; where a rename fails after it Redis has what it had before."""
    with RealRedis() as server:
        import redis

        settings = deployment(tmp_path, redis_url=server.url)
        with redis.Redis.from_url(server.url) as client:
            id, _ = _fill(client)
            made = backup.create(settings)
            assert made.redis == "given"
            later, _ = Keyring(client).create("later")
            client.set("truthgpt:{acme}:c:abc", b"newer", px=900_000)
            client.delete("truthgpt:breakers")
            version = int(client.get("truthgpt:{registry}:version") or 0)  # type: ignore[arg-type]
            real, renamed = os.rename, []

            def rename(source: Any, target: Any) -> None:
                renamed.append(target)
                if len(renamed) == 5:
                    raise OSError(5, "Input/output error", str(target))
                real(source, target)

            before = files(tmp_path)
            with monkeypatch.context() as patched:
                patched.setattr(os, "rename", rename)
                with pytest.raises(OSError, match="Input/output"):
                    back(settings, made.path)
            after = files(tmp_path)
            after.pop("home/lock")
            assert after == before
            assert {key.id for key in Keyring(client).all()} == {id, later.id}
            assert client.get("truthgpt:{acme}:c:abc") == b"newer" and client.exists("truthgpt:breakers") == 0
            result = back(settings, made.path)
            assert [key.id for key in Keyring(client).all()] == [id]
            assert client.get("truthgpt:{acme}:c:abc") == b"TG1 p \x00\xff"
            assert client.hgetall("truthgpt:breakers") == {b"demo": b"{}"} and client.get("foreign") == b"x"
            assert int(client.get("truthgpt:{registry}:version")) > version  # type: ignore[arg-type]
            assert (result.kept[0] / "keys.jsonl").exists()


def test_progress_reaches_its_total(tmp_path: Path) -> None:
    """What is told of the progress only grows, and ends at the whole."""
    settings = deployment(tmp_path)
    told: list[tuple[int, int]] = []
    made = backup.create(settings, progress=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == sorted(done for done, _ in told) and told[-1][0] == told[-1][1] > 0
    told.clear()
    backup.verify(made.path, None, lambda done, total: told.append((done, total)))
    assert told[-1] == (made.bytes, made.bytes)
