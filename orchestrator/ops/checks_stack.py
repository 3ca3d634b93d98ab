"""Checks of the stack: its model, its Redis, its gateway, and what a killed one left behind."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import time
from typing import Any

from orchestrator import engines, models
from orchestrator.client import GatewayClient, GatewayError
from orchestrator.local import redisserver, state, tritonserver
from orchestrator.local.process import alive
from orchestrator.ops import entrycheck, verification
from orchestrator.ops.finding import Deployment, Finding
from orchestrator.ops.keyring import Keyring
from orchestrator.ops.redis import NoRedis, connect
from orchestrator.ops.stopping import lock_holder, servers
from orchestrator.settings import mask_url

ASK_S = 3.0
_ELSEWHERE = "the models are not of this repository: Triton runs elsewhere"


def check_choice(deployment: Deployment) -> Finding:
    """There is a model to serve, or the demo model can be exported."""
    if deployment.elsewhere:
        return Finding("model", True, f"the models are those of Triton at {deployment.elsewhere}")
    try:
        choice = deployment.choice()
    except models.ModelsError as error:
        return Finding("model", False, str(error), error.hint)
    if choice.export_demo:
        return _demo_can_be_exported()
    return Finding("model", True, f"`truthgpt up` will serve {choice.model}")


def check_model(deployment: Deployment) -> Finding:
    """The model is exported, and if a stack runs, ready."""
    stack = deployment.stack
    if stack is None:
        return check_choice(deployment)
    choice = deployment.choice()
    try:
        rows = GatewayClient(stack.http, ASK_S).health().get("models")
    except GatewayError:
        return Finding("model", False, f"nobody can tell whether {choice.model} is ready", "mend the gateway first")
    rows = rows if isinstance(rows, list) else []
    row: dict[str, Any] = next((row for row in rows if row.get("name") == choice.model), {})
    if not row.get("ready"):
        logs = deployment.settings.home / "logs"
        hint = f"it is restarted by itself; if it stays so, see {logs / 'triton.log'} and {logs / 'supervisor.log'}"
        return Finding("model", False, f"{choice.model} is not ready: {row.get('reason') or 'it is not served'}", hint)
    return Finding("model", True, f"{choice.model} version {row.get('version')} is ready")


def _demo_can_be_exported() -> Finding:
    if importlib.util.find_spec("torch") is None:
        detail = "no model is exported, and exporting needs torch, which is not installed"
        return Finding("model", False, detail, "pip install 'truthgpt[export]', or copy an exported model there")
    return Finding("model", True, "no model is exported yet; `truthgpt up` exports the demo model first")


def check_entry(deployment: Deployment) -> Finding:
    """Every file of the model has the manifest's SHA-256, and config.pbtxt agrees with it."""
    if deployment.elsewhere:
        return Finding("entry", True, _ELSEWHERE)
    try:
        choice = deployment.choice()
    except models.ModelsError:
        return Finding("entry", True, "no model to look at, see the check of the model")
    if choice.export_demo:
        return Finding("entry", True, "no model is exported yet")
    try:
        entry = models.get(deployment.settings.model_repository, choice.model)
    except models.ModelsError as error:
        return Finding("entry", False, str(error), error.hint)
    found = [*entrycheck.problems(entry), *_of_graph(entry)]
    if found:
        hint = f"export {entry.name} again, or go back with `truthgpt models remove {entry.name} --version N`"
        return Finding("entry", False, "; ".join(found), hint)
    detail = f"{entry.name} version {entry.newest.number} is intact"
    tools = (entry.newest.manifest or {}).get("tools")
    made_with = tools.get("onnxruntime") if isinstance(tools, dict) else None
    have = deployment.version("onnxruntime")
    if made_with and have and made_with != have:
        detail += f", but it was verified with onnxruntime {made_with} and {have} is installed"
        return Finding("entry", True, detail, f"export {entry.name} again to verify it with this version")
    return Finding("entry", True, detail)


def _of_graph(entry: models.Entry) -> list[str]:
    """What is wrong with the entry that has a model's graph, where that is another one."""
    found = verification.check_graph(entry, entry.newest, lambda count: None)
    with contextlib.suppress(models.ModelsError):  # it has just been told
        graph = models.engine_of(entry.folder.parent, entry.newest)
        found += entrycheck.problems(*graph) if graph is not None else []
    return found


def check_engine(deployment: Deployment) -> Finding:
    """The TensorRT engine of the model, if it has one, is this machine's."""
    if deployment.elsewhere:
        return Finding("engine", True, _ELSEWHERE)
    try:
        choice = deployment.choice()
        version = models.get(deployment.settings.model_repository, choice.model).newest
        engine = engines.engine_of(version)
        engines.require(version)
    except models.ModelsError:
        return Finding("engine", True, "no model to look at, see the check of the model")
    except engines.ForeignEngine as error:
        return Finding("engine", False, str(error), error.hint)
    if engine is not None:
        return Finding("engine", True, f"its TensorRT engine was built for {engine[0].get('gpu')}, which is here")
    if version.fact("target") != engines.TARGET:
        return Finding("engine", True, f"{choice.model} needs no TensorRT engine")
    if not engines.this_machine().gpus:
        hint = f"serve it where an NVIDIA GPU is, or export {choice.model} with --target onnx"
        return Finding("engine", True, f"{choice.model} is for TensorRT, and there is no NVIDIA GPU here", hint)
    return Finding("engine", True, "its TensorRT engine is built by the first load")


def check_redis(deployment: Deployment) -> Finding:
    """Redis answers, or the embedded one can be started."""
    url = deployment.stack.redis if deployment.stack is not None else deployment.settings.redis_url
    if url is None:
        return _embedded()
    import redis

    shown = mask_url(url)
    try:
        with redis.Redis.from_url(url, socket_timeout=1.0, socket_connect_timeout=1.0, retry=None) as client:
            client.ping()
    except (redis.RedisError, OSError, ValueError) as error:
        if deployment.settings.redis_url is None:
            hint = f"it is restarted by itself; if it stays away, see {deployment.settings.home / 'logs' / 'redis.log'}"
        else:
            hint = "start it, or unset TRUTHGPT_REDIS_URL to use an embedded one"
        return Finding("redis", False, f"{shown} does not answer: {error}", hint)
    return Finding("redis", True, f"{shown} answers")


def _embedded() -> Finding:
    hint = "pip install 'truthgpt[serve]', or set TRUTHGPT_REDIS_URL"
    try:
        binary = redisserver.binary()
        done = subprocess.run([str(binary), "--version"], capture_output=True, text=True, timeout=5)  # noqa: S603 (found above, no shell)
    except redisserver.RedisMissing as error:
        return Finding("redis", False, str(error).split(":")[0], hint)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("redis", False, f"redis-server cannot be run: {error}", hint)
    if done.returncode != 0:
        return Finding("redis", False, f"{binary} fails: {done.stderr.strip()[:200]}", hint)
    return Finding("redis", True, f"embedded, {binary}")


def check_keys(deployment: Deployment) -> Finding:
    """Where API keys are needed somebody has one."""
    settings = deployment.settings
    if settings.auth != "keys":
        return Finding("keys", True, "no API key is needed (auth is open)")
    if deployment.stack is None and settings.redis_url is None:
        return Finding("keys", True, "API keys are looked at while the stack runs")
    try:
        with connect(settings) as client:
            now = time.time()
            active = sum(key.state(now) == "active" for key in Keyring(client).all())
    except NoRedis:
        return Finding("keys", True, "nobody can tell, see the check of Redis")
    hint = "" if active else "make the first one with `truthgpt keys create --tenant NAME`"
    return Finding("keys", True, f"active API keys: {active}", hint)


def check_gateway(deployment: Deployment) -> Finding:
    """The gateway of a running stack answers."""
    stack = deployment.stack
    if stack is None:
        return Finding("gateway", True, f"no stack is running from {deployment.settings.home}")
    try:
        health = GatewayClient(stack.http, ASK_S).health()
    except GatewayError as error:
        log = deployment.settings.home / "logs" / "gateway.log"
        hint = f"it is restarted by itself; if it stays so, see {log}, or run `truthgpt down` and `truthgpt up`"
        return Finding("gateway", False, str(error), hint)
    if health.get("draining"):
        return Finding("gateway", False, f"{stack.http} is stopping", "wait until it has stopped, then `truthgpt up`")
    return Finding("gateway", True, f"{stack.http} answers")


def check_leftovers(deployment: Deployment) -> Finding:
    """Nothing of a killed stack is left: state file, processes, shared memory."""
    home = deployment.settings.home.resolve()
    prefix = tritonserver.shm_prefix(home)
    stubs = {process.pid for process in tritonserver.orphans(prefix)}
    left = []
    if deployment.stack is not None:
        stubs -= {stub.pid for server in deployment.stack.triton_pids for stub in tritonserver.stubs(server)}
    else:
        if lock_holder(home) is not None:
            return Finding("leftovers", True, "a stack is starting or stopping just now")
        old = state.read(home)
        if old is not None or state.path(home).exists():
            left.append("a state file")
        stubs |= {pid for pid in (old.processes.values() if old else ()) if alive(pid)}
        stubs |= {server.pid for server in servers(home)}
        regions = [path.name for path in tritonserver.SHM.glob(f"{prefix}*")]
        if regions:
            left.append(f"{len(regions)} shared memory regions")
    if stubs:
        left.append(f"processes {', '.join(str(pid) for pid in sorted(stubs))}")
    if left:
        return Finding("leftovers", False, f"a stack that was killed left {' and '.join(left)}", "truthgpt down")
    return Finding("leftovers", True, "nothing is left of an earlier stack")
