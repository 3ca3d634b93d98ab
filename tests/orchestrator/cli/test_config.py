"""`truthgpt config`: values with their sources, and a deployment checked offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.settings import Settings


def test_show_names_every_setting_and_its_source(place: Any, tmp_path: Path) -> None:
    """Default, profile, file, environment and flag each show as the source of a value."""
    (tmp_path / "t.toml").write_text("stall_s = 2.5\nmodel = 'from-file'\n")
    place.set(CONFIG=tmp_path / "t.toml", MODEL="from-environment")
    document = place.json("config", "show", "--environment", "staging")
    rows = {row["name"]: row for row in document["settings"]}
    assert set(rows) == set(Settings.table())
    assert rows["stall_s"]["value"] == 2.5 and rows["stall_s"]["source"] == f"file {tmp_path / 't.toml'}"
    assert (rows["model"]["value"], rows["model"]["source"]) == ("from-environment", "environment TRUTHGPT_MODEL")
    assert (rows["precision"]["value"], rows["precision"]["source"]) == ("mixed", "profile staging")
    assert rows["environment"]["source"] == "flag --environment" and rows["host"]["source"] == "default"
    assert document["file"] == str(tmp_path / "t.toml")
    shown = place.run("config", "show").stdout
    assert all(name in shown for name in Settings.table())


def test_show_masks_secrets(place: Any) -> None:
    """The password of the Redis URL appears nowhere, host and user do."""
    place.set(REDIS_URL="redis://user:hunter2@example.org:6379/0")
    for arguments in (("config", "show"), ("config", "show", "--json")):
        output = place.run(*arguments).output
        assert "hunter2" not in output and "***" in output


def problems(place: Any) -> str:
    document = place.json("config", "check", code=1)
    assert document["ok"] is False and all(row["problem"] and row["hint"] for row in document["problems"])
    stderr = place.refused("config", "check")
    assert all(f"error: {row['problem']}" in stderr for row in document["problems"])
    return stderr


def test_a_sound_deployment_passes(place: Any) -> None:
    """With a real entry and the installed server everything is sound, and nothing is left on disk by looking."""
    place.export()
    assert place.json("config", "check") == {"ok": True, "problems": [], "warnings": []}
    assert place.run("config", "check").stdout == "the deployment is sound\n"
    assert not place.home.exists()


def test_all_problems_are_told_at_once(place: Any) -> None:
    """A damaged model and an unreadable Redis URL are both told, each with its hint, by exit code 1."""
    (place.export() / "1" / "model.onnx").write_bytes(b"damaged")
    place.set(REDIS_URL="redis://localhost:port/0")
    stderr = problems(place)
    assert "model.onnx is damaged" in stderr and "redis_url cannot be read" in stderr
    assert stderr.count("hint: ") == 2


def test_wrong_settings_are_problems_too(place: Any) -> None:
    """Ports used twice and values out of range are problems of the deployment, not a failure of the check."""
    place.set(HTTP_PORT="8000", TRITON_HTTP_PORT="8000", DRAIN_S="-1")
    stderr = problems(place)
    assert (
        "http_port and triton_http_port are both 8000" in stderr
        or "triton_http_port and http_port are both 8000" in stderr
    )
    assert "drain_s" in stderr


def test_the_check_is_offline(place: Any, gateway: Any) -> None:
    """What runs is not asked and does not hide what the settings name."""
    place.export()
    place.set(MODEL="other", REDIS_URL="redis://127.0.0.1:1/0")
    assert "the model other (environment TRUTHGPT_MODEL) is not in" in problems(place)
    place.set(MODEL=None)
    assert place.json("config", "check")["ok"] is True  # nobody tried the Redis that is not there


@pytest.mark.parametrize("flag", ["--model", "--model-repository", "--home"])
def test_flags_are_checked_in_place_of_the_environment(place: Any, flag: str, tmp_path: Path) -> None:
    """A deployment can be checked before it is put into the environment."""
    place.export()
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = place.run("config", "check", flag, "missing" if flag == "--model" else str(blocked / "x"))
    assert result.exit_code == 1 and "error: " in result.stderr
