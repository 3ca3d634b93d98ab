"""`truthgpt doctor`: every fault that it is there for is made for real and found, with the way to mend it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from orchestrator import engines
from orchestrator.local import redisserver, state, tritonserver
from orchestrator.ops import checks_machine, checks_profile, checks_stack, doctor, proofs
from orchestrator.ops.finding import Deployment, Finding, Limits, installed
from orchestrator.ops.keyring import Keyring
from orchestrator.settings import Settings
from tests.clock import awake
from tests.orchestrator.gateway import write_state
from tests.redis import RealRedis


def deployment(**parts: Any) -> Deployment:
    return Deployment(Settings.load(), **parts)


def fault(finding: Finding, *words: str) -> None:
    """The finding is a fault whose text has these words, and it has a hint."""
    assert not finding.ok and finding.hint, finding
    assert all(word in f"{finding.detail} {finding.hint}" for word in words), finding


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The libraries of a moved server (the original knows its own place), as links that a test may take away."""
    real = tritonserver.find()
    moved = tritonserver.Installation(tmp_path / "tritonserver", tmp_path / "libraries", real.site)
    for source, target in ((real.binary, moved.binary), (real.stub, moved.stub)):
        target.parent.mkdir(parents=True)
        shutil.copy2(source, target)
    moved.libraries.mkdir()
    for path in real.libraries.iterdir():
        (moved.libraries / path.name).symlink_to(path)
    monkeypatch.setattr(tritonserver, "find", lambda: moved)
    return moved.libraries


def test_a_sound_machine_is_sound(place: Any) -> None:
    """With an exported model and no stack every check is ok, in a document of the promised form, by exit code 0."""
    place.export()
    document = place.json("doctor")
    assert document["ok"] is True
    assert [set(row) for row in document["checks"]] == [{"name", "ok", "detail", "hint"}] * len(document["checks"])
    assert [row["name"] for row in document["checks"]] == ["settings", *(check.name for check in doctor.CHECKS)]
    missing = {"auto_scaling"}  # not ok, and no fault
    assert {row["name"] for row in document["checks"] if row["ok"] is None} == missing
    assert all(row["ok"] or row["name"] in missing for row in document["checks"])
    assert all(row["hint"] == "" and row["detail"] for row in document["checks"])
    assert not place.home.exists(), "looking must not change anything"


def test_with_servers_of_others_nothing_of_triton_is_needed_here(place: Any) -> None:
    """No package, library, repository, model or port of it is a fault then, and each check says why."""
    place.set(TRITON_URLS="http://triton-a:8000,http://triton-b:8000")

    def version(name: str) -> str | None:
        return "1.0" if name in checks_machine.GATEWAY_PACKAGES else None

    given = deployment(version=version)
    found = {finding.name: finding for finding in doctor.examine(given)}
    assert [name for name, finding in found.items() if finding.ok is False] == []
    for name in ("server", "model"):
        assert "http://triton-a:8000,http://triton-b:8000" in found[name].detail
    assert "elsewhere" in found["repository"].detail and "elsewhere" in found["entry"].detail
    fault(checks_machine.check_packages(deployment(version=lambda name: None)), "uvicorn, redis, aiohttp")
    write_state(place.home, "http://127.0.0.1:1")  # a stack that has servers of its own runs
    assert not deployment(version=version).elsewhere


def test_each_fault_reaches_people_with_its_hint(place: Any) -> None:
    """A fault makes the exit code 1 and is printed with what to do, in text and in JSON."""
    place.export()
    place.set(MODEL="missing")
    result = place.run("doctor")
    assert result.exit_code == 1
    line = next(line for line in result.stdout.splitlines() if line.startswith("FAULT"))
    assert "model" in line and "-> export it first: truthgpt export" in result.stdout
    rows = {row["name"]: row for row in place.json("doctor", code=1)["checks"]}
    assert [name for name, row in rows.items() if row["ok"] is False] == ["model"]


def test_a_foreign_engine_is_found(place: Any) -> None:
    """A TensorRT engine of another GPU is a fault with the folder to remove; a target without a GPU is a warning."""
    folder = place.export() / "1"
    assert checks_stack.check_engine(deployment()).detail == "demo needs no TensorRT engine"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "target": "tensorrt"}))
    if not engines.this_machine().gpus:
        finding = checks_stack.check_engine(deployment())
        assert finding.ok and "no NVIDIA GPU" in finding.detail and "--target onnx" in finding.hint
    (folder / "engine").mkdir()
    record = {"gpu": "NVIDIA Tesla P4", "compute_capability": "6.1"}
    (folder / "engine" / "engine.json").write_text(json.dumps(record))
    fault(checks_stack.check_engine(deployment()), "NVIDIA Tesla P4", f"rm -r '{folder / 'engine'}'")


def test_wrong_settings_are_the_first_fault(place: Any) -> None:
    """Settings that cannot be loaded are a finding, not a failure of the doctor."""
    place.set(HTTP_PORT="many")
    (row,) = place.json("doctor", code=1)["checks"]
    assert (row["name"], row["ok"]) == ("settings", False) and "TRUTHGPT_HTTP_PORT" in row["detail"] and row["hint"]


def test_a_taken_port_names_its_owner(place: Any) -> None:
    """A port that another program holds is named with its setting and the program."""
    for name in ("TRITON_GRPC", "GRPC"):
        with socket.create_server(("127.0.0.1", place.ports[name])):
            found = checks_machine.check_ports(deployment())
            if name == "GRPC":
                place.set(GRPC="false")
                assert checks_machine.check_ports(deployment()).ok
                place.set(GRPC=None)
        fault(found, str(place.ports[name]), f"TRUTHGPT_{name}_PORT", f"process {os.getpid()}")
        assert str(place.ports["HTTP"]) not in found.detail
    assert checks_machine.check_ports(deployment()).ok


def test_a_port_of_a_child_of_the_stack_is_no_fault(place: Any) -> None:
    """A worker of the gateway holds the HTTP port: a process below those of the state file is the stack's too."""
    listener = (
        "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); print(flush=True); "
        "time.sleep(60)"
    )
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])"
    argv = [sys.executable, "-c", parent, listener, str(place.ports["HTTP"])]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True) as gateway:
        try:
            assert gateway.stdout is not None
            gateway.stdout.readline()
            fault(checks_machine.check_ports(deployment()), "is used by")
            write_state(place.home, "http://127.0.0.1:1", processes={"gateway": gateway.pid})
            assert checks_machine.check_ports(deployment()).ok
        finally:
            os.killpg(gateway.pid, signal.SIGKILL)


def test_the_running_stacks_own_ports_are_no_fault(place: Any, gateway: Any) -> None:
    """A port held by a process of this home's stack is as it should be."""
    place.set(HTTP_PORT=gateway.url.rpartition(":")[2])
    assert checks_machine.check_ports(deployment()).ok
    state.clear(place.home)
    fault(checks_machine.check_ports(deployment()), "is used by")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (("darwin", "x86_64", (3, 11), "", ""), "Linux"),
        (("linux", "aarch64", (3, 11), "glibc", "2.36"), "x86-64"),
        (("linux", "x86_64", (3, 11), "glibc", "2.31"), "glibc 2.35"),
        (("linux", "x86_64", (3, 11), "glibc", "2.9"), "glibc 2.35"),
        (("linux", "x86_64", (3, 11), "", ""), "glibc 2.35"),
        (("linux", "x86_64", (3, 13), "glibc", "2.36"), "Python 3.11 or 3.12"),
        (("linux", "x86_64", (3, 10), "glibc", "2.36"), "Python 3.11 or 3.12"),
    ],
)
def test_an_unsupported_system_is_named(found: tuple[Any, ...], words: str) -> None:
    """Another system, processor, C library or Python is one clear sentence with a hint."""
    told = checks_machine.platform_fault(*found)
    assert told is not None and words in told[0] and told[1]
    assert checks_machine.platform_fault("linux", "x86_64", (3, 12), "glibc", "2.100") is None


def test_numpy_2_and_missing_packages_are_faults(place: Any) -> None:
    """numpy 2, which breaks text tensors in Triton, and a serving package that is not there name their pip command."""
    new = deployment(version=lambda name: "2.1.0" if name == "numpy" else installed(name))
    fault(checks_machine.check_packages(new), "numpy 2.1.0", "pip install 'numpy<2'")
    without = deployment(version=lambda name: None if name == "tokenizers" else installed(name))
    fault(checks_machine.check_packages(without), "tokenizers", "truthgpt[serve]")
    assert checks_machine.check_packages(deployment()).ok


def test_a_missing_server_library_is_named(place: Any, libraries: Path) -> None:
    """A shared library that tritonserver would not find is named; with all of them there is no fault."""
    assert checks_machine.check_server(deployment()).ok
    taken = next(path for path in sorted(libraries.iterdir()) if path.name.startswith("libcudart"))
    taken.unlink()
    fault(checks_machine.check_server(deployment()), taken.name, "truthgpt[serve]")


def test_shared_memory_and_disk_that_are_too_small(place: Any) -> None:
    """Less free than needed is a fault with the numbers and the way to get more."""
    small = deployment(limits=Limits(shared_memory_bytes=1 << 60, disk_bytes=1 << 60))
    fault(checks_machine.check_shared_memory(small), "MiB free", "--shm-size")
    fault(checks_machine.check_disk(small), "MiB free", "TRUTHGPT_HOME")
    assert checks_machine.check_shared_memory(deployment()).ok and checks_machine.check_disk(deployment()).ok


def test_folders_that_cannot_be_written(place: Any, tmp_path: Path) -> None:
    """A file in the way of the home or the repository is told with the variable to change."""
    (tmp_path / "file").write_text("")
    place.set(HOME=tmp_path / "file" / "home", MODEL_REPOSITORY=tmp_path / "file")
    fault(checks_machine.check_home(deployment()), "is not a folder", "TRUTHGPT_HOME")
    fault(checks_machine.check_repository(deployment()), "is not a folder", "TRUTHGPT_MODEL_REPOSITORY")


@pytest.mark.skipif(not Path("/proc/sys").is_dir(), reason="needs a folder that even root cannot write")
def test_a_read_only_file_system_is_told(place: Any) -> None:
    """A folder that looks writable to root and is not is found by trying."""
    assert "cannot be written" in checks_machine.unwritable(Path("/proc/sys"))


def test_the_model_that_is_not_exported(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty repository is fine while the demo can be exported; without torch it is a fault that names the extra."""
    assert checks_stack.check_model(deployment()).ok
    monkeypatch.setattr(checks_stack.importlib.util, "find_spec", lambda name: None)
    fault(checks_stack.check_model(deployment()), "torch", "truthgpt[export]")


def test_the_model_that_is_not_ready(place: Any, gateway: Any) -> None:
    """A running stack whose model does not answer is a fault with the gateway's reason and the log to read."""
    place.export()
    assert checks_stack.check_model(deployment()).ok
    gateway.row |= {"ready": False, "reason": "its stub process is gone"}
    fault(checks_stack.check_model(deployment()), "its stub process is gone", "triton.log")


def damage_weights(folder: Path) -> None:
    path = folder / "1" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def change_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "1" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_config(folder: Path, old: str, new: str) -> None:
    path = folder / "config.pbtxt"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_weights, "model.onnx is damaged"),
        (lambda f: (f / "1" / "tokenizer.json").unlink(), "tokenizer.json cannot be read"),
        (lambda f: (f / "1" / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda f: change_manifest(f, version="7"), "about version '7'"),
        (lambda f: change_manifest(f, name="other"), "about name 'other'"),
        (lambda f: change_manifest(f, format=99), "format 99"),
        (lambda f: change_manifest(f, files={}), "does not list model.onnx"),
        (lambda f: change_manifest(f, files=None), "lists no files"),
        (lambda f: change_manifest(f, files={"../../x": {}}), "leads out of the folder"),
        (lambda f: change_manifest(f, precision="int8"), "precision is 'fp32', the manifest says 'int8'"),
        (lambda f: change_manifest(f, chat_template=None), "parameter chat is 'true'"),
        (lambda f: change_config(f, "decoupled: true", "decoupled: false"), "decoupled: true"),
        (lambda f: change_config(f, 'backend: "inflight"', 'backend: "python"'), "backend is 'python'"),
        (lambda f: change_config(f, '"sampling_parameters"', '"parameters"'), "input sampling_parameters must be"),
        (lambda f: change_config(f, 'string_value: "4096"', 'string_value: "99999"'), "max_len is '99999'"),
        (lambda f: change_config(f, 'string_value: "4"', 'string_value: "many"'), "slots is 'many'"),
        (lambda f: (f / "config.pbtxt").write_text("name: {"), "config.pbtxt cannot be read"),
        (lambda f: (f / "config.pbtxt").unlink(), "config.pbtxt cannot be read"),
    ],
)  # fmt: skip
def test_an_entry_that_does_not_hold_together(place: Any, damage: Any, words: str) -> None:
    """Damaged files and a manifest and config.pbtxt that disagree are found and named, each on its own."""
    folder = place.export()
    assert checks_stack.check_entry(deployment()) == Finding("entry", True, "demo version 1 is intact")
    damage(folder)
    fault(checks_stack.check_entry(deployment()), words, "export demo again")


def test_another_onnxruntime_is_a_warning(place: Any) -> None:
    """A model verified with another onnxruntime may be served, with a word about it."""
    change_manifest(place.export(), tools={"onnxruntime": "1.0.0"})
    found = checks_stack.check_entry(deployment())
    assert found.ok and "1.0.0" in found.detail and found.hint
    assert "warn   entry" in place.run("doctor").stdout


def test_a_redis_that_is_away(place: Any) -> None:
    """A configured Redis that refuses, or accepts and says nothing, is a fault within seconds, password masked."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place.set(REDIS_URL=f"redis://:hunter2@127.0.0.1:{server.getsockname()[1]}/0")
        began = awake()
        silent = checks_stack.check_redis(deployment())
        assert awake() - began < 5
    refusing = checks_stack.check_redis(deployment())
    for found in (silent, refusing):
        fault(found, "does not answer", "TRUTHGPT_REDIS_URL")
        assert "hunter2" not in f"{found}"


def test_a_redis_that_answers(place: Any, tmp_path: Path) -> None:
    """A real redis-server passes by its URL, and the embedded one when no URL is set."""
    assert "embedded" in checks_stack.check_redis(deployment()).detail
    path = tmp_path / "r.sock"
    argv = [str(redisserver.binary()), "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as server:
        while not path.exists():
            time.sleep(0.01)
        place.set(REDIS_URL=f"unix://{path}")
        found = checks_stack.check_redis(deployment())
        server.kill()
    assert found.ok and "answers" in found.detail


def test_keys_that_nobody_has(place: Any) -> None:
    """Where keys are needed and none is active a warning names the command; open, offline and no Redis are fine."""
    assert checks_stack.check_keys(deployment()).ok and "open" in checks_stack.check_keys(deployment()).detail
    place.set(AUTH="keys")
    assert "while the stack runs" in checks_stack.check_keys(deployment()).detail
    with RealRedis() as server, redis.Redis.from_url(server.url) as client:
        place.set(REDIS_URL=server.url)
        revoked, _ = Keyring(client).create("acme")
        Keyring(client).revoke(revoked.id)
        found = checks_stack.check_keys(deployment())
        assert found.ok and "truthgpt keys create" in found.hint
        Keyring(client).create("acme")
        found = checks_stack.check_keys(deployment())
        assert (found.ok, found.detail, found.hint) == (True, "active API keys: 1", "")
    assert "see the check of Redis" in checks_stack.check_keys(deployment()).detail


def test_an_embedded_redis_that_is_missing_or_broken(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No redis-server, or one that cannot run, names the extra and the variable."""
    monkeypatch.setattr(redisserver, "binary", lambda: Path(sys.executable).with_name("no-redis-server"))
    fault(checks_stack.check_redis(deployment()), "cannot be run", "truthgpt[serve]")

    def missing() -> Path:
        raise redisserver.RedisMissing("redis-server is not installed: pip install it")

    monkeypatch.setattr(redisserver, "binary", missing)
    fault(checks_stack.check_redis(deployment()), "redis-server is not installed", "TRUTHGPT_REDIS_URL")


def test_a_gateway_that_does_not_answer(place: Any, gateway: Any) -> None:
    """A running stack with a dead gateway is a fault that names its log."""
    assert checks_stack.check_gateway(deployment()).ok
    write_state(place.home, "http://127.0.0.1:1")
    fault(checks_stack.check_gateway(deployment()), "Connection refused", "gateway.log")
    assert "nobody can tell" in checks_stack.check_model(deployment()).detail


def test_what_a_killed_stack_left_behind(place: Any) -> None:
    """A stale state file, a process of it and its shared memory are one fault each, mended by `down`."""
    assert checks_stack.check_leftovers(deployment()).ok
    region = tritonserver.SHM / f"{tritonserver.shm_prefix(place.home)}test"
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)", str(place.home)], start_new_session=True
    ) as left:
        try:
            region.write_bytes(b"x")
            write_state(place.home, "http://127.0.0.1:1", created=1.0, processes={"triton": left.pid})
            found = checks_stack.check_leftovers(deployment())
            assert place.run("down").exit_code == 0
        finally:
            left.kill()
            region.unlink(missing_ok=True)
    fault(found, "a state file", "1 shared memory regions", f"processes {left.pid}", "truthgpt down")
    assert checks_stack.check_leftovers(deployment()).ok


def test_a_stack_that_starts_is_no_leftover(place: Any) -> None:
    """While a supervisor holds the home's lock without a state file, nothing is called a leftover."""
    with state.lock(place.home):
        region = tritonserver.SHM / f"{tritonserver.shm_prefix(place.home)}test"
        region.write_bytes(b"x")
        argv = [sys.executable, "-c", "from orchestrator.cli import main; main()", "doctor", "--json"]
        rows = json.loads(subprocess.run(argv, capture_output=True, text=True).stdout)["checks"]
        region.unlink()
    assert (
        next(row for row in rows if row["name"] == "leftovers")["detail"] == "a stack is starting or stopping just now"
    )


def test_a_check_that_hangs_or_fails_does_not_stop_the_doctor(place: Any) -> None:
    """A hanging check ends at its deadline and a raising one is a finding; the others are unharmed and in order."""
    forever = threading.Event()

    def hang(_: Deployment) -> Finding:
        forever.wait()
        raise AssertionError

    def fail(_: Deployment) -> Finding:
        raise RuntimeError("broken")

    checks = [
        doctor.Check("hangs", hang, 0.3),
        doctor.Check("fails", fail),
        doctor.Check("works", lambda _: Finding("works", True, "")),
    ]
    began = awake()
    found = doctor.examine(deployment(), checks)
    assert awake() - began < 2
    assert [(finding.name, finding.ok) for finding in found] == [("hangs", False), ("fails", False), ("works", True)]
    assert "0.3 s" in found[0].detail and "RuntimeError: broken" in found[1].detail
    assert all(finding.hint for finding in found[:2])
    forever.set()


@pytest.mark.parametrize(
    ("states", "ok", "detail", "hint"),
    [
        ([], True, "one Triton server: nothing to balance", "several-tritons.md"),
        (["ready"], True, "one Triton server: nothing to balance", "several-tritons.md"),
        (["ready", "draining"], True, "2 Triton servers, of which 1 may take requests", "tritons resume"),
        (["draining"], False, "1 Triton servers, of which 0 may take requests", "tritons resume"),
        (["ready", "down"], False, "http://127.0.0.1:9 is down; http://127.0.0.1:10 is down", "truthgpt tritons list"),
    ],
)
def test_what_there_is_to_balance(
    place: Any, gateway: Any, monkeypatch: pytest.MonkeyPatch, states: list[str], ok: bool, detail: str, hint: str
) -> None:
    """Of one server there is nothing to prove, which is a warning in production; drained ones are told of; those that
    do not answer heartbeats are a fault.
    """
    monkeypatch.setattr(proofs, "BALANCING_S", 0.3)
    monkeypatch.setenv("ENVIRONMENT", "production")
    rows = [{"url": f"http://127.0.0.1:{9 + number}", "state": state} for number, state in enumerate(states)]
    monkeypatch.setattr(gateway, "health", lambda: {"tritons": rows})
    finding = checks_profile.check_load_balancing(deployment())
    assert (finding.ok, finding.detail) == (ok, detail) and hint in finding.hint


def test_balancing_is_nobodys_matter_in_development(place: Any, gateway: Any) -> None:
    """One server is right there, and without a stack there is nothing to look at; a gateway that is away is a fault."""
    finding = checks_profile.check_load_balancing(deployment())
    assert finding.ok and finding.hint == ""
    gateway.health_status = 500
    fault(checks_profile.check_load_balancing(deployment()), "which servers it has")
    state.clear(place.home)
    assert "while the stack runs" in checks_profile.check_load_balancing(deployment()).detail
