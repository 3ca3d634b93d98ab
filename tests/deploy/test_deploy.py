"""What deploy/ brings: it names what exists, its thresholds are the settings', its rules are tested."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.metrics_table import TABLE
from orchestrator.monitor.conditions import conditions
from orchestrator.monitor.rules import RULES as BUILT_IN
from orchestrator.settings import Settings
from tests.orchestrator.monitor.test_conditions import NOW, WELL

from .promql import DASHBOARD, DEPLOY, EXPRESSIONS, RULES, SCRAPED, Use, labels_of, panels, parse

ROOT = DEPLOY.parent
TEST_FILES = ("alerts_test.yml", "alerts_long_test.yml")
TESTS = [test for name in TEST_FILES for test in yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))["tests"]]
# alert -> the setting of its threshold, and figures that are exactly there
THRESHOLDS: dict[str, tuple[str, dict[str, Any]]] = {
    "TruthGPTMemoryHigh": ("alert_memory", {"memory": {"used_bytes": 90, "total_bytes": 100}}),
    "TruthGPTGpuMemoryHigh": ("alert_gpu_memory", {"gpus": [{"gpu": "0", "used_bytes": 95, "total_bytes": 100}]}),
    "TruthGPTDiskFull": ("alert_disk", {"disks": [{"folder": "home", "free_bytes": 10, "total_bytes": 100}]}),
    "TruthGPTErrorRateHigh": ("alert_error_rate", {"requests": 1000, "error_rate": 0.1}),
    "TruthGPTQueueLong": ("alert_queue", {"models": [{"name": "demo", "waiting": 32}]}),
    "TruthGPTBackupTooOld": ("alert_backup_age_s", {"backup": {"wanted": True, "newest_at": NOW - 172_800}}),
}


def tool(name: str, package: str, *arguments: str | Path, input: str | None = None) -> str:
    """What one of Prometheus's tools says of its arguments; they have to be good."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian's package {package} has it)")
    done = subprocess.run([path, *map(str, arguments)], cwd=DEPLOY, input=input, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS, ids=[where for where, _ in EXPRESSIONS])
def test_every_series_is_exported_with_its_labels(where: str, expression: str) -> None:
    """Each series that an alert or a panel names is in the table or Triton's, and so is each label and its value."""
    uses, groups = parse(expression)
    assert uses
    known: set[str] = set()
    for use in uses:
        if use.series.startswith("nv_"):  # tests/e2e/test_prometheus.py asks the real Triton
            known |= {*use.matchers, *groups}
            continue
        labels = labels_of(use.series)
        assert labels is not None, f"{where}: there is no series {use.series}"
        assert {*use.matchers} <= labels, f"{where}: {use.series} has no label {set(use.matchers) - labels}"
        known |= labels
        series = TABLE.get(use.series)
        for label, values in use.matchers.items():
            for value in values if series and label not in SCRAPED else ():
                assert re.search(rf"\b{value}\b", series.help), f"{where}: {use.series} says nothing of {label} {value}"
    assert groups <= known, f"{where}: nothing has the label {groups - known}"


def test_the_reader_of_promql_is_not_blind() -> None:
    """Names, matchers and groupings are found wherever they stand, and functions and words are none of them."""
    uses, groups = parse(
        'histogram_quantile(0.9, sum by (le, model) (rate(a_bucket{x=~"$i", y!="1|b"}[5m] offset 1h))) > bool 2e3\n'
        '  and on (job) group_left (k) b unless absent(c{z="it\'s {}"}) or d{} - 1'
    )
    assert uses == [
        Use("a_bucket", {"x": [], "y": ["1", "b"]}), Use("b"), Use("c", {"z": []}), Use("d"),
    ]  # fmt: skip
    assert groups == {"le", "model", "job", "k"}
    with pytest.raises(ValueError, match="not PromQL"):
        parse("a ? b")
    assert labels_of("truthgpt_stage_seconds") is None and labels_of("truthgpt_stage_seconds_sum") is not None
    assert labels_of("truthgpt_redis_up_bucket") is None and labels_of("nothing") is None


def test_every_series_to_watch_is_shown_or_alerted_on() -> None:
    """No series of the table is forgotten: each is in a panel or in an alert."""
    named = {use.series for _, expression in EXPRESSIONS for use in parse(expression)[0]}
    shown = {series for series in TABLE if any(name.startswith(series) for name in named)}
    # the error rate is for scripts; the panels and alerts compute it
    assert set(TABLE) - shown == {"truthgpt_error_rate", "truthgpt_generation_duration_seconds"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_a_rule_says_what_people_need(rule: dict[str, Any]) -> None:
    """It has a severity, a summary, a description of the case at hand and a place with advice, under one base."""
    assert re.fullmatch(r"TruthGPT[A-Z]\w+", rule["alert"])
    assert rule["labels"] in ({"severity": "warning"}, {"severity": "critical"})
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "runbook_url"}
    assert notes["summary"].endswith(".") and "{{" in notes["description"]
    assert notes["runbook_url"] == f"docs/operations.md#{rule['alert'].lower()}"
    uses, groups = parse(rule["expr"])
    labels = set.union(*(labels_of(use.series) or set() for use in uses))
    assert {*re.findall(r"\$labels\.(\w+)", notes["description"])} <= (groups & labels or labels)


def test_every_alert_has_its_advice() -> None:
    """docs/operations.md has a heading for each alert."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    headings = {title.lower() for title in re.findall(r"^## +(\w+)$", page, re.MULTILINE)}
    assert {rule["alert"].lower() for rule in RULES} <= headings
    assert {rule.runbook for rule in BUILT_IN.values()} <= {f"docs/operations.md#{heading}" for heading in headings}


@pytest.mark.parametrize("alert", THRESHOLDS)
def test_thresholds_are_the_settings(alert: str) -> None:
    """The rule compares with the default of the setting that the built-in alert goes by, and both alike when equal."""
    setting, equal = THRESHOLDS[alert]
    assert compared(alert, setting) == (">=" if holds(alert, equal) else ">")


def test_the_error_rate_is_that_of_as_many_requests() -> None:
    """Both need as many requests in five minutes, that many included."""
    few = int(Settings.table()["alert_error_requests"].default)  # type: ignore[call-overload]
    assert compared("TruthGPTErrorRateHigh", "alert_error_requests") == ">="
    assert holds("TruthGPTErrorRateHigh", {"requests": few, "error_rate": 0.2})
    assert not holds("TruthGPTErrorRateHigh", {"requests": few - 1, "error_rate": 0.2})


def compared(alert: str, setting: str) -> str:
    """How the rule compares with the setting's default."""
    (rule,) = (rule for rule in RULES if rule["alert"] == alert)
    default = float(str(Settings.table()[setting].default))
    (sign,) = (
        sign for sign, number in re.findall(r"([<>]=?|[=!]=) ([\d.]+)", rule["expr"]) if float(number) == default
    )
    return str(sign)


def holds(alert: str, figures: dict[str, Any]) -> bool:
    """Whether the gateway's own alert does, of a deployment that is well but for these figures."""
    return alert in {found.name for found in conditions({**WELL, **figures}, Settings(backup=True))}


def test_built_in_alerts_hold_as_long() -> None:
    """For as long as a rule here holds the built-in one does, but for two scrapes at least where there is a time."""
    seconds = {"0s": 0, "30s": 30, "1m": 60, "15m": 900}
    here = {rule["alert"]: seconds[rule.get("for", "0s")] for rule in RULES if rule["alert"] in BUILT_IN}
    expected = {name: max(30, rule.for_s) if rule.for_s else 0 for name, rule in BUILT_IN.items()}
    expected["TruthGPTBackupTooOld"] = 900  # docs/monitoring.md says so
    assert here == expected


def test_the_built_in_alerts_are_all_there() -> None:
    """Each alert that the gateway raises by itself has a rule of the same name and severity."""
    here = {rule["alert"]: rule["labels"]["severity"] for rule in RULES}
    built_in = {name: rule.severity for name, rule in BUILT_IN.items()}
    assert built_in == {name: severity for name, severity in here.items() if name in built_in}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_a_rule_has_its_own_test(rule: dict[str, Any]) -> None:
    """The tests of the rules have a series that fires it, not before its time, and beside it one that does not."""
    cases = [test for test in TESTS if test["name"].startswith(f"{rule['alert']}: ")]
    checks = [check for test in cases for check in test["alert_rule_test"]]
    assert {check["alertname"] for check in checks} == {rule["alert"]}
    firing = [check for check in checks if check.get("exp_alerts")]
    assert firing and any(len(test["input_series"]) > 1 for test in cases)
    assert all(len(check["exp_alerts"]) == 1 for check in firing)  # of two instances or more
    quiet = [check for check in checks if not check.get("exp_alerts")]
    assert quiet or "for" not in rule


def test_promtool_takes_the_configuration_and_the_rules() -> None:
    """`promtool check config` and `check rules` find nothing to mend."""
    assert "SUCCESS" in tool("promtool", "prometheus", "check", "config", "prometheus.yml")
    assert f"{len(RULES)} rules found" in tool("promtool", "prometheus", "check", "rules", "alerts.yml")


@pytest.mark.parametrize("name", TEST_FILES)
def test_promtool_runs_the_rules_tests(name: str) -> None:
    """Every rule fires when it should, does not when it should not, and says what is expected."""
    assert "SUCCESS" in tool("promtool", "prometheus", "test", "rules", name)


def test_promtool_takes_the_dashboards_expressions(tmp_path: Path) -> None:
    """Every expression of the dashboard parses in Prometheus itself."""
    rules = [{"record": f"panel:{number}", "expr": expr} for number, (_, expr) in enumerate(EXPRESSIONS)]
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in tool("promtool", "prometheus", "check", "rules", path)


def test_amtool_takes_the_configuration() -> None:
    """`amtool check-config` finds nothing to mend, and who is told of what is as its comments say."""
    assert "2 receivers" in tool("amtool", "prometheus-alertmanager", "check-config", "alertmanager.yml")
    for severity, receiver in (("critical", "on-call"), ("warning", "team")):
        argv = ("config", "routes", "test", "--config.file=alertmanager.yml", f"severity={severity}")
        assert tool("amtool", "prometheus-alertmanager", *argv).strip() == receiver


def test_no_file_holds_a_secret() -> None:
    """Passwords and tokens are named by files: no option that takes one itself is used."""
    for path in DEPLOY.rglob("*.yml"):
        secrets = re.findall(
            r"^[^#\n]*\b(\w*(?:password|api_url|credentials|token|secret|key)): ", path.read_text(), re.M
        )
        assert secrets == [], path.name


def test_the_ports_are_the_settings() -> None:
    """Prometheus is told to scrape what the gateway and Triton listen on by default."""
    jobs = {
        job["job_name"]: job["static_configs"][0]["targets"]
        for job in yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    }
    table = Settings.table()
    assert jobs == {
        "truthgpt": [f"127.0.0.1:{table['ops_port'].default}"],
        "triton": [f"127.0.0.1:{table['triton_metrics_port'].default}"],
    }


def test_inhibited_alerts_exist() -> None:
    """Each rule of Alertmanager that silences one alert by another names alerts that there are."""
    names = {rule["alert"] for rule in RULES}
    for rule in yaml.safe_load((DEPLOY / "alertmanager.yml").read_text())["inhibit_rules"]:
        for matcher in rule["source_matchers"] + rule["target_matchers"]:
            _, sign, value = re.split(r"(=~|!=|=)", matcher, maxsplit=1)
            pattern = value.strip('"') if sign == "=~" else re.escape(value.strip('"'))
            for part in re.findall(r"\((.+)\)", pattern) or [pattern]:
                for one in part.split("|"):
                    assert any(re.fullmatch(f"(TruthGPT)?{one}", name) for name in names), matcher


def test_a_panel_can_be_read() -> None:
    """Each has a title, a description, a unit, a data source that can be chosen, and legends of labels that it has."""
    for panel in panels():
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["datasource"]["uid"] == "${DS_PROMETHEUS}"
        assert panel["type"] == "state-timeline" or panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] and target["legendFormat"]
            uses, groups = parse(target["expr"].replace("$__rate_interval", "1m"))
            labels = groups or set.union(*(labels_of(use.series) or set() for use in uses))
            assert {*re.findall(r"{{(\w+)}}", target["legendFormat"])} <= labels, panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_the_dashboard_is_laid_out() -> None:
    """No two panels lie on each other, none leaves the 24 columns, ids are unique, and the rows are those promised."""
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len({*ids}) == len(ids)
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Overview", "Models", "Cache and limits", "Machine", "Operating", "Triton", "Engine"]


def test_the_dashboards_variables() -> None:
    """Every variable that an expression uses is defined, and each that is defined is used."""
    defined = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    text = (DEPLOY / "grafana" / "truthgpt.json").read_text(encoding="utf-8")
    used = {*re.findall(r"\$\{?(\w+)", text)} - {"__rate_interval", "__all"}
    assert used == defined == {"DS_PROMETHEUS", "instance", "model"}


def test_the_dashboards_latency_is_that_of_status() -> None:
    """Of requests that ended well, as the figures count it: what is refused at once makes no service look fast."""
    uses = [use for _, expr in EXPRESSIONS for use in parse(expr)[0] if "request_duration_seconds" in use.series]
    assert len(uses) == 4 and all(use.matchers["outcome"] == ["ok"] for use in uses)


def test_the_newest_backup_of_several_gateways() -> None:
    """The panel shows the age of the oldest one, and says `none` where a gateway has none."""
    (panel,) = (panel for panel in panels() if panel["title"] == "Newest backup")
    (target,) = panel["targets"]
    assert "min(" in target["expr"] and "== 0) - 1" in target["expr"]
    (mapping,) = panel["fieldConfig"]["defaults"]["mappings"]
    assert mapping["options"]["-1"]["text"] == "none"


def test_what_provisions_grafana_fits_the_rest() -> None:
    """The data source is the Prometheus of deploy/prometheus.yml, with its interval; both files are YAML."""
    folder = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())["datasources"]
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["type"] == "prometheus" and source["jsonData"]["timeInterval"] == scraped
    assert f"--web.listen-address={source['url'].removeprefix('http://')}" in (DEPLOY / "prometheus.yml").read_text()
    (provider,) = yaml.safe_load((folder / "dashboards" / "truthgpt.yml").read_text())["providers"]
    assert provider["type"] == "file" and provider["options"]["path"]
