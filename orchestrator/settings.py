"""Settings: one frozen, typed table, read once. File < environment < flag.

A value comes from, weakest first: the field's default, the profile that `ENVIRONMENT` names, the TOML file
(`TRUTHGPT_CONFIG`, else `./truthgpt.toml` if it exists), the environment, a command-line flag. `Settings.sources()`
says which one won for each value. All problems are raised as one `SettingsError`, so that a deployment is mended once.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.masking import mask_secret, mask_url
from orchestrator.profiles import PROFILES
from orchestrator.secretfiles import FILE, with_files
from orchestrator.settings_operations import OperationsSettings
from orchestrator.settings_servers import ServerSettings
from orchestrator.spec import Spec, setting

__all__ = ["PROFILES", "Settings", "SettingsError", "mask_url"]

DEFAULT_FILE = "truthgpt.toml"
CONFIG_ENV = "TRUTHGPT_CONFIG"
MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"


class SettingsError(ValueError):
    """One or more settings are wrong; `problems` has a sentence for each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


def _limit(default: object, what: str) -> Any:
    return setting(
        default, f"{what} of a caller for whom nothing else is set; 0 is no limit.", minimum=0, maximum=10**12
    )


def _port(default: int, help: str) -> Any:
    return setting(default, help, minimum=1, maximum=65535)


_DEVELOPMENT = PROFILES["development"]


@dataclass(frozen=True, repr=False)
class Settings(OperationsSettings, ServerSettings):
    """Every setting of TruthGPT. Durations are seconds (`_s`), sizes bytes. Build it with `Settings.load()`."""

    environment: str = setting(
        "development",
        "Profile: the defaults of the settings in the table of profiles.",
        env="ENVIRONMENT",
        choices=tuple(PROFILES),
    )
    home: Path = setting(Path(".truthgpt"), "Folder of the running stack's state, sockets and logs.")
    model_repository: Path = setting(Path("model_repository"), "Triton model repository to serve and to export into.")
    host: str = setting("127.0.0.1", "Address the gateway listens on.")
    http_port: int = _port(8080, "Port of the gateway's HTTP API.")
    grpc: bool = setting(True, "Serve KServe v2 over gRPC.")
    grpc_port: int = _port(8081, "Port of the gateway's gRPC API.")
    ops_port: int = _port(9090, "Port of the metrics and the admin API.")
    ops_host: str = setting("127.0.0.1", "Address the metrics and the admin API listen on.")
    triton_http_port: int = _port(8000, "Triton's HTTP port, on loopback.")
    triton_grpc_port: int = _port(8001, "Triton's gRPC port, on loopback.")
    triton_metrics_port: int = _port(8002, "Triton's metrics port, on loopback.")
    redis_url: str | None = setting(
        None,
        "Redis to use: redis://, rediss:// or unix://. Unset: an embedded one.",
        secret=True,
        pattern=r"(redis|rediss|unix)://.+",
    )
    redis_timeout_s: float = setting(0.02, "Deadline of every Redis call.", minimum=0.001, maximum=10.0)
    redis_max_bytes: int = setting(
        256 << 20, "Memory of the embedded Redis; answers that nobody has asked for lately go first.", minimum=1 << 24,
        maximum=1 << 40,
    )  # fmt: skip
    redis_loss: str = setting(
        "local",
        "Limits while Redis is away: let all pass, refuse all with 503, or count in each process.",
        choices=("fail_open", "fail_closed", "local"),
    )
    model: str = setting(
        _DEVELOPMENT["model"], "Model to serve; while it is not exported, the demo model is.", pattern=MODEL_NAME
    )
    models: str | None = setting(
        None, "Further models to serve beside it, comma-separated.", pattern=rf"{MODEL_NAME}(,{MODEL_NAME})*"
    )
    precision: str = setting(
        _DEVELOPMENT["precision"],
        "Precision to export with; mixed: fp16 on a GPU, fp32 on a CPU.",
        choices=("fp32", "mixed", "int8"),
    )
    device: str = setting(
        _DEVELOPMENT["device"], "Device to serve on; auto takes a GPU if there is one.", choices=("cpu", "cuda", "auto")
    )
    max_batch_size: int = setting(
        _DEVELOPMENT["max_batch_size"],
        "Prompts of one request that are generated at once; the others of its list wait for their turn.",
        minimum=1,
        maximum=1024,
    )
    max_new_tokens: int = setting(
        _DEVELOPMENT["max_new_tokens"],
        "New tokens of a request that does not set max_tokens.",
        minimum=1,
        maximum=1_000_000,
    )
    temperature: float = setting(
        _DEVELOPMENT["temperature"],
        "Sampling temperature of a request that does not set one.",
        minimum=0.0,
        maximum=2.0,
    )
    debug: bool = setting(_DEVELOPMENT["debug"], "Log the traceback of unexpected errors.")
    log_level: str = setting(
        _DEVELOPMENT["log_level"], "Least severe log line that is written; each request is one of level info.",
        choices=("debug", "info", "warning", "error"),
    )  # fmt: skip
    log_file: Path | None = setting(
        None, "File that the gateway logs to. Unset: standard error, and under truthgpt up home/logs/gateway.log."
    )
    log_max_bytes: int = setting(64 << 20, "Size at which a log file is rotated.", minimum=4096, maximum=1 << 40)
    log_files: int = setting(5, "Rotated files that are kept of each log.", minimum=1, maximum=1000)
    audit: bool = setting(True, "Write what happened to each request into the audit log.")
    audit_key: str | None = setting(
        None, "Key of the hashes in the audit log. Unset: a random one, kept in home/audit.key.", secret=True,
        pattern=r".{16,1024}",
    )  # fmt: skip
    audit_max_bytes: int = setting(
        64 << 20, "Size at which the audit log goes on in another file.", minimum=4096, maximum=1 << 40
    )
    otlp_endpoint: str | None = setting(
        None, "OpenTelemetry collector (OTLP over HTTP) that traces are sent to. Unset: no tracing.",
        pattern=r"https?://.+",
    )  # fmt: skip
    trace_ratio: float = setting(
        1.0, "Part of the requests that is traced, of those whose client has not decided.", minimum=0.0, maximum=1.0
    )
    body_limit_bytes: int = setting(
        1 << 20, "Largest request body, checked before parsing.", minimum=1024, maximum=1 << 30
    )
    max_concurrency: int = setting(
        256, "Requests in flight in one worker; more get 503 with Retry-After.", minimum=1, maximum=100_000
    )
    workers: int = setting(1, "Gateway processes that share the HTTP port.", minimum=1, maximum=128)
    trusted_proxies: str | None = setting(
        None, "Comma-separated addresses whose X-Forwarded-For names the client; unset: nobody's does."
    )
    auth: str = setting(
        _DEVELOPMENT["auth"],
        "keys: every request needs an API key. open: none does, in development only.",
        choices=("open", "keys"),
    )
    keys_grace_s: float = setting(
        300.0, "How long known keys go on working while Redis is away.", minimum=0.0, maximum=604_800.0
    )
    api_key: str | None = setting(None, "API key that truthgpt's own commands send to the gateway.", secret=True)
    sanitize: str = setting(
        _DEVELOPMENT["sanitize"],
        "What happens to dangerous text in a prompt: refuse it, remove it, or nothing.",
        choices=("reject", "clean", "off"),
    )
    max_input_chars: int = setting(
        10_000, "Characters of a request's text, all messages together.", minimum=1, maximum=100_000_000
    )
    max_output_chars: int = setting(
        5_000, "Characters of an answer; a longer one ends there with finish_reason length.", minimum=1,
        maximum=100_000_000,
    )  # fmt: skip
    limits: str = setting(
        "enforce", "Rate limits: refuse, only count and say what would be refused, or off.",
        choices=("enforce", "shadow", "off"),
    )  # fmt: skip
    limit_per_minute: int = _limit(_DEVELOPMENT["limit_per_minute"], "Requests in any 60 s")
    limit_per_hour: int = _limit(_DEVELOPMENT["limit_per_hour"], "Requests in any hour")
    limit_per_day: int = _limit(_DEVELOPMENT["limit_per_day"], "Requests in any 24 hours")
    limit_tokens_per_minute: int = _limit(0, "Tokens, prompt and answer, in any 60 s")
    limit_tokens_per_day: int = _limit(0, "Tokens, prompt and answer, in any 24 hours")
    limit_concurrency: int = _limit(0, "Requests at the same time")
    cache: bool = setting(True, "Answer repeated requests of a tenant from the cache.")
    cache_entry_bytes: int = setting(
        256 << 10, "Largest answer that is cached, as stored.", minimum=1024, maximum=16 << 20
    )
    breaker_failures: int = setting(
        5, "Consecutive failures of a model that open its circuit breaker.", minimum=1, maximum=10_000
    )
    breaker_open_s: float = setting(
        5.0, "How long an open breaker refuses before it lets one request try.", minimum=0.05, maximum=3600.0
    )
    retries: int = setting(
        1, "Further attempts at Triton after a failure before the first token.", minimum=0, maximum=10
    )
    fallback_model: str | None = setting(
        None, "Model that answers while the one asked for cannot; the answer is marked.", pattern=MODEL_NAME
    )
    fallback_text: str | None = setting(
        None, "Text that answers when no model can; the answer is marked. Unset: the error is returned."
    )
    connect_s: float = setting(1.0, "Deadline of a connection to Triton.", minimum=0.01, maximum=60.0)
    token_gap_s: float = setting(30.0, "Deadline between two pieces of an answer.", minimum=0.05, maximum=3600.0)
    stall_s: float = setting(
        1.5,
        "A Triton stream silent for this long is dead (a live one writes every 0.25 s).",
        minimum=0.3,
        maximum=600.0,
    )
    heartbeat_interval_s: float = setting(0.4, "Pause between two heartbeats of a model.", minimum=0.01, maximum=60.0)
    heartbeat_timeout_s: float = setting(
        1.0, "A heartbeat unanswered for this long makes the model not ready.", minimum=0.01, maximum=60.0
    )
    engine_stall_s: float = setting(
        30.0, "A busy engine that finishes no step for this long is not ready.", minimum=0.1, maximum=3600.0
    )
    first_token_s: float = setting(
        120.0, "Deadline of a request's first token, queueing included.", minimum=0.01, maximum=86_400.0
    )
    request_timeout_s: float = setting(600.0, "Deadline of a whole request.", minimum=0.01, maximum=86_400.0)
    drain_s: float = setting(
        10.0, "Time that running requests get to finish when the gateway stops.", minimum=0.0, maximum=3600.0
    )
    start_timeout_s: float = setting(120.0, "Time that the stack gets to become ready.", minimum=1.0, maximum=3600.0)

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
        environ = with_files(environ, [spec.env for spec in specs.values() if spec.secret], problems)
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
        known += [spec.env + FILE for spec in specs.values() if spec.secret]
        warnings = tuple(
            f"unknown environment variable {name}{_nearest(name, known)}"
            for name in sorted(environ) if name.startswith("TRUTHGPT_") and name not in known
        )  # fmt: skip
        return cls(**typing.cast(dict[str, Any], values), _sources=sources, config_file=config_file, warnings=warnings)

    @classmethod
    def table(cls) -> dict[str, Spec]:
        """All settings by name, in the order they are shown and documented."""
        hints, table = typing.get_type_hints(cls), {}
        inherited = {item.name for group in (ServerSettings, OperationsSettings) for item in dataclasses.fields(group)}
        for item in sorted(dataclasses.fields(cls), key=lambda item: item.name in inherited):
            if "help" not in item.metadata:
                continue
            hint = hints[item.name]
            optional = isinstance(hint, types.UnionType)
            kind = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType) if optional else hint
            rules = {"env": f"TRUTHGPT_{item.name.upper()}", **item.metadata}
            table[item.name] = Spec(name=item.name, kind=kind, optional=optional, default=item.default, **rules)
        return table

    @property
    def backups(self) -> Path:
        """The folder of the backups."""
        return self.backup_dir or self.home / "backups"

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
        return mask_secret(str(value)) if spec.secret else str(value)

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
            if spec.secret:
                result[spec.env + FILE] = ""
        if changes:
            raise TypeError(f"unknown settings: {', '.join(changes)}")
        # an empty variable means: no file, so that a truthgpt.toml in the child's folder is not read
        result[CONFIG_ENV] = "" if self.config_file is None else str(self.config_file.absolute())
        return result

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{name}={self.shown(name)!r}' for name in self.table())})"


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
    if values["auth"] == "open" and values["environment"] != "development":
        problems.append(f"auth is open, which {values['environment']} refuses; set TRUTHGPT_AUTH=keys")
    if values["first_token_s"] > values["request_timeout_s"]:
        problems.append("first_token_s is longer than request_timeout_s")
    if values["alert_email_to"] and not values["smtp_url"]:
        problems.append("alert_email_to is set, but no smtp_url that mails could be sent by")
    return problems
