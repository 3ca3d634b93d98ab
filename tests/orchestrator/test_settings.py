"""The settings table: precedence, sources, validation, secrets and what child processes see."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.settings import PROFILES, Settings, SettingsError

NO_FILE = {"TRUTHGPT_CONFIG": ""}


def load(environ: dict[str, str] | None = None, **flags: object) -> Settings:
    return Settings.load(flags, {**NO_FILE, **(environ or {})})


def problems(environ: dict[str, str] | None = None, **flags: object) -> str:
    with pytest.raises(SettingsError) as caught:
        load(environ, **flags)
    return "\n".join(caught.value.problems)


def test_defaults_match_the_interface() -> None:
    """Without file, environment or flags the documented defaults hold."""
    settings = load()
    names = ("http", "grpc", "ops", "triton_http", "triton_grpc", "triton_metrics")
    assert [getattr(settings, f"{name}_port") for name in names] == [8080, 8081, 9090, 8000, 8001, 8002]
    assert (settings.host, settings.home) == ("127.0.0.1", Path(".truthgpt"))
    assert settings.model_repository == Path("model_repository")
    assert settings.redis_url is None
    assert settings == Settings()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("development", ("DialoGPT-small", "fp32", "cpu", 1, 50, 0.7, True)),
        ("staging", ("DialoGPT-medium", "mixed", "auto", 2, 100, 0.7, False)),
        ("production", ("DialoGPT-medium", "mixed", "auto", 4, 200, 0.7, False)),
    ],
)
def test_profile_sets_the_defaults(name: str, expected: tuple[object, ...]) -> None:
    """Each profile of SYSTEM.md S1 sets model, precision, device, batch, tokens, temperature and debug, and says so."""
    settings = load({"ENVIRONMENT": name})
    fields = ("model", "precision", "device", "max_batch_size", "max_new_tokens", "temperature", "debug")
    assert tuple(getattr(settings, field) for field in fields) == expected
    assert {settings.sources()[field] for field in fields} == {f"profile {name}"}
    assert settings.sources()["environment"] == "environment ENVIRONMENT"


def test_unknown_profile_lists_the_valid_ones() -> None:
    """ENVIRONMENT=prod is refused with the three valid names."""
    assert "must be one of development, staging, production" in problems({"ENVIRONMENT": "prod"})


def test_precedence_and_sources(tmp_path: Path) -> None:
    """A flag beats the environment, which beats the file, which beats the profile and the default."""
    file = tmp_path / "t.toml"
    file.write_text('environment = "staging"\nhttp_port = 1001\ngrpc_port = 1002\nops_port = 1003\ntemperature = 0.1\n')
    environ = {"TRUTHGPT_CONFIG": str(file), "TRUTHGPT_GRPC_PORT": "2002", "TRUTHGPT_OPS_PORT": "2003"}
    settings = Settings.load({"ops_port": 3003, "model": None}, environ)
    assert (settings.http_port, settings.grpc_port, settings.ops_port) == (1001, 2002, 3003)
    sources = settings.sources()
    assert sources["http_port"] == f"file {file}"
    assert sources["grpc_port"] == "environment TRUTHGPT_GRPC_PORT"
    assert sources["ops_port"] == "flag --ops-port"
    assert sources["temperature"] == f"file {file}"
    assert sources["model"] == "profile staging"
    assert sources["host"] == "default"
    assert list(sources) == list(Settings.table())


def test_default_file_is_read_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """./truthgpt.toml is read when TRUTHGPT_CONFIG is not set, and its absence is no error."""
    monkeypatch.chdir(tmp_path)
    assert Settings.load(environ={}).http_port == 8080
    (tmp_path / "truthgpt.toml").write_text("http_port = 4000\n")
    assert Settings.load(environ={}).http_port == 4000
    assert Settings.load(environ=NO_FILE).http_port == 8080


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    """Unknown keys name the nearest valid one, wrong values say what is allowed, and one error carries them all."""
    file = tmp_path / "t.toml"
    file.write_text('htp_port = 1\nstall_s = "soon"\nbody_limit_bytes = 1.5\n')
    text = problems({"TRUTHGPT_CONFIG": str(file), "TRUTHGPT_DEBUG": "maybe"}, http_port=70000)
    assert "unknown setting 'htp_port'; did you mean 'http_port'?" in text
    assert "must be a number; got 'soon'" in text
    assert "must be a whole number; got 1.5" in text
    assert "debug (environment TRUTHGPT_DEBUG) must be true or false; got 'maybe'" in text
    assert "http_port (flag --http-port) must be between 1 and 65535; got 70000" in text


@pytest.mark.parametrize(
    ("content", "reason"), [(b"= 1", "cannot be read"), (b'model = "\xff"', "cannot be read"), (None, "does not exist")]
)
def test_unreadable_file_is_an_error(tmp_path: Path, content: bytes | None, reason: str) -> None:
    """A file that was asked for and is missing, not TOML or not UTF-8 is refused by name."""
    file = tmp_path / "t.toml"
    if content is not None:
        file.write_bytes(content)
    text = problems({"TRUTHGPT_CONFIG": str(file)})
    assert reason in text
    assert str(file) in text


def test_weaker_layers_are_checked_too() -> None:
    """A wrong environment value is reported even where a flag outranks it."""
    assert "TRUTHGPT_HTTP_PORT" in problems({"TRUTHGPT_HTTP_PORT": "x"}, http_port=1234)


def test_unknown_variables_are_warned_about() -> None:
    """An unknown TRUTHGPT_* variable names the nearest valid one and does not stop the start."""
    warnings = load({"TRUTHGPT_HTP_PORT": "1", "OTHER": "x"}).warnings
    assert warnings == ("unknown environment variable TRUTHGPT_HTP_PORT; did you mean 'TRUTHGPT_HTTP_PORT'?",)


def test_conflicts_between_values() -> None:
    """Two listeners on one port and a first-token deadline past the total one are refused offline."""
    assert "grpc_port and http_port are both 8081" in problems(http_port=8081)
    assert "first_token_s is longer" in problems(first_token_s=700)


def test_unknown_override_is_a_programming_error() -> None:
    """A flag that names no setting raises TypeError instead of being dropped."""
    with pytest.raises(TypeError, match="http_port"):
        load(htp_port=1)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@h:1/0",
        "redis://u:hunter2@h",
        "redis://u:a@hunter2@h",
        "redis://u:a/hunter2@h",
        "unix:///s?password=hunter2",
    ],
)
def test_secrets_are_never_printed(url: str) -> None:
    """repr, shown() and error texts never carry the Redis password."""
    settings = load({"TRUTHGPT_REDIS_URL": url})
    assert settings.redis_url == url
    assert "hunter2" not in repr(settings) + str(settings) + settings.shown("redis_url")
    assert "***" in settings.shown("redis_url")
    assert "hunter2" not in problems({"TRUTHGPT_REDIS_URL": url.replace("redis:", "http:").replace("unix:", "http:")})


def test_child_sees_the_same_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """child_environ() reproduces every value in another folder with its own truthgpt.toml, unset values included."""
    file = tmp_path / "t.toml"
    file.write_text('redis_url = "redis://h:1"\nhttp_port = 1234\n')
    variables = {"TRUTHGPT_CONFIG": str(file), "TRUTHGPT_REDIS_URL": "", "ENVIRONMENT": "staging"}
    parent = Settings.load({"max_new_tokens": 7}, variables)
    assert parent.redis_url is None
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "truthgpt.toml").write_text("http_port = 9999\n")
    environ = parent.child_environ()
    home, repository = parent.home.absolute(), parent.model_repository.absolute()
    monkeypatch.chdir(elsewhere)
    child = Settings.load(environ=environ)
    assert child == dataclasses.replace(parent, home=home, model_repository=repository)
    assert child.warnings == ()
    changed = Settings.load(environ=parent.child_environ(redis_url="unix:///run/r.sock"))
    assert changed.redis_url == "unix:///run/r.sock"
    with pytest.raises(TypeError, match="reddis"):
        parent.child_environ(reddis="x")


def test_profiles_only_set_valid_values() -> None:
    """Every profile value parses to itself and names a real field."""
    table = Settings.table()
    for profile in PROFILES.values():
        assert {name: table[name].parse(value) for name, value in profile.items()} == profile


def test_every_setting_is_documented_and_has_a_valid_default() -> None:
    """Help is a sentence, variables are unique, and each default passes its own rules."""
    table = Settings.table()
    assert len({spec.env for spec in table.values()}) == len(table)
    for spec in table.values():
        assert spec.help.endswith("."), spec.name
        assert spec.parse(spec.default) == spec.default, spec.name


@given(name=st.sampled_from(sorted(Settings.table())), raw=st.text(max_size=40))
def test_any_text_is_parsed_or_refused_by_name(name: str, raw: str) -> None:
    """Whatever a variable holds, loading gives a value within the rules or a SettingsError that names the variable."""
    spec = Settings.table()[name]
    try:
        value = getattr(load({spec.env: raw}), name)
    except SettingsError as error:
        assert any(spec.env in problem for problem in error.problems) or "both" in str(error) or "longer" in str(error)
    else:
        if isinstance(value, float):
            assert math.isfinite(value)
        assert value is None or spec.parse(value) == value


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_float_range_is_exact(value: float) -> None:
    """temperature takes exactly the finite numbers from 0 to 2."""
    spec = Settings.table()["temperature"]
    if 0 <= value <= 2:
        assert spec.parse(str(value)) == value
    else:
        with pytest.raises(ValueError, match="must be"):
            spec.parse(str(value))
