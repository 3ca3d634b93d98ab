"""Settings: one frozen, typed table, read once. File < environment < flag.

A value comes from, weakest first: the field's default, the profile that `ENVIRONMENT` names, the TOML file
(`TRUTHGPT_CONFIG`, else `./truthgpt.toml` if it exists), the environment, a command-line flag. `Settings.sources()`
says which one won for each value. All problems are raised as one `SettingsError`, so that a deployment is mended once.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_FILE = "truthgpt.toml"
CONFIG_ENV = "TRUTHGPT_CONFIG"
MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
# greedy: a password with an unescaped @ or / is masked whole
_URL_PASSWORD = re.compile(r"(?s)(?<=://)([^:/?#@]*):.*@")

PROFILES: Mapping[str, Mapping[str, object]] = {
    "development": {
        "model": "DialoGPT-small", "precision": "fp32", "device": "cpu", "max_batch_size": 1,
        "max_new_tokens": 50, "temperature": 0.7, "debug": True,
    },
    "staging": {
        "model": "DialoGPT-medium", "precision": "mixed", "device": "auto", "max_batch_size": 2,
        "max_new_tokens": 100, "temperature": 0.7, "debug": False,
    },
    "production": {
        "model": "DialoGPT-medium", "precision": "mixed", "device": "auto", "max_batch_size": 4,
        "max_new_tokens": 200, "temperature": 0.7, "debug": False,
    },
}  # fmt: skip


class SettingsError(ValueError):
    """One or more settings are wrong; `problems` has a sentence for each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One row of the settings table: what a value may be and how it is called on each surface."""

    name: str
    env: str
    help: str
    kind: type
    optional: bool
    default: object
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    pattern: str | None = None
    secret: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def parse(self, raw: object) -> object:
        """A string (environment, flag) or TOML value as this field's type; ValueError says what was expected."""
        if self.optional and (raw is None or raw == ""):
            return None
        value = self._convert(raw)
        if self.choices and value not in self.choices:
            raise ValueError(f"must be one of {', '.join(self.choices)}; got {self._show(raw)}")
        if self.pattern is not None and re.fullmatch(self.pattern, str(value)) is None:
            raise ValueError(f"must match {self.pattern}; got {self._show(raw)}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low, high = self.minimum, self.maximum
            if (low is not None and value < low) or (high is not None and value > high):
                raise ValueError(f"must be between {_number(low)} and {_number(high)}; got {self._show(raw)}")
        return value

    def _convert(self, raw: object) -> object:
        if self.kind is bool:
            if isinstance(raw, bool):
                return raw
            text = str(raw).strip().lower()
            if text in _TRUE or text in _FALSE:
                return text in _TRUE
            raise ValueError(f"must be true or false; got {self._show(raw)}")
        if isinstance(raw, bool) or not isinstance(raw, (str, int, float, Path)):
            raise ValueError(f"must be {self._noun()}; got {self._show(raw)}")
        if self.kind is int:
            if isinstance(raw, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", raw.strip()):
                return int(raw)
            if isinstance(raw, int):
                return raw
        elif self.kind is float:
            try:
                number = float(raw) if not isinstance(raw, Path) else math.nan
            except (ValueError, OverflowError):
                number = math.nan
            if math.isfinite(number):
                return number
        elif isinstance(raw, (str, Path)) and str(raw) != "" and "\0" not in str(raw):
            return Path(os.path.expanduser(raw)) if self.kind is Path else str(raw)
        raise ValueError(f"must be {self._noun()}; got {self._show(raw)}")

    def _noun(self) -> str:
        return {int: "a whole number", float: "a number", Path: "a path", str: "a text"}[self.kind]

    def _show(self, raw: object) -> str:
        return "a value that is not shown (secret)" if self.secret else repr(raw)[:80]


def _number(value: float | None) -> str:
    return "any" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _setting(default: object, help: str, **rules: Any) -> Any:
    return field(default=default, metadata={"help": help, **rules})


def _port(default: int, help: str) -> Any:
    return _setting(default, help, minimum=1, maximum=65535)


_DEVELOPMENT = PROFILES["development"]


@dataclass(frozen=True, repr=False)
class Settings:
    """Every setting of TruthGPT. Durations are seconds (`_s`), sizes bytes. Build it with `Settings.load()`."""

    environment: str = _setting(
        "development",
        "Profile with the defaults of model, precision, device, batch, tokens and debug.",
        env="ENVIRONMENT",
        choices=tuple(PROFILES),
    )
    home: Path = _setting(Path(".truthgpt"), "Folder of the running stack's state, sockets and logs.")
    model_repository: Path = _setting(Path("model_repository"), "Triton model repository to serve and to export into.")
    host: str = _setting("127.0.0.1", "Address the gateway listens on.")
    http_port: int = _port(8080, "Port of the gateway's HTTP API.")
    grpc_port: int = _port(8081, "Port reserved for the gateway's gRPC API.")
    ops_port: int = _port(9090, "Port reserved for metrics and operations.")
    triton_http_port: int = _port(8000, "Triton's HTTP port, on loopback.")
    triton_grpc_port: int = _port(8001, "Triton's gRPC port, on loopback.")
    triton_metrics_port: int = _port(8002, "Triton's metrics port, on loopback.")
    redis_url: str | None = _setting(
        None,
        "Redis to use: redis://, rediss:// or unix://. Unset: an embedded one.",
        secret=True,
        pattern=r"(redis|rediss|unix)://.+",
    )
    redis_timeout_s: float = _setting(0.02, "Deadline of every Redis call.", minimum=0.001, maximum=10.0)
    model: str = _setting(
        _DEVELOPMENT["model"], "Model to serve; while it is not exported, the demo model is.", pattern=MODEL_NAME
    )
    precision: str = _setting(
        _DEVELOPMENT["precision"],
        "Precision to export with; mixed: fp16 on a GPU, fp32 on a CPU.",
        choices=("fp32", "mixed", "int8"),
    )
    device: str = _setting(
        _DEVELOPMENT["device"], "Device to serve on; auto takes a GPU if there is one.", choices=("cpu", "cuda", "auto")
    )
    max_batch_size: int = _setting(
        _DEVELOPMENT["max_batch_size"],
        "Prompts of one request that are generated at once; the others of its list wait for their turn.",
        minimum=1,
        maximum=1024,
    )
    max_new_tokens: int = _setting(
        _DEVELOPMENT["max_new_tokens"],
        "New tokens of a request that does not set max_tokens.",
        minimum=1,
        maximum=1_000_000,
    )
    temperature: float = _setting(
        _DEVELOPMENT["temperature"],
        "Sampling temperature of a request that does not set one.",
        minimum=0.0,
        maximum=2.0,
    )
    debug: bool = _setting(_DEVELOPMENT["debug"], "Log the traceback of unexpected errors.")
    log_level: str = _setting(
        "info", "Least severe log line that is written.", choices=("debug", "info", "warning", "error")
    )
    body_limit_bytes: int = _setting(
        1 << 20, "Largest request body, checked before parsing.", minimum=1024, maximum=1 << 30
    )
    max_concurrency: int = _setting(
        256, "Requests in flight in one gateway; more get 503 with Retry-After.", minimum=1, maximum=100_000
    )
    stall_s: float = _setting(
        1.5,
        "A Triton stream silent for this long is dead (a live one writes every 0.25 s).",
        minimum=0.3,
        maximum=600.0,
    )
    heartbeat_interval_s: float = _setting(0.4, "Pause between two heartbeats of a model.", minimum=0.01, maximum=60.0)
    heartbeat_timeout_s: float = _setting(
        1.0, "A heartbeat unanswered for this long makes the model not ready.", minimum=0.01, maximum=60.0
    )
    engine_stall_s: float = _setting(
        30.0, "A busy engine that finishes no step for this long is not ready.", minimum=0.1, maximum=3600.0
    )
    first_token_s: float = _setting(
        120.0, "Deadline of a request's first token, queueing included.", minimum=0.01, maximum=86_400.0
    )
    request_timeout_s: float = _setting(600.0, "Deadline of a whole request.", minimum=0.01, maximum=86_400.0)
    drain_s: float = _setting(
        10.0, "Time that running requests get to finish when the gateway stops.", minimum=0.0, maximum=3600.0
    )
    start_timeout_s: float = _setting(120.0, "Time that the stack gets to become ready.", minimum=1.0, maximum=3600.0)

    _sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    config_file: Path | None = field(default=None, compare=False)
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def load(cls, overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read file, environment and `overrides` (flags by field name; None means not given).

        Unknown keys in the file are errors; unknown `TRUTHGPT_*` variables become `warnings`, because another version
        of TruthGPT may know them. Raises SettingsError with every problem found.
        """
        specs = cls.table()
        problems: list[str] = []
        config_file, in_file = _read_file(environ.get(CONFIG_ENV), problems)
        # (source, key as the user wrote it, raw value), strongest layer last
        given: dict[str, list[tuple[str, object]]] = {name: [] for name in specs}
        for key, raw in in_file.items():
            if key in specs:
                given[key].append((f"file {config_file}", raw))
            else:
                problems.append(f"{config_file}: unknown setting {key!r}{_nearest(key, specs)}")
        for spec in specs.values():
            if spec.env in environ and (environ[spec.env] != "" or spec.optional):
                given[spec.name].append((f"environment {spec.env}", environ[spec.env]))
        for key, raw in (overrides or {}).items():
            if key not in specs:
                raise TypeError(f"unknown override {key!r}{_nearest(key, specs)}")
            if raw is not None:
                given[key].append((f"flag {specs[key].flag}", raw))

        parsed: dict[str, tuple[str, object]] = {}
        for name, layers in given.items():
            for source, raw in layers:  # every layer is checked, so that a wrong value is not hidden by a stronger one
                try:
                    parsed[name] = (source, specs[name].parse(raw))
                except ValueError as error:
                    problems.append(f"{name} ({source}) {error}")
        profile = str(parsed["environment"][1]) if "environment" in parsed else "development"
        values, sources = {}, {}
        for name, spec in specs.items():
            if name in parsed:
                sources[name], values[name] = parsed[name]
            elif name in PROFILES[profile]:
                sources[name], values[name] = f"profile {profile}", PROFILES[profile][name]
            else:
                sources[name], values[name] = "default", spec.default
        problems += _conflicts(values)
        if problems:
            raise SettingsError(problems)
        known = [spec.env for spec in specs.values()] + [CONFIG_ENV]
        warnings = tuple(
            f"unknown environment variable {name}{_nearest(name, known)}"
            for name in sorted(environ) if name.startswith("TRUTHGPT_") and name not in known
        )  # fmt: skip
        return cls(**typing.cast(dict[str, Any], values), _sources=sources, config_file=config_file, warnings=warnings)

    @classmethod
    def table(cls) -> dict[str, Spec]:
        """All settings by name, in the order they are shown and documented."""
        hints, table = typing.get_type_hints(cls), {}
        for item in dataclasses.fields(cls):
            if "help" not in item.metadata:
                continue
            hint = hints[item.name]
            optional = isinstance(hint, types.UnionType)
            kind = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType) if optional else hint
            rules = {"env": f"TRUTHGPT_{item.name.upper()}", **item.metadata}
            table[item.name] = Spec(name=item.name, kind=kind, optional=optional, default=item.default, **rules)
        return table

    def sources(self) -> dict[str, str]:
        """Where each value came from: default | profile NAME | file PATH | environment VAR | flag --NAME."""
        return {name: self._sources.get(name, "default") for name in self.table()}

    def shown(self, name: str) -> str:
        """The value as text that may be printed: secrets masked, unset as an empty text."""
        value, spec = getattr(self, name), self.table()[name]
        if value is None:
            return ""
        if isinstance(value, bool):
            return str(value).lower()
        return mask_url(str(value)) if spec.secret else str(value)

    def child_environ(self, **changes: object) -> dict[str, str]:
        """Environment variables that make a child process load these values (with `changes`), whatever its folder.

        Merge it over the parent's environment. Unset optional values are empty variables, which outrank the file; paths
        are absolute.
        """
        result = {}
        for spec in self.table().values():
            value = spec.parse(changes.pop(spec.name)) if spec.name in changes else getattr(self, spec.name)
            if isinstance(value, Path):
                value = value.absolute()
            result[spec.env] = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        if changes:
            raise TypeError(f"unknown settings: {', '.join(changes)}")
        # an empty variable means: no file, so that a truthgpt.toml in the child's folder is not read
        result[CONFIG_ENV] = "" if self.config_file is None else str(self.config_file.absolute())
        return result

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{name}={self.shown(name)!r}' for name in self.table())})"


def mask_url(url: str) -> str:
    """The URL with its password (and any password query parameter) replaced by `***`."""
    masked = _URL_PASSWORD.sub(r"\1:***@", url)
    return re.sub(r"(?i)([?&](?:password|username)=)[^&#]*", r"\1***", masked)


def _read_file(chosen: str | None, problems: list[str]) -> tuple[Path | None, dict[str, object]]:
    if chosen == "":
        return None, {}
    path = Path(chosen or DEFAULT_FILE)
    try:
        return path, tomllib.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        if chosen:
            problems.append(f"{CONFIG_ENV} names {path}, which does not exist")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        problems.append(f"{path} cannot be read: {error}")
    return None, {}


def _nearest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def _conflicts(values: Mapping[str, Any]) -> list[str]:
    problems = []
    ports = [name for name in values if name.endswith("_port")]
    for index, name in enumerate(ports):
        problems += [
            f"{name} and {other} are both {values[name]}" for other in ports[:index] if values[other] == values[name]
        ]
    if values["first_token_s"] > values["request_timeout_s"]:
        problems.append("first_token_s is longer than request_timeout_s")
    return problems
