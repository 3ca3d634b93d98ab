"""`truthgpt status`: exit code and document for every state that a stack can be in."""

from __future__ import annotations

from typing import Any

from orchestrator.local import state
from orchestrator.local.places import Place
from tests.clock import awake
from tests.orchestrator.gateway import write_state

PROMISED = {"ready", "models", "triton", "redis", "uptime_s"}


def test_a_ready_stack_is_code_0(place: Any, gateway: Any) -> None:
    """Ready: the gateway's word, model by model, with Triton, Redis and the uptime of the whole stack."""
    document = place.json("status")
    assert set(document) >= PROMISED and document["ready"] is True
    assert [(row["name"], row["version"], row["state"]) for row in document["models"]] == [("demo", "1", "READY")]
    assert document["triton"]["up"] is True and document["redis"]["up"] is True
    assert 5 <= document["uptime_s"] < 60
    shown = place.run("status")
    assert shown.exit_code == 0 and "demo version 1: READY" in shown.stdout and gateway.url in shown.stdout
    assert ", gRPC 127.0.0.1:1 " in shown.stdout


def test_what_a_model_is_for_and_where_it_runs_is_said(place: Any, gateway: Any) -> None:
    """An encoder says what it does, a device that is no CPU its name, and one that was lost that it was."""
    gateway.row |= {"operation": "embed", "device": "cuda", "fallback": False}
    assert "demo version 1: READY, embeds, on cuda, 0 running" in place.run("status").stdout
    gateway.row |= {"operation": "classify", "device": "cpu", "fallback": True}
    assert "READY, classifies, on the CPU because its device failed" in place.run("status").stdout


def test_a_stack_that_is_not_ready_is_code_1(place: Any, gateway: Any) -> None:
    """Not ready: the document is printed all the same, and people read the model's reason."""
    gateway.ready = False
    gateway.row |= {"ready": False, "reason": "its stub process is gone"}
    document = place.json("status", code=1)
    assert document["ready"] is False and document["models"][0]["state"] == "UNAVAILABLE"
    result = place.run("status")
    assert result.exit_code == 1 and "error: demo: its stub process is gone" in result.stderr


def test_nothing_running_is_code_1_with_a_document(place: Any) -> None:
    """Without a stack the promised keys are there, ready is false and what nobody knows is null."""
    document = place.json("status", code=1)
    assert set(document) >= PROMISED and document["ready"] is False
    assert document["models"] == [] and document["uptime_s"] is None and document["triton"]["up"] is None
    assert "no stack is running" in place.refused("status")


def test_a_dead_supervisor_is_not_a_stack(place: Any, gateway: Any) -> None:
    """A state file whose process has gone, or whose pid is another's now, is no running stack."""
    write_state(place.home, gateway.url, created=1.0)
    assert place.json("status", code=1)["running"] is False


def test_a_silent_gateway_does_not_hang_the_command(place: Any, gateway: Any) -> None:
    """A gateway that accepts and says nothing is reported within seconds, with the uptime that the state file knows."""
    gateway.health_stall_s = 5
    began = awake()
    document = place.json("status", code=1)
    assert awake() - began < 4.5
    assert document["running"] is True and "did not answer in time" in document["detail"] and document["uptime_s"] >= 5


def test_figures_that_cannot_be_had_are_a_line(place: Any, gateway: Any) -> None:
    """An ops port that does not answer is said with its address, and the figures are null in JSON."""
    shown = place.run("status")
    assert shown.exit_code == 0 and "  figures   unknown: http://127.0.0.1:1 does not answer" in shown.stdout
    document = place.json("status")
    assert (document["figures"], document["ops"]) == (None, "http://127.0.0.1:1")
    gateway.summary = {}
    write_state(place.home, gateway.url, ops=gateway.url)
    assert "figures" not in place.run("status").stdout


def test_each_of_several_servers_is_a_line(place: Any, gateway: Any) -> None:
    """With what the gateway says of it, also of one that is not this stack's; without a gateway they are named."""
    servers = [Place(f"triton{number}", f"http://127.0.0.1:{8000 + number}", "g", "m", "p") for number in (0, 100)]
    write_state(place.home, gateway.url, ops=gateway.url, servers=servers)
    assert [row["http"] for row in place.json("status")["tritons"]] == [server.http for server in servers]
    shown = place.run("status").stdout
    assert "  triton    unknown, http://127.0.0.1:8000\n  triton    unknown, http://127.0.0.1:8100\n" in shown
    other = "http://10.0.0.9:8000"
    gateway.tritons = [
        {"url": servers[1].http, "state": "ejected", "outstanding": 3}, {"url": other, "state": "ready"},
    ]  # fmt: skip
    shown = place.run("status").stdout
    assert "ejected, http://127.0.0.1:8100, 3 running" in shown and f"ready, {other}" in shown
    rows = place.json("status")["tritons"]
    assert [(row["http"], row.get("state")) for row in rows] == [
        (servers[0].http, None), (servers[1].http, "ejected"), (other, "ready"),
    ]  # fmt: skip


def test_a_redis_password_is_never_shown(place: Any, gateway: Any) -> None:
    """The address of a Redis with a password is printed without it, in text and in JSON."""
    write_state(place.home, gateway.url, redis="redis://user:hunter2@example.org:6379/0")
    for arguments in (("status",), ("status", "--json")):
        output = place.run(*arguments).output
        assert "example.org" in output and "hunter2" not in output


def test_the_home_flag_finds_another_stack(place: Any, gateway: Any, tmp_path: Any) -> None:
    """--home looks into another home, whatever the environment says."""
    write_state(tmp_path / "other", gateway.url, pid=None)
    state.clear(place.home)
    assert place.json("status", code=1)["running"] is False
    assert place.json("status", "--home", str(tmp_path / "other"))["ready"] is True
