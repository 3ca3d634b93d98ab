"""The house's rules: imports go down only, packages do not know each other, modules stay small."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("export", "orchestrator", "backends")
MAX_LINES = 400

# Rooms of orchestrator/ -> the rooms they may import (always their own). `app` and `cli` stand on top of everything.
BASE = {"settings", "errors", "domain", "choices"}
ROOMS: dict[str, set[str]] = {
    "spec": set(),
    "settings_operations": {"spec"},
    "settings_servers": {"spec"},
    "profiles": set(),
    "secretfiles": set(),
    "settings": {"masking", "profiles", "secretfiles", "settings_operations", "settings_servers", "spec"},
    "errors": set(),
    "choices": set(),
    "domain": {"choices"},
    "incident": set(),
    "context": set(),
    "masking": set(),
    "ownership": set(),
    "rotation": set(),
    "sse": set(),
    "pbtxt": set(),
    "openfiles": set(),
    "logwriter": set(),
    "logs": {"context", "domain", "logwriter", "masking", "rotation", "settings"},
    "models": {"settings", "errors", "pbtxt"},
    "engines": {"models"},
    "client": {"sse", "errors"},
    "bench": {"masking", "sse", "api"},
    "redis_connection": set(),
    "redis_url": {"settings", "redis_connection"},
    "store": {"settings", "redis_connection", "redis_url"},
    "triton": BASE | {"sse", "tensors"},
    "tensors": {"domain", "errors"},
    "health": {"domain", "errors", "triton"},
    "balance": {"domain"},
    "resolving": set(),
    "fleet": {"balance", "domain", "errors", "health", "resolving", "triton"},
    "spans": {"domain", "errors", "masking"},
    "tracing": {"domain", "settings", "spans"},
    # one rule each
    "admission": {"errors"},
    "unsafe": set(),
    "sanitize": {"errors", "unsafe"},
    "output": {"choices", "domain", "errors"},
    "retries": set(),
    "breaker": {"errors", "store"},
    "limits_lua": set(),
    "limits": {"domain", "limits_lua", "store"},
    "limits_local": {"domain", "limits"},
    "cache": {"choices", "domain", "store"},
    "broadcast": {"domain", "errors"},
    "relay": {"choices", "domain", "errors", "broadcast", "store"},
    "flights": {"domain", "errors", "broadcast", "cache", "relay", "store"},
    "keys": {"domain"},
    "fingerprint": {"domain", "ownership"},
    "auditlog": {"fingerprint"},
    "auditwriter": {"auditlog", "fingerprint", "ownership"},
    "auditevents": {"domain", "errors", "incident", "auditlog", "fingerprint", "keys", "masking"},
    "audit": {"domain", "incident", "settings", "auditevents", "auditlog", "auditwriter", "fingerprint"},
    "registry": {"keys", "store"},
    "auth": {"domain", "errors", "keys", "registry"},
    "inspection": {"domain", "errors", "fleet", "triton"},
    "tokens": {"domain", "errors", "inspection"},
    "screening": {"domain", "sanitize", "inspection"},
    "operations": {"domain", "errors"},
    "encoding": {"domain", "errors", "tensors"},
    "limiter": {"domain", "errors", "cache", "limits", "limits_local", "store"},
    "upstream": {"choices", "domain", "errors", "breaker", "broadcast", "encoding", "fleet", "output", "retries"},
    "ids": set(),
    "passage": {"domain", "errors", "admission", "cache", "flights", "ids", "limiter"},
    "generation": {"domain", "passage"},
    # the path and its edges
    "gateway": {
        "context", "domain", "errors", "admission", "breaker", "broadcast", "cache", "encoding", "fleet", "flights",
        "health", "limiter", "operations", "passage", "generation", "screening", "tokens", "upstream",
    },
    "api": {
        "ids", "choices", "context", "domain", "encoding", "errors", "incident", "sse", "gateway", "openfiles",
        "tensors",
    },
    # what is counted
    "metrics_table": set(),
    "metrics": {"domain", "errors", "incident", "metrics_table"},
    "metrics_readings": {"audit", "breaker", "gateway", "limiter", "metrics", "store"},
    "scrape": {"metrics", "metrics_table"},
    # operating: `monitor` watches and tells, `jobs` says when what is due; what is done about it is in `ops`
    "activity": {"domain", "store"},
    "monitor": {"masking", "metrics", "metrics_table", "ownership", "scrape", "settings", "store"},
    "jobs": {"settings", "store", "local"},
    "upkeep": {"metrics", "scrape", "settings", "store", "monitor", "jobs"},
    # processes
    "httpcycle": set(),
    "refusals": {"errors"},
    "hardening": {"httpcycle", "refusals"},
    "server": {"settings", "hardening", "openfiles"},
    "worker": {"settings", "logs", "app", "server"},
    "parent": {"settings", "audit", "logs", "tracing", "server", "app", "metrics", "scrape", "upkeep", "jobs"},
    "local": {"rotation", "settings", "errors", "models", "engines", "pbtxt", "client", "triton"},
    "ops": {
        "settings", "errors", "domain", "triton", "store", "models", "engines", "pbtxt", "client", "local", "sse",
        "keys", "cache", "limits", "audit", "auditevents", "auditlog", "auditwriter", "fingerprint", "jobs", "monitor",
        "incident", "rotation", "breaker", "masking", "flights", "fleet", "limiter", "resolving", "sanitize", "bench",
    },
}  # fmt: skip
ROOMS["app"] = set(ROOMS) - {
    "local", "ops", "bench", "client", "models", "engines", "pbtxt", "server", "hardening", "worker", "scrape",
    "monitor", "jobs", "upkeep",
}  # fmt: skip
ROOMS["cli"] = {*ROOMS}

HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "onnxscript", "tokenizers", "safetensors", "numpy"}
BACKEND_MAY = {"numpy", "onnxruntime", "tokenizers", "jinja2", "triton_python_backend_utils", "backends"}


def modules(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob("*.py") if "__pycache__" not in path.parts)


def imports(path: Path, root: Path = ROOT) -> Iterator[tuple[str, int]]:
    """Every dotted name that a module imports, wherever it stands, relative ones resolved."""
    package = [*path.relative_to(root).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            # `from orchestrator import sse` imports a room, `from orchestrator.sse import event` does too
            yield from ((f"{prefix}.{alias.name}", node.lineno) for alias in node.names)


def room(parts: tuple[str, ...] | list[str]) -> str:
    return parts[1].removesuffix(".py") if len(parts) > 1 else ""


ALL = [path for package in PACKAGES for path in modules(package)]


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_do_not_know_each_other(path: Path) -> None:
    """export, backends and orchestrator meet in files and in Triton's protocol only; nobody imports tests."""
    own = path.relative_to(ROOT).parts[0]
    foreign = {*PACKAGES, "demo", "tests", "benchmarks"} - {own}
    found = [f"{path.name}:{line} imports {name}" for name, line in imports(path) if name.split(".")[0] in foreign]
    assert found == []


@pytest.mark.parametrize("path", modules("orchestrator"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    """Each room of orchestrator imports only the rooms that the table above puts below it."""
    own = room(path.relative_to(ROOT).parts)
    if own == "__init__":
        own = "settings"  # the package itself knows nobody
    assert own in ROOMS, f"orchestrator/{own} has no row in this test's table: say what it may import"
    for name, line in imports(path):
        parts = name.split(".")
        if parts[0] != "orchestrator" or len(parts) == 1:
            continue
        target = room(parts)
        if (ROOT / "orchestrator" / target).exists() or (ROOT / "orchestrator" / f"{target}.py").exists():
            assert target == own or target in ROOMS[own], f"{path.name}:{line}: {own} may not import {target}"


@pytest.mark.parametrize("path", modules("orchestrator"), ids=lambda path: str(path.relative_to(ROOT)))
def test_serving_imports_no_tensor_library(path: Path) -> None:
    """The gateway and the CLI run where torch, transformers, onnx and their like are not installed."""
    assert [name for name, _ in imports(path) if name.split(".")[0] in HEAVY] == []


@pytest.mark.parametrize("path", modules("backends"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_backend_imports_what_triton_has(path: Path) -> None:
    """The backend runs inside Triton's stub with numpy, onnxruntime, tokenizers, jinja2 and the standard library."""
    found = {name.split(".")[0] for name, _ in imports(path)}
    assert found - BACKEND_MAY - sys.stdlib_module_names == set()


@pytest.mark.parametrize("path", modules("orchestrator"), ids=lambda path: str(path.relative_to(ROOT)))
def test_one_module_talks_to_each_server(path: Path) -> None:
    """In the gateway only triton.py opens connections to Triton and only store.py to Redis."""
    own = room(path.relative_to(ROOT).parts)
    names = {name.split(".")[0] for name, _ in imports(path)}
    if own not in ("triton", "client", "bench", "local", "ops", "cli"):
        assert not names & {"aiohttp", "tritonclient", "httpx", "requests", "urllib3"}
        if not path.name.startswith("grpc_"):  # the edge that serves it
            assert not names & {"grpc", "google"}
    if own not in ("store", "redis_connection", "local", "ops", "cli"):
        assert "redis" not in names


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_stay_small(path: Path) -> None:
    """A module past 400 lines is asking to be split by noun."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_the_reader_is_not_blind(tmp_path: Path) -> None:
    """Plain, aliased, nested and relative imports are all seen, so the rules above cannot pass by blindness."""
    path = tmp_path / "orchestrator" / "api" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import torch as t, json\nfrom . import http\nfrom ..gateway import Gateway\nfrom orchestrator import app\n"
        "def f():\n    if True:\n        from export.cli import main\n"
    )
    assert {name for name, _ in imports(path, tmp_path)} == {
        "torch",
        "json",
        "orchestrator.api.http",
        "orchestrator.gateway.Gateway",
        "orchestrator.app",
        "export.cli.main",
    }
