"""Where a backup may be put, and what a drill beside a deployment that serves must not touch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from orchestrator.local import state
from orchestrator.ops import backup
from orchestrator.ops.backup import redissource
from orchestrator.ops.keyring import Keyring
from orchestrator.ops.serving import servers
from tests.orchestrator.gateway import eventually, write_state
from tests.orchestrator.ops.deployments import deployment, files
from tests.redis import RealRedis


def yes(*_: object) -> bool:
    return True


def without_lock(base: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(base).items() if not name.endswith("home/lock")}


def test_a_drill_touches_nothing_of_the_deployment(tmp_path: Path) -> None:
    """Into another home: models need a named folder, and the given Redis keeps every key, its data become files."""
    with RealRedis() as server, redis.Redis.from_url(server.url) as client:
        settings = deployment(tmp_path / "production", redis_url=server.url)
        key, _ = Keyring(client).create("acme")
        made = backup.create(settings)
        later, _ = Keyring(client).create("later")
        before = without_lock(tmp_path)
        home, repository = tmp_path / "drill" / "home", tmp_path / "drill" / "models"
        (added := settings.model_repository / "demo" / "later.txt").write_text("a later export")
        changed = without_lock(tmp_path)
        assert "models" in backup.restore(settings, made.path, yes, target=home, dry_run=True).difference.replaces
        with pytest.raises(backup.BackupError, match="would replace those of another home") as failed:
            backup.restore(settings, made.path, yes, target=home)
        assert "--model-repository" in failed.value.hint and without_lock(tmp_path) == changed
        added.unlink()
        asked: list[dict[str, str]] = []

        def agreed(report: backup.Report, difference: backup.Difference) -> bool:
            asked.append(difference.replaces)
            return True

        result = backup.restore(settings, made.path, agreed, target=home, repository=repository)
        assert result.done and result.elsewhere and asked == [{"home": str(home), "models": str(repository)}]
        after = without_lock(tmp_path)
        assert {name: after[name] for name in before} == before and set(os.listdir(tmp_path)) == {"production", "drill"}
        assert {found.id for found in Keyring(client).all()} == {key.id, later.id}
        drilled = replace(settings, home=home, redis_url=None)
        with redissource.held(home), redissource.started(drilled, home) as embedded:
            assert [found.id for found in Keyring(embedded).all()] == [key.id]
        backup.restore(settings, made.path, agreed, target=home, repository=repository, given_redis=True)
        assert asked[-1]["redis"] == server.url and [found.id for found in Keyring(client).all()] == [key.id]


def test_a_drill_with_models_that_are_there(tmp_path: Path) -> None:
    """No folder has to be named where nothing is replaced: models that are the backup's stay, though they are served;
    where none are left they come back.
    """
    settings = deployment(tmp_path)
    made = backup.create(settings)
    demo = settings.model_repository / "demo"
    before = files(demo)
    with serving(settings.model_repository):
        result = backup.restore(settings, made.path, yes, target=tmp_path / "drill")
    assert result.done and "models" not in result.difference.replaces and files(demo) == before
    shutil.rmtree(settings.model_repository)
    result = backup.restore(settings, made.path, yes, target=tmp_path / "another")
    assert result.done and "models" in result.difference.replaces and files(demo) == before


def test_a_drill_of_a_backup_without_models(tmp_path: Path) -> None:
    """It needs no folder for models, and leaves the deployment's as they are."""
    settings = deployment(tmp_path)
    made = backup.create(settings, models=False)
    result = backup.restore(settings, made.path, yes, target=tmp_path / "drill")
    assert result.done and result.difference.replaces == {"home": str(tmp_path / "drill")}
    assert files(tmp_path / "drill")["alerts.json"] == b"{}"


def test_the_settings_home_by_another_name(tmp_path: Path) -> None:
    """A target that is the settings' home, however it is spelled, is no drill: no folder has to be named."""
    settings = deployment(tmp_path)
    made = backup.create(settings)
    (tmp_path / "linked").symlink_to(settings.home)
    for target in (settings.home, tmp_path / "linked", tmp_path / "x" / ".." / "home"):
        assert not backup.restore(settings, made.path, yes, target=target, dry_run=True).elsewhere


@contextmanager
def serving(repository: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like a Triton server of this repository."""
    argv = [sys.executable, "-c", "import time; time.sleep(600)", f"--model-repository={repository}"]
    process = subprocess.Popen(argv)
    try:
        eventually(lambda: process.pid in [server.pid for server in servers(repository)])
        yield process
    finally:
        process.kill()
        process.wait()


def test_models_that_somebody_serves_are_not_replaced(tmp_path: Path) -> None:
    """A Triton server of any home, and the running stack of the settings' home, protect the repository they serve."""
    settings = deployment(tmp_path)
    made = backup.create(settings)
    before = without_lock(tmp_path)
    drill = {"target": tmp_path / "drill", "repository": settings.model_repository}
    with serving(settings.model_repository) as process:
        for arguments in ({}, drill):
            with pytest.raises(backup.BackupError, match=f"process {process.pid}. serves") as failed:
                backup.restore(settings, made.path, yes, **arguments)  # type: ignore[arg-type]
            assert failed.value.hint and without_lock(tmp_path) == before
        assert not backup.restore(settings, made.path, yes, dry_run=True).done

        def starts(*_: object) -> bool:
            stack.append(serving(tmp_path / "later"))
            stack[0].__enter__()
            return True

        stack: list[object] = []
        other = replace(settings, model_repository=tmp_path / "later")
        try:
            with pytest.raises(backup.BackupError, match="serves"):  # it has begun meanwhile
                backup.restore(other, made.path, starts)  # type: ignore[arg-type]
        finally:
            stack[0].__exit__(None, None, None)  # type: ignore[attr-defined]
    assert without_lock(tmp_path) == before
    write_state(settings.home, "http://127.0.0.1:1")
    with state.lock(settings.home), pytest.raises(backup.BackupError, match="the stack of .*home .process"):
        backup.restore(settings, made.path, yes, **drill)  # type: ignore[arg-type]


def test_a_home_deep_in_the_repository_is_refused(tmp_path: Path) -> None:
    """So are backups there, and one folder for both; directly in it or hidden they are left out and stay."""
    good = deployment(tmp_path / "good")
    made = backup.create(good)
    base = tmp_path / "bad"
    plain = deployment(base)
    repository = plain.model_repository
    for home, backups, what in (
        (repository / "a" / "home", None, "home"), (plain.home, repository / "a" / "b" / "backups", "backups"),
        (repository, base / "b", "home"), (plain.home, repository, "backups"),
    ):  # fmt: skip
        settings = replace(plain, home=home, backup_dir=backups)
        home.mkdir(parents=True, exist_ok=True)
        before = without_lock(base)
        for act in (lambda: backup.create(settings), lambda: backup.restore(settings, made.path, yes)):  # noqa: B023
            with pytest.raises(backup.BackupError, match=what) as failed:
                act()
            assert failed.value.hint and without_lock(base) == before
    for home in (repository / "home", repository / ".hidden" / "home"):
        home.mkdir(parents=True)
        (home / "precious").write_bytes(b"x")
        settings = replace(plain, home=home, backup_dir=None)
        again = backup.create(settings)
        result = backup.restore(settings, again.path, yes)
        assert result.done and (home / "precious").exists() and again.path.exists()
        assert [path.name for path in repository.iterdir() if "before" in path.name] == []


def test_a_drill_does_not_take_the_deployment_for_a_model(tmp_path: Path) -> None:
    """A folder for the drill's models in which the deployment's home or backups lie is refused."""
    settings = deployment(tmp_path / "production")
    made = backup.create(settings)
    before = without_lock(tmp_path)
    for repository in (tmp_path / "production", tmp_path / "production" / "backups"):
        with pytest.raises(backup.BackupError, match="lies in|is both"):
            backup.restore(settings, made.path, yes, target=tmp_path / "drill", repository=repository)
    assert without_lock(tmp_path) == before


def test_places_that_are_none(tmp_path: Path) -> None:
    """A link that leads nowhere and a file where a folder is meant are errors with a hint, for home and models."""
    settings = deployment(tmp_path)
    made = backup.create(settings)
    before = without_lock(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    for name, why in (("dangling", "leads nowhere"), ("file", "is no folder")):
        for target, repository in ((tmp_path / name, tmp_path / "r"), (tmp_path / "h", tmp_path / name)):
            with pytest.raises(backup.BackupError, match=why) as failed:
                backup.restore(settings, made.path, yes, target=target, repository=repository)
            assert failed.value.hint
    (tmp_path / "dangling").unlink()
    (tmp_path / "file").unlink()
    assert without_lock(tmp_path) == before


def test_a_mistyped_name_is_no_empty_deployment(tmp_path: Path) -> None:
    """Without the home or the repository there is no backup, and nothing is made; --no-models needs no repository."""
    settings = deployment(tmp_path)
    before = files(tmp_path)
    for bad in (
        replace(settings, home=tmp_path / "hmoe"), replace(settings, home=tmp_path / "hmoe", backup_dir=None),
        replace(settings, model_repository=tmp_path / "modles"),
    ):  # fmt: skip
        with pytest.raises(backup.BackupError, match="there is no") as failed:
            backup.create(bad)
        assert failed.value.hint and files(tmp_path) == before
    assert backup.create(replace(settings, model_repository=tmp_path / "modles"), models=False).files


def test_what_was_made_for_a_restore_that_failed_goes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new home, a new repository and the folders above them are not there afterwards."""
    import shutil

    settings = deployment(tmp_path)
    made = backup.create(settings)
    before = files(tmp_path)
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: real(folder)._replace(free=1000))
    with pytest.raises(backup.BackupError, match="are free"):
        backup.restore(settings, made.path, yes, target=tmp_path / "a" / "b", repository=tmp_path / "c" / "d")
    assert files(tmp_path) == before
