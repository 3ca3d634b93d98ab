"""The gateways that ours is compared with: an environment of their own each, pinned, and how they are configured.

    python -m benchmarks.gateway --install-peers

They are measured as their own documentation says to run them in production: one worker, no debug output; nothing is
fetched from elsewhere at run time. What each one is told stands below and in benchmarks/README.md.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from benchmarks import gateway_load, gateway_mock
from benchmarks.gateway_load import Ask
from benchmarks.gateway_machine import cores
from benchmarks.gateway_systems import System, answers_chat, chat_body, free_ports, own_environ, post, start

PEERS = Path(__file__).parent / ".peers"
LITELLM = PEERS / "litellm"
PORTKEY = PEERS / "portkey"
PERF_ANALYZER = PEERS / "perf_analyzer"
# The newest that can be installed beside the certificates package of the registry at the time of writing.
LITELLM_PACKAGES = ("litellm[proxy]==1.106.2", "prometheus-client==0.26.0")
PORTKEY_PACKAGE = "@portkey-ai/gateway@1.15.2"
# Its streams answer 500 with a later one (Portkey-AI/gateway, issue 1389).
PORTKEY_OVERRIDES = {"@hono/node-server": "1.14.1"}
# The last tritonclient whose wheel carries the program; its two libraries come from Triton's own wheel.
PERF_WHEEL = "tritonclient==2.48.0"

_KEY = "sk-" + secrets.token_hex(32)
_OFFLINE = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # prices from the package, not from the network
    "LITELLM_LOCAL_BLOG_POSTS": "True",
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
    "LITELLM_LOG": "ERROR",
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_MASTER_KEY": _KEY,  # without one this version does not start
    "NO_DOCS": "True",
    "DISABLE_ADMIN_UI": "True",
}
# Virtual keys live in a database. A custom check is the documented way to have a key with limits without one.
_AUTH = f'''from litellm.proxy._types import ProxyException, UserAPIKeyAuth


async def check(request, api_key):
    if api_key != "{_KEY}":
        raise ProxyException(message="unknown key", type="auth_error", param=None, code=401)
    return UserAPIKeyAuth(api_key=api_key, user_id="bench", rpm_limit=10**9, tpm_limit=10**9)
'''


@dataclass(frozen=True)
class Environment:
    """A folder with pinned packages; `stamp` has what was installed."""

    folder: Path
    wanted: str

    @property
    def ready(self) -> bool:
        stamp = self.folder / "installed"
        return stamp.is_file() and stamp.read_text() == self.wanted

    def done(self) -> None:
        (self.folder / "installed").write_text(self.wanted)


ENVIRONMENTS = {
    "litellm": Environment(LITELLM, " ".join(LITELLM_PACKAGES)),
    "portkey": Environment(PORTKEY, f"{PORTKEY_PACKAGE} {PORTKEY_OVERRIDES}"),
    "grpc": Environment(PERF_ANALYZER, PERF_WHEEL),
}


def install(names: list[str]) -> None:
    """Build the environments that are missing or of other versions. Raises ClickException with what pip or npm said."""
    for name in names:
        environment = ENVIRONMENTS.get(name)
        if environment is None or environment.ready:
            continue
        click.echo(f"installing {environment.wanted} into {environment.folder}", err=True)
        environment.folder.mkdir(parents=True, exist_ok=True)
        {"litellm": _litellm_packages, "portkey": _portkey_package, "grpc": _perf_analyzer}[name]()
        environment.done()


def missing(names: list[str]) -> list[str]:
    return [name for name in names if name in ENVIRONMENTS and not ENVIRONMENTS[name].ready]


def _litellm_packages() -> None:
    _run(sys.executable, "-m", "venv", str(LITELLM))
    _run(str(LITELLM / "bin" / "pip"), "install", "--disable-pip-version-check", "-q", *LITELLM_PACKAGES)


def _portkey_package() -> None:
    if shutil.which("npm") is None:
        raise click.ClickException("npm is not installed; Portkey needs Node.js 18 or newer (leave it out with --only)")
    package = {"name": "peer", "private": True, "overrides": PORTKEY_OVERRIDES}
    (PORTKEY / "package.json").write_text(json.dumps(package))
    _run("npm", "install", "--no-audit", "--no-fund", "--prefix", str(PORTKEY), PORTKEY_PACKAGE)


def _perf_analyzer() -> None:
    from zipfile import ZipFile

    from orchestrator.local import tritonserver

    folder = PERF_ANALYZER
    _run(
        sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "-q", "--no-deps", "-d", str(folder),
        "--platform", "manylinux1_x86_64", "--only-binary", ":all:", PERF_WHEEL,
    )  # fmt: skip
    with ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(entry for entry in wheel.namelist() if entry.endswith("/bin/perf_analyzer"))
        (folder / "perf_analyzer").write_bytes(wheel.read(name))
    (folder / "perf_analyzer").chmod(0o755)
    libraries = tritonserver.find().libraries
    for library, pattern in (("libb64.so.0d", "libb64-*"), ("libcudart.so.12", "libcudart-*")):
        link = folder / library
        link.unlink(missing_ok=True)
        link.symlink_to(next(libraries.glob(pattern)))


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode != 0:
        raise click.ClickException(f"{' '.join(argv[:3])} failed:\n{(done.stderr or done.stdout)[-2000:]}")


def litellm_plain(folder: Path, upstream: int) -> System:
    """LiteLLM with one model and the master key, without which it does not start: no cache, no limits, no callbacks."""
    return _litellm(folder, "litellm", _litellm_config(upstream))


def litellm_full(folder: Path, upstream: int, redis_port: int) -> System:
    """LiteLLM with a key, its Redis cache, limits per key counted in Redis, and Prometheus."""
    config = _litellm_config(upstream)
    config["litellm_settings"] |= {
        "cache": True,
        "cache_params": {"type": "redis", "host": "127.0.0.1", "port": redis_port, "ttl": 3600},
        "callbacks": ["prometheus"],
    }
    config["general_settings"] = {"custom_auth": "bench_auth.check"}
    system = _litellm(folder, "litellm-full", config)
    system.hit = b"x-litellm-cache-key:"
    return system


def _litellm_config(upstream: int) -> dict[str, Any]:
    model = {
        "model_name": gateway_mock.MODEL,
        "litellm_params": {
            "model": f"openai/{gateway_mock.MODEL}", "api_base": f"http://127.0.0.1:{upstream}/v1", "api_key": "none",
        },
    }  # fmt: skip
    return {
        "model_list": [model],
        "litellm_settings": {"set_verbose": False, "request_timeout": 600, "telemetry": False},
    }


def _litellm(folder: Path, name: str, config: dict[str, Any]) -> System:
    home = folder / name
    home.mkdir()
    (home / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    (home / "bench_auth.py").write_text(_AUTH)
    (port,) = free_ports(1)
    argv = [
        str(LITELLM / "bin" / "litellm"), "--config", str(home / "config.yaml"), "--host", "127.0.0.1",
        "--port", str(port), "--num_workers", "1",
    ]  # fmt: skip
    environ = {**own_environ(), **_OFFLINE, "PATH": f"{LITELLM / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"}
    process = start(name, argv, environ, home / "log", cores()[0], cwd=home)
    return System(name, port, process, partial(answers_chat, port, gateway_mock.MODEL, _KEY), _KEY)


def portkey(folder: Path, upstream: int) -> System:
    """Portkey's open-source gateway, told by headers which upstream to ask: it has no other configuration."""
    (port,) = free_ports(1)
    argv = [
        "node", str(PORTKEY / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"),
        f"--port={port}", "--headless",
    ]  # fmt: skip
    environ = {**own_environ(), "NODE_ENV": "production"}
    process = start("portkey", argv, environ, folder / "portkey.log", cores()[0])
    headers = (
        ("x-portkey-provider", "openai"), ("x-portkey-custom-host", f"http://127.0.0.1:{upstream}/v1"),
        ("Authorization", "Bearer none"),
    )  # fmt: skip

    def ask(*given: Any, **changes: Any) -> Ask:
        return gateway_load.chat(*given, **changes, headers=headers)

    async def verify() -> str | None:
        body = chat_body(gateway_mock.MODEL)
        status, whole, _ = await post(port, "/v1/chat/completions", body, headers=dict(headers))
        return None if status == 200 and whole["choices"][0]["message"]["content"] else f"status {status}: {whole}"

    return System("portkey", port, process, verify, ask=ask)
