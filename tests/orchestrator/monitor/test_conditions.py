"""The rules: which alert holds for which figures."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.monitor.conditions import assess, conditions
from orchestrator.monitor.rules import RULES, identity
from orchestrator.settings import Settings
from tests.test_docs import check_command

SETTINGS = replace(
    Settings(), alert_error_requests=100, alert_queue=32, alert_backup_age_s=172_800.0, backup=True,
    redis_url="redis://127.0.0.1",
)  # fmt: skip

WELL: dict[str, Any] = {
    "time": "2026-11-26T18:30:00.000Z", "window_s": 300.0, "requests": 120, "errors": 3, "error_rate": 0.025,
    "workers": {"up": 2, "silent": 0, "down": 0}, "worker_restarts": 0,
    "memory": {"gateway_bytes": 1, "used_bytes": 50, "total_bytes": 100},
    "gpus": [{"gpu": "0", "used_bytes": 50, "total_bytes": 100}],
    "disks": [{"folder": "home", "free_bytes": 50, "total_bytes": 100}],
    "triton_up": True, "redis_up": True, "limits_degraded": False, "audit_up": True,
    "models": [{"name": "demo", "ready": True, "breaker": "closed", "fallback": False, "running": 1, "waiting": 0}],
    "jobs": [{"name": "logs", "failing": False, "last_run": None, "last_success": None, "error": ""}],
    "backup": {"wanted": True, "newest_at": 1_795_717_000.0},
    "notifications": {"failing": []}, "up_s": 10.0,
}  # fmt: skip
NOW = 1_795_717_800.0  # Unix time of its "time"


def with_(path: str, value: object) -> dict[str, Any]:
    """The figures of a deployment that is well, but for one of them."""
    figures = copy.deepcopy(WELL)
    *way, last = path.split(".")
    place: Any = figures
    for step in way:
        place = place[int(step)] if step.isdigit() else place[step]
    place[last] = value
    return figures


BAD = [
    ("TruthGPTMemoryHigh", "memory.used_bytes", 91, {}),
    ("TruthGPTGpuMemoryHigh", "gpus.0.used_bytes", 96, {"gpu": "0"}),
    ("TruthGPTErrorRateHigh", "error_rate", 0.11, {}),
    ("TruthGPTQueueLong", "models.0.waiting", 32, {"model": "demo"}),
    ("TruthGPTBreakerOpen", "models.0.breaker", "open", {"model": "demo"}),
    ("TruthGPTRedisAway", "redis_up", False, {}),
    ("TruthGPTTritonAway", "triton_up", False, {}),
    ("TruthGPTModelNotReady", "models.0.ready", False, {"model": "demo"}),
    ("TruthGPTModelOnFallback", "models.0.fallback", True, {"model": "demo"}),
    ("TruthGPTDiskFull", "disks.0.free_bytes", 9, {"folder": "home"}),
    ("TruthGPTBackupTooOld", "backup.newest_at", NOW - 172_801, {}),
    ("TruthGPTJobFailing", "jobs.0.failing", True, {"job_name": "logs"}),
    ("TruthGPTWorkerDown", "workers.silent", 1, {}),
    ("TruthGPTWorkerDown", "workers.down", 1, {}),
    ("TruthGPTAuditAway", "audit_up", False, {}),
    ("TruthGPTLimitsDegraded", "limits_degraded", True, {}),
    ("TruthGPTNotificationsFailing", "notifications.failing", ["slack"], {}),
]


def test_nothing_holds_of_a_deployment_that_is_well() -> None:
    """No alert holds and nothing is unknown."""
    found = assess(WELL, SETTINGS)
    assert (found.holding, found.unknown) == ([], frozenset())


@pytest.mark.parametrize(("name", "path", "value", "labels"), BAD)
def test_each_rule_sees_its_fault(name: str, path: str, value: object, labels: dict[str, str]) -> None:
    """One figure past its threshold raises exactly its alert, with the labels of the thing it is about."""
    (found,) = conditions(with_(path, value), SETTINGS)
    assert (found.name, found.labels) == (name, labels)
    assert found.summary.isprintable() and found.summary.endswith(".")


def test_every_rule_has_a_fault_above() -> None:
    """The table of faults covers every rule."""
    assert {name for name, *_ in BAD} == set(RULES)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("memory.used_bytes", 90), ("gpus.0.used_bytes", 95), ("error_rate", 0.1), ("models.0.waiting", 31),
        ("disks.0.free_bytes", 10), ("backup.newest_at", NOW - 172_800), ("backup.wanted", False),
        ("redis_up", None), ("models", []), ("gpus", None), ("requests", 99), ("models.0.breaker", "half_open"),
    ],
)  # fmt: skip
def test_at_the_threshold_nothing_holds(path: str, value: object) -> None:
    """A figure that has not passed its threshold raises nothing."""
    assert conditions(with_(path, value), SETTINGS) == []


def test_few_requests_raise_no_error_rate() -> None:
    """All of 99 requests may fail; of 100 eleven may not."""
    assert conditions({**WELL, "requests": 99, "error_rate": 1.0}, SETTINGS) == []
    assert [c.value for c in conditions({**WELL, "requests": 100, "error_rate": 0.11}, SETTINGS)] == [0.11]


def test_few_requests_after_a_start_say_nothing() -> None:
    """Of a gateway that was started anew in the middle of failures nobody can tell yet; many good ones are well."""
    begun = {**WELL, "window_s": 40.0, "requests": 99}
    for rate in (0.0, 1.0):
        found = assess({**begun, "error_rate": rate}, SETTINGS)
        assert found.holding == [] and found.is_unknown("TruthGPTErrorRateHigh", {})
    assert not assess({**begun, "window_s": 297.6}, SETTINGS).is_unknown("TruthGPTErrorRateHigh", {})
    assert not assess({**begun, "requests": 100}, SETTINGS).is_unknown("TruthGPTErrorRateHigh", {})
    (holds,) = conditions({**begun, "requests": 100, "error_rate": 0.2}, SETTINGS)
    assert holds.name == "TruthGPTErrorRateHigh"


OLD, YOUNG = NOW - 172_801, NOW - 172_800


@pytest.mark.parametrize(
    ("since", "up_s", "names"),
    [
        (YOUNG, 999_999.0, []), (OLD, 10.0, ["TruthGPTBackupTooOld"]),
        (None, 172_800.0, []), (None, 172_801.0, ["TruthGPTBackupTooOld"]), (None, None, []),
    ],
)  # fmt: skip
def test_no_backup_at_all_counts_after_a_while(since: float | None, up_s: float | None, names: list[str]) -> None:
    """A home that was just made has had no time for a backup; how often its gateway was started does not matter."""
    figures = {**WELL, "backup": {"wanted": True, "newest_at": None, "since": since}, "up_s": up_s}
    assert [found.name for found in conditions(figures, SETTINGS)] == names


OFF = [
    ("TruthGPTRedisAway", {"redis_url": None}), ("TruthGPTLimitsDegraded", {"redis_url": None}),
    ("TruthGPTLimitsDegraded", {"limits": "off"}), ("TruthGPTJobFailing", {"redis_url": None}),
    ("TruthGPTJobFailing", {"maintenance": False}), ("TruthGPTAuditAway", {"audit": False}),
    ("TruthGPTBackupTooOld", {"backup": False}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "off"), OFF)
def test_what_is_switched_off_is_not_unknown(name: str, off: dict[str, Any]) -> None:
    """Of a part that is off there are no figures: its alert does not hold, and so is resolved; else it is unknown."""
    nothing = {key: value for key, value in WELL.items() if key == "time"}
    labels = next(labels for rule, _, _, labels in BAD if rule == name)
    assert assess(nothing, SETTINGS).is_unknown(name, labels)
    found = assess(nothing, replace(SETTINGS, **off))
    assert found.holding == [] and not found.is_unknown(name, labels)


def test_a_breaker_that_is_half_open_lingers() -> None:
    """It is not open, but an alert of it may begin again at any moment; closed it may not."""
    found = assess(with_("models.0.breaker", "half_open"), SETTINGS)
    assert found.lingers("TruthGPTBreakerOpen", {"model": "demo"})
    assert not found.lingers("TruthGPTBreakerOpen", {"model": "other"})
    assert assess(WELL, SETTINGS).lingering == frozenset()


def test_what_others_wrote_is_made_harmless() -> None:
    """A job's error comes into a summary as one bounded line without its secrets."""
    figures = with_("jobs.0.failing", True)
    figures["jobs"][0]["error"] = "no\nway: redis://user:hunter2@host " + "x" * 5000
    (found,) = conditions(figures, SETTINGS)
    assert "hunter2" not in found.summary and len(found.summary) <= 400 and found.summary.isprintable()


_LEAF = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({}), st.just([None])
)
_PATHS = sorted({path for _, path, _, _ in BAD} | {*WELL, "memory.total_bytes", "disks.0", "models.0.name", "gpus.0"})


@given(st.lists(st.tuples(st.sampled_from(_PATHS), _LEAF), max_size=8))
def test_no_figures_break_the_rules(changes: list[tuple[str, object]]) -> None:
    """Whatever stands in the figures, assessing them raises nothing, and all values are finite numbers."""
    figures = copy.deepcopy(WELL)
    for path, value in changes:
        place: Any = figures
        *way, last = path.split(".")
        try:
            for step in way:
                place = place[int(step)] if step.isdigit() else place[step]
            place[int(last) if last.isdigit() else last] = value
        except (TypeError, KeyError, IndexError):
            continue
    for found in assess(figures, SETTINGS).holding:
        assert found.name in RULES
        assert found.value is None or abs(found.value) < float("inf")


@given(st.sets(st.sampled_from(sorted({path for _, path, _, _ in BAD if path != "backup.newest_at"}))))
def test_null_never_fires_and_is_unknown(paths: set[str]) -> None:
    """Of what is null no alert holds, and each such alert is known to be unknown; the others are not."""
    figures = copy.deepcopy(WELL)
    for path in paths:
        *way, last = path.split(".")
        place: Any = figures
        for step in way:
            place = place[int(step)] if step.isdigit() else place[step]
        place[last] = None
    found = assess(figures, SETTINGS)
    assert found.holding == []
    for name, path, _, labels in BAD:
        alike = {other for rule, other, _, _ in BAD if rule == name}
        assert found.is_unknown(name, labels) == bool(paths & alike), path


@pytest.mark.parametrize("key", ["models", "gpus", "disks", "jobs"])
def test_a_list_that_is_null_leaves_all_its_alerts_unknown(key: str) -> None:
    """Whatever the labels, nobody can tell; what is gone from a list that is there is known not to hold."""
    names = {name for name, path, _, _ in BAD if path.startswith(f"{key}.")}
    gone, away = assess({**WELL, key: []}, SETTINGS), assess({**WELL, key: None}, SETTINGS)
    for name in names:
        assert away.is_unknown(name, {"model": "whatever"}) and not gone.is_unknown(name, {"model": "whatever"})


def test_identity_tells_machines_and_things_apart() -> None:
    """An alert of a machine is another one on another host, one of the deployment is the same; labels always count."""
    assert identity("TruthGPTDiskFull", {}, "a") != identity("TruthGPTDiskFull", {}, "b")
    assert identity("TruthGPTRedisAway", {}, "a") == identity("TruthGPTRedisAway", {}, "b")
    one, other = ({"model": "x"}, {"model": "y"})
    assert identity("TruthGPTBreakerOpen", one, "a") != identity("TruthGPTBreakerOpen", other, "a")


def test_the_advice_names_commands_that_exist() -> None:
    """Every `truthgpt ...` that an alert's advice tells to run is a command with these options."""
    for rule in RULES.values():
        for line in re.findall(r"`truthgpt ([^`]+)`", rule.advice):
            check_command(line.split())
        assert rule.runbook == f"docs/operations.md#{rule.name.lower()}" and rule.severity in ("warning", "critical")


def test_the_page_has_every_alert() -> None:
    """The table of docs/alerts.md has each alert once, with its severity, its time, and who tells it."""
    page = (Path(__file__).parents[3] / "docs" / "alerts.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(TruthGPT\w+)` \|.*\| ([^|]+) \| (\w+) \| ([^|]+) \|$", page, re.MULTILINE)
    assert {name: (time, severity, by) for name, time, severity, by in rows} == {
        rule.name: (
            f"{rule.for_s:g} s" if rule.for_s else "at once", rule.severity, "one" if rule.shared else "each host",
        )
        for rule in RULES.values()
    }  # fmt: skip
    assert len(rows) == len(RULES)
