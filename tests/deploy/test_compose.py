"""docker-compose.yml and what its containers are made of: everything that can be checked without an engine is."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.local.redisserver import binary
from orchestrator.secretfiles import FILE
from orchestrator.settings import Settings
from tests.e2e.stack import free_ports

ROOT = Path(__file__).resolve().parents[2]
COMPOSE, DOCKER = ROOT / "deploy" / "compose", ROOT / "deploy" / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
SETTINGS = {spec.env: spec for spec in Settings.table().values()}
PROFILES = ("cpu", "gpu")


def program(name: str, package: str) -> str:
    """A program of Debian's that a test needs."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian's package {package} has it)")
    return path


def compose(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """docker-compose's word on the file; no engine is needed for that."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRUTHGPT_", "EXPORT_"))}
    argv = [program("docker-compose", "docker-compose"), *arguments]
    return subprocess.run(argv, cwd=ROOT, env=kept | environ, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """Every service of either profile, as docker-compose 1.29 reads them."""
    found: dict[str, Any] = {}
    for profile in PROFILES:
        done = compose("--profile", profile, "config")
        assert done.returncode == 0, done.stderr
        found |= yaml.safe_load(done.stdout)["services"]
    return found


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """The file as it is written."""
    return dict(yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8")))


def test_each_profile_has_one_triton_and_all_else(services: dict[str, Any]) -> None:
    """What is asked for is there: gateways behind a proxy, Triton, Redis, the monitoring and the one-shot export."""
    assert set(services) == {
        "proxy", "gateway", "triton-cpu", "triton-gpu", "export", "redis", "prometheus", "alertmanager", "grafana",
    }  # fmt: skip
    assert {name: service["profiles"] for name, service in services.items() if "profiles" in service} == {
        f"triton-{profile}": [profile] for profile in PROFILES
    }
    devices = services["triton-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices[0]["capabilities"] == ["gpu"]
    assert services["gateway"]["deploy"]["replicas"] == 2


def test_a_service_has_no_more_rights_than_it_needs(services: dict[str, Any]) -> None:
    """No root, no writable image, no capability; bounds on memory, processors and processes, and rotated logs."""
    for name, service in services.items():
        user = str(service["user"]).split(":")[0]
        assert user.isdecimal() and int(user) > 0, name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"] and "cap_add" not in service, name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert not service.get("privileged"), name
        assert service["mem_limit"] and float(service["cpus"]) > 0 and service["pids_limit"] > 0, name
        assert service["logging"]["options"]["max-size"], name


def test_every_service_that_stays_says_how_it_is(services: dict[str, Any]) -> None:
    """Whoever runs for long has a health check with bounds, comes back when it fails, and has time to end."""
    for name, service in services.items():
        if name == "export":  # runs once
            assert service["restart"] == "no"
            continue
        assert service["restart"] == "unless-stopped", name
        check = service["healthcheck"]
        assert check["test"] and check["interval"] and check["timeout"] and check["retries"], name


def test_only_the_proxy_is_published(services: dict[str, Any], whole: dict[str, Any]) -> None:
    """One door: every other service is on inner networks, of which those with secrets or models lead nowhere."""
    assert [name for name, service in services.items() if service.get("ports")] == ["proxy"]
    internal = {name for name, network in whole["networks"].items() if (network or {}).get("internal")}
    assert internal == {"inner", "data", "triton", "monitoring"}
    for name in ("gateway", "triton-cpu", "triton-gpu", "redis", "prometheus", "grafana"):
        assert set(services[name]["networks"]) <= internal, name
    # who asks for a name gets the address on the network that the two are meant to meet on, and no other
    assert services["gateway"]["networks"]["inner"]["aliases"] == ["gateways"]
    assert services["triton-cpu"]["networks"]["triton"]["aliases"] == ["triton"]


def test_images_are_pinned(services: dict[str, Any]) -> None:
    """Each image has a version with a patch level or a monthly release, in the Compose file and in the Dockerfiles."""
    images = {service["image"] for service in services.values()}
    for path in DOCKERFILES:
        named = re.findall(r"^FROM (\S+)(?: AS \S+)?$", path.read_text(encoding="utf-8"), re.MULTILINE)
        stages = set(re.findall(r"^FROM \S+ AS (\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE))
        images |= set(named) - stages
    for image in images:
        version = image.partition(":")[2]
        assert re.match(r"v?\d+\.\d+\.\d+|\d\d\.\d\d-py3$", version), image
    with (ROOT / "pyproject.toml").open("rb") as file:
        ours = tomllib.load(file)["project"]["version"]
    assert all(f":{ours}" in image for image in images if image.startswith("truthgpt-"))


def test_secrets_come_from_files(services: dict[str, Any], whole: dict[str, Any]) -> None:
    """No secret stands in the file or in a container's environment: each is a file that make-secrets makes."""
    made = set(re.findall(r"^make_secret (\w+)", (ROOT / "deploy" / "make-secrets").read_text(), re.MULTILINE))
    assert {name: row["file"] for name, row in whole["secrets"].items()} == {
        name: f"./deploy/secrets/{name}" for name in made
    }
    for name, service in services.items():
        for variable in service.get("environment", {}):
            assert not (variable in SETTINGS and SETTINGS[variable].secret), f"{name}: {variable}"
            if variable.endswith(("_FILE", "__FILE")):
                secret = service["environment"][variable].removeprefix("/run/secrets/")
                assert secret in [row["source"] for row in service["secrets"]], f"{name}: {variable}"
    assert "/deploy/secrets/" in (ROOT / ".gitignore").read_text().split()


def test_settings_exist_and_agree(services: dict[str, Any], tmp_path: Path) -> None:
    """The gateway's environment is one that it starts with, in every profile, and nothing in it is unknown."""
    for environment in ("development", "staging", "production"):
        environ = dict(services["gateway"]["environment"]) | {"ENVIRONMENT": environment}
        for variable in [name for name in environ if name.endswith(FILE)]:
            secret = tmp_path / variable
            secret.write_text("redis://:secret@redis:6379/0" if "REDIS" in variable else "k" * 32)
            environ[variable] = str(secret)
        settings = Settings.load(environ=environ)
        assert settings.warnings == ()
        assert settings.triton_urls == "http://triton:8000" and settings.workers == 2
    subnet = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["networks"]["inner"]["ipam"]["config"][0][
        "subnet"
    ]
    assert settings.trusted_proxies == subnet


def test_what_is_mounted_is_there(services: dict[str, Any], whole: dict[str, Any]) -> None:
    """Each file that a container gets exists in the repository, each volume is declared, configuration is read-only."""
    for name, service in services.items():
        for mount in service.get("volumes", []):
            source, target, mode = (*mount.split(":"), "rw")[:3]
            if source.startswith("/"):
                assert Path(source).is_file(), f"{name}: {source}"
                assert mode == "ro", f"{name}: {target}"
            else:
                assert source in whole["volumes"], f"{name}: {source}"
        if name.startswith("triton"):
            assert service["shm_size"] == "1gb" and "models:/models:ro" in service["volumes"]
    assert "backups:/backups:rw" in services["gateway"]["volumes"]


def test_looking_from_this_machine_stays_on_this_machine() -> None:
    """The file that publishes Grafana and the others publishes them on loopback alone."""
    done = compose("-f", "docker-compose.yml", "-f", "deploy/compose/look.yml", "--profile", "cpu", "config")
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    published = {name: row["ports"] for name, row in services.items() if row.get("ports")}
    assert set(published) == {"proxy", "grafana", "prometheus", "alertmanager"}
    for name in published.keys() - {"proxy"}:
        assert all(str(port).startswith("127.0.0.1:") for port in published[name]), name
    assert {"monitoring", "look"} <= set(services["grafana"]["networks"])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_are_linted(path: Path) -> None:
    """hadolint finds nothing, and what a Dockerfile copies is there and let through by .dockerignore."""
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(hadolint), str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stdout
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    for words in re.findall(r"^COPY (?!--from)(.+)$", path.read_text(), re.MULTILINE):
        for source in words.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source == "." or any(source == name or source.startswith(f"{name}/") for name in kept), source
    for extras in re.findall(r"'/src\[([a-z,]+)\]'", path.read_text()):
        with (ROOT / "pyproject.toml").open("rb") as file:
            assert set(extras.split(",")) <= set(tomllib.load(file)["project"]["optional-dependencies"])


def test_the_engine_in_the_container_has_what_the_one_here_has() -> None:
    """Triton's image installs the releases that pyproject.toml names for the backends, and numpy below 2."""
    text = (DOCKER / "triton.Dockerfile").read_text()
    with (ROOT / "pyproject.toml").open("rb") as file:
        serve = tomllib.load(file)["project"]["optional-dependencies"]["serve"]
    wanted = {re.split(r"[<>=]", row)[0]: row for row in serve}
    installed = dict(re.findall(r"'([a-z-]+)([<>=][^']*)'", text))
    assert installed["numpy"].startswith("==1.26")
    assert f"onnxruntime{installed['onnxruntime']}" == wanted["onnxruntime"]
    assert f"tokenizers{installed['tokenizers']}" == wanted["tokenizers"]
    for backend in sorted(path.parent.name for path in (ROOT / "backends").glob("*/model.py")):
        assert f"COPY backends/{backend} /opt/tritonserver/backends/{backend}\n" in text


def test_haproxy_takes_its_configuration(services: dict[str, Any]) -> None:
    """haproxy agrees with the file in the environment that its container has."""
    environ = {**os.environ, **{name: str(value) for name, value in services["proxy"]["environment"].items()}}
    environ["GATEWAY_NAME"] = "localhost"  # the name is looked up, and is known in the network of the services alone
    argv = [program("haproxy", "haproxy"), "-c", "-f", str(COMPOSE / "haproxy.cfg")]
    done = subprocess.run(argv, env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stdout + done.stderr, done.stdout + done.stderr


def test_the_monitoring_takes_its_configuration(tmp_path: Path) -> None:
    """promtool and amtool agree, and the routes are those of deploy/alertmanager.yml."""
    for source in (COMPOSE / "prometheus.yml", ROOT / "deploy" / "alerts.yml"):
        shutil.copy(source, tmp_path)
    for argv in (
        [program("promtool", "prometheus"), "check", "config", str(tmp_path / "prometheus.yml")],
        [program("amtool", "prometheus-alertmanager"), "check-config", str(COMPOSE / "alertmanager.yml")],
    ):
        done = subprocess.run(argv, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    here, there = (yaml.safe_load((folder / "alertmanager.yml").read_text()) for folder in (COMPOSE, ROOT / "deploy"))
    assert here["route"] == there["route"] and here["inhibit_rules"] == there["inhibit_rules"]
    datasource, other = (
        yaml.safe_load(path.read_text())["datasources"][0]
        for path in (COMPOSE / "grafana-datasource.yml",
                     ROOT / "deploy" / "grafana" / "provisioning" / "datasources" / "prometheus.yml")
    )  # fmt: skip
    assert datasource["uid"] == other["uid"]


def test_redis_keeps_what_it_knows_and_wants_the_password(services: dict[str, Any], tmp_path: Path) -> None:
    """A real Redis, started by the container's own command: nobody without the password, all there after a kill -9."""
    import redis

    (port,) = free_ports(1)
    secret, data = tmp_path / "redis_password", tmp_path / "data"
    secret.write_text("s3cret\n")
    data.mkdir()
    config = tmp_path / "redis.conf"
    text = (COMPOSE / "redis.conf").read_text()
    config.write_text(
        text.replace("dir /data", f"dir {data}").replace("bind * -::*", "bind 127.0.0.1") + f"port {port}\n"
    )
    script = services["redis"]["command"][-1].replace("$$", "$")
    for there, here in (
        ("/run/secrets/redis_password", secret), ("/etc/redis/redis.conf", config),
        ("/tmp/redis.conf", tmp_path / "whole.conf"), ("exec redis-server", f"exec {binary()}"),  # noqa: S108 (replaced)
    ):  # fmt: skip
        assert there in script
        script = script.replace(there, str(here))
    client = redis.Redis(port=port, password="s3cret", socket_timeout=5)  # noqa: S106 (of this test)

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(["sh", "-c", script], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while True:
            try:
                client.ping()
                return process
            except redis.ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    process = start()
    try:
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=port, socket_timeout=5).ping()
        client.set("key", "kept")
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "volatile-lru"
        process.kill()
        process.wait()
        process = start()
        assert client.get("key") == b"kept"
    finally:
        process.kill()
        process.wait()
    assert stat.S_IMODE((tmp_path / "whole.conf").stat().st_mode) == 0o600


def test_secrets_are_made_once(tmp_path: Path) -> None:
    """make-secrets makes what is missing, leaves what is there, and nobody else can look into the folder."""
    script = tmp_path / "make-secrets"
    shutil.copy(ROOT / "deploy" / "make-secrets", script)
    folder = tmp_path / "secrets"
    subprocess.run([str(script)], check=True, capture_output=True)
    made = {path.name: path.read_text() for path in folder.iterdir()}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert made["redis_url"] == f"redis://:{made['redis_password'].strip()}@redis:6379/0\n"
    assert len(set(made.values())) == len(made) == 4 and all(len(text) > 60 for text in made.values())
    (folder / "audit_key").unlink()
    again = subprocess.run([str(script)], check=True, capture_output=True, text=True)
    now = {path.name: path.read_text() for path in folder.iterdir()}
    assert {name for name in now if now[name] != made[name]} == {"audit_key"}
    assert "audit_key made" in again.stdout and "redis_url is there already" in again.stdout


def test_an_image_gets_no_more_than_it_needs() -> None:
    """Weights, secrets, virtual environments and the tests stay out of what is sent to an image's build."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    kept = [line[1:] for line in rules if line.startswith("!")]
    for name in ("model_repository", "deploy/secrets", ".venv", "tests", "benchmarks", ".git", ".truthgpt"):
        assert not any(fnmatch.fnmatch(name, rule) or name.startswith(f"{rule}/") for rule in kept), name


@pytest.mark.parametrize("script", ["deploy/make-secrets", *(f"deploy/docker/{n}" for n in
                                    ("export-once", "serve-models", "model-alive"))])  # fmt: skip
def test_scripts_are_linted(script: str) -> None:
    """shellcheck finds nothing, and the scripts can be run."""
    path = ROOT / script
    assert os.access(path, os.X_OK)
    done = subprocess.run([program("shellcheck", "shellcheck"), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_export_runs_once(tmp_path: Path) -> None:
    """What is in the repository is left alone, and a model that nobody can make is refused with what to set."""
    environ = {"PATH": os.environ["PATH"], "TRUTHGPT_MODEL_REPOSITORY": str(tmp_path), "TRUTHGPT_MODEL": "mine"}
    argv = [str(DOCKER / "export-once")]
    done = subprocess.run(argv, env=environ, capture_output=True, text=True)
    assert done.returncode == 1 and "EXPORT_FROM" in done.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.pbtxt").touch()
    done = subprocess.run(argv, env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and "already" in done.stdout
    told = tmp_path / "truthgpt"
    told.write_text('#!/bin/sh\necho "$@"\n')
    told.chmod(0o755)
    environ |= {"PATH": f"{tmp_path}:{environ['PATH']}", "TRUTHGPT_MODEL": "other", "EXPORT_FROM": "org/model"}
    environ["EXPORT_FLAGS"] = "--precision int8"
    done = subprocess.run(argv, env=environ, capture_output=True, text=True)
    assert done.stdout == "export org/model --name other --precision int8\n"
