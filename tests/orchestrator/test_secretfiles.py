"""Secrets in files: NAME_FILE is as good as NAME, and a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.settings import Settings, SettingsError


def test_a_secret_may_stand_in_a_file(tmp_path: Path) -> None:
    """A setting that is secret is read from the file that its variable with _FILE names, without its line's end."""
    secret = tmp_path / "redis_url"
    secret.write_text("redis://:hidden@redis:6379/0\n")
    settings = Settings.load(environ={"TRUTHGPT_REDIS_URL_FILE": str(secret)})
    assert settings.redis_url == "redis://:hidden@redis:6379/0"
    assert settings.sources()["redis_url"] == "environment TRUTHGPT_REDIS_URL"
    assert settings.warnings == ()


def test_a_child_process_gets_the_value_whatever_the_parent_was_given(tmp_path: Path) -> None:
    """The environment that is handed to a child, merged over the parent's, has one source for the secret, not two."""
    secret = tmp_path / "redis_url"
    secret.write_text("redis://redis:6379/0")
    parent = {"TRUTHGPT_REDIS_URL_FILE": str(secret)}
    child = {**parent, **Settings.load(environ=parent).child_environ()}
    secret.unlink()
    assert Settings.load(environ=child).redis_url == "redis://redis:6379/0"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "No such file"), (b"", "it is empty"), (b" \n", "it is empty"), (b"\xff", "utf-8"),
        (b"x" * 70_000, "bytes"),
    ],
)  # fmt: skip
def test_a_file_without_a_secret_is_an_error(tmp_path: Path, content: bytes | None, told: str) -> None:
    """A file that is missing, empty, no text or far too large is told with its name, and nothing of what is in it."""
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=told) as caught:
        Settings.load(environ={"TRUTHGPT_AUDIT_KEY_FILE": str(path)})
    assert str(path) in str(caught.value)
    assert "TRUTHGPT_AUDIT_KEY_FILE" in str(caught.value)


def test_both_ways_at_once_are_refused(tmp_path: Path) -> None:
    """Nobody has to guess which of two values counts."""
    path = tmp_path / "key"
    path.write_text("k" * 20)
    environ = {"TRUTHGPT_AUDIT_KEY": "other" * 5, "TRUTHGPT_AUDIT_KEY_FILE": str(path)}
    with pytest.raises(SettingsError, match="both set"):
        Settings.load(environ=environ)


def test_what_is_no_secret_has_no_file() -> None:
    """_FILE is known of secrets alone: of another setting it is told as unknown."""
    settings = Settings.load(environ={"TRUTHGPT_HTTP_PORT_FILE": "/etc/hostname"})
    assert any("TRUTHGPT_HTTP_PORT_FILE" in warning for warning in settings.warnings)
