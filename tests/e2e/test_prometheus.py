"""The files of deploy/ in use: a real Prometheus scrapes a running stack, evaluates the rules, and people hear."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.clock import awake
from tests.deploy.promql import DEPLOY, EXPRESSIONS, RULES, SCRAPED, parse

from .stack import Stack, free_ports, kill, wait_until
from .test_metrics import scrape

START_S = 20.0
# a machine that is full or slow is no fault of the stack
OF_THE_HOST = {"TruthGPTDiskFull", "TruthGPTMemoryHigh", "TruthGPTGpuMemoryHigh", "TruthGPTTimeToFirstTokenSlow"}
OF_THE_MACHINE = {
    "system_memory_used_bytes", "system_memory_total_bytes", "disk_free_bytes", "disk_total_bytes",
}  # fmt: skip

# no GPU, no job that has run, no backup, fallback or notification, and no caller with limits
NOT_HERE = "gpu|_job_last|ALERTS|backup|fallbacks|notifications|limit_|errors_total|failure"


def binary(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian has it as a package of that name)")
    return found


@contextlib.contextmanager
def server(folder: Path, port: int, *argv: str) -> Iterator[str]:
    """A server that is ready, until the end of the block; its URL."""
    url, log = f"http://127.0.0.1:{port}", folder / f"{Path(argv[0]).name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen([*argv, f"--web.listen-address=127.0.0.1:{port}"], stdout=output, stderr=output)

    def ready() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError):
            return ask(f"{url}/-/ready") is not None
        return False

    try:
        wait_until(ready, START_S, f"{argv[0]} is ready")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(url: str, **query: str) -> Any:
    """The answer of Prometheus's API, or the text of another page. Raises OSError."""
    address = f"{url}?{urllib.parse.urlencode(query)}" if query else url
    with urllib.request.urlopen(address, timeout=10) as answer:  # noqa: S310  # our own server
        data = answer.read()
    return json.loads(data)["data"] if data.startswith(b"{") else data


@contextlib.contextmanager
def receiver() -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """An HTTP server that takes what Alertmanager tells: its port, and every alert so far."""
    told: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            told.extend(json.loads(body)["alerts"])
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield http.server_address[1], told
        finally:
            http.shutdown()
            thread.join()


def write_files(folder: Path, stack: Stack, alertmanager: int, webhook: int) -> None:
    """The files of deploy/, with this stack's ports, and everything that takes minutes there taking a second."""
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{alertmanager}"]
    for job, port in zip(config["scrape_configs"], ("OPS", "TRITON_METRICS"), strict=True):
        job["static_configs"][0]["targets"] = [f"127.0.0.1:{stack.ports[port]}"]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = "1s"
    (folder / "alerts.yml").write_text(yaml.safe_dump(rules))
    config = yaml.safe_load((DEPLOY / "alertmanager.yml").read_text())
    config["global"] = {"resolve_timeout": "1m"}
    for route in (config["route"], *config["route"]["routes"]):
        route |= {"group_wait": "0s", "group_interval": "1s"}
    for each in config["receivers"]:  # only the webhook can be tried here
        hooks = each.pop("webhook_configs", [])
        for other in ("slack_configs", "email_configs"):
            each.pop(other, None)
        if hooks:
            each["webhook_configs"] = [{**hook, "url": f"http://127.0.0.1:{webhook}/"} for hook in hooks]
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))


class Prometheus:
    """A running one, and what its Alertmanager has told."""

    def __init__(self, url: str, told: list[dict[str, Any]]) -> None:
        self.url, self.told = url, told

    def query(self, expression: str) -> list[dict[str, Any]]:
        return list(ask(f"{self.url}/api/v1/query", query=expression)["result"])

    def states(self, alert: str) -> set[str]:
        """pending, firing, or nothing."""
        alerts = ask(f"{self.url}/api/v1/alerts")["alerts"]
        return {found["state"] for found in alerts if found["labels"]["alertname"] == alert}

    def heard(self, alert: str) -> list[str]:
        return [found["status"] for found in self.told if found["labels"]["alertname"] == alert]


@pytest.fixture(scope="module")
def prometheus(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus and Alertmanager on the stack."""
    argv, beside = binary("prometheus"), binary("prometheus-alertmanager")
    folder = tmp_path_factory.mktemp("prometheus")
    port, alertmanager_port = free_ports(2)
    with receiver() as (webhook, told):
        write_files(folder, stack, alertmanager_port, webhook)
        with (
            server(
                folder, alertmanager_port, beside, f"--config.file={folder / 'alertmanager.yml'}",
                f"--storage.path={folder / 'alertmanager'}", "--cluster.listen-address=",
            ),
            server(
                folder, port, argv, f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
            ) as url,
        ):  # fmt: skip
            yield Prometheus(url, told)
    shutil.rmtree(folder)


def test_it_scrapes_and_every_rule_can_be_evaluated(stack: Stack, prometheus: Prometheus) -> None:
    """Both targets are up, no rule has an error, and nothing fires of a stack that is well."""
    wait_until(lambda: [row["value"][1] for row in prometheus.query("up")] == ["1", "1"], 15, "both are scraped")

    def evaluated() -> list[dict[str, Any]]:
        groups = ask(f"{prometheus.url}/api/v1/rules")["groups"]
        return [rule for group in groups for rule in group["rules"] if rule["health"] != "unknown"]

    wait_until(lambda: len(evaluated()) == len(RULES), 10, "every rule was evaluated")
    rules = evaluated()
    assert {rule["name"] for rule in rules} == {rule["alert"] for rule in RULES}
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []
    wait_until(
        lambda: not {row["metric"]["alertname"] for row in prometheus.query("ALERTS")} - OF_THE_HOST,
        15, "nothing fires",
    )  # fmt: skip


def test_every_panel_can_be_drawn(stack: Stack, prometheus: Prometheus) -> None:
    """Prometheus computes each expression of the dashboard, and those of a stack that had a request have a value."""
    for prompt in ("one", "two"):
        assert stack.request("POST", "/v1/completions", {"model": stack.model, "prompt": prompt})[0] == 200
    missing: dict[str, set[str]] = {}

    def all_but_what_is_not_here() -> bool:
        missing.clear()
        for where, expression in EXPRESSIONS[len(RULES) :]:
            query = expression.replace("$instance", ".*").replace("$model", ".*").replace("[1m]", "[10s]")
            names = {use.series for use in parse(expression)[0]}
            if not any(re.search(NOT_HERE, name) for name in names) and not prometheus.query(query):
                missing[where] = names
        return not missing

    try:
        wait_until(all_but_what_is_not_here, 15, "every panel has something")
    except AssertionError:
        raise AssertionError(f"empty panels: {missing}") from None


def test_triton_exports_what_the_dashboard_names(stack: Stack) -> None:
    """Each nv_ series in deploy/ is one of the real Triton's, with the labels that are asked of it."""
    text = stack.request("GET", "/metrics", port="TRITON_METRICS")[2].decode()
    real = {
        sample.name: {*sample.labels} for family in text_string_to_metric_families(text) for sample in family.samples
    }
    real |= {name.removesuffix("_total"): labels for name, labels in real.items() if name not in text}
    named = 0
    for where, expression in EXPRESSIONS:
        uses, groups = parse(expression)
        for use in uses:
            if use.series.startswith("nv_"):
                named += 1
                assert {*use.matchers} <= real[use.series] | SCRAPED, where
        if all(use.series.startswith("nv_") for use in uses):
            assert groups <= set.union(*(real[use.series] for use in uses)) | SCRAPED, where
    assert named > 10


def test_the_machine_is_measured(stack: Stack) -> None:
    """Memory and the three disks are in a scrape of the running stack, with values that can be."""
    wait_until(lambda: {name for name, *_ in scrape(stack)} >= OF_THE_MACHINE, 15, "the machine's series")
    now = scrape(stack)
    assert 0 < now["system_memory_used_bytes",] < now["system_memory_total_bytes",]
    for folder in ("home", "model_repository", "backups"):
        assert 0 < now["disk_free_bytes", folder] <= now["disk_total_bytes", folder]


@contextlib.contextmanager
def stopped(stack: Stack, *names: str) -> Iterator[None]:
    """These processes stand still meanwhile, the first one first and longest; afterwards the stack is well."""
    pids = [stack.pid(name) for name in names]
    for pid in pids:
        kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in reversed(pids):
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGCONT)
        wait_until(stack.ready, 30, "the stack is well again")


def test_a_redis_that_is_away_is_told_and_so_is_its_return(stack: Stack, prometheus: Prometheus) -> None:
    """TruthGPTRedisAway fires in Prometheus and resolves, and who listens to Alertmanager hears both."""
    wait_until(lambda: not prometheus.states("TruthGPTRedisAway"), 20, "what an earlier test did is over")
    with stopped(stack, "redis"):
        wait_until(lambda: "firing" in prometheus.states("TruthGPTRedisAway"), 20, "the alert fires")
        wait_until(lambda: prometheus.heard("TruthGPTRedisAway")[-1:] == ["firing"], 20, "it was told")
    wait_until(lambda: not prometheus.states("TruthGPTRedisAway"), 20, "the alert is resolved")
    wait_until(lambda: prometheus.heard("TruthGPTRedisAway")[-1:] == ["resolved"], 20, "that was told")
    found = next(each for each in prometheus.told if each["labels"]["alertname"] == "TruthGPTRedisAway")
    assert found["annotations"]["summary"] == "Redis does not answer."
    assert found["labels"]["instance"] in found["annotations"]["description"]


def test_scrapes_answer_while_triton_and_redis_are_away(stack: Stack) -> None:
    """With both standing still every scrape is there within a second, says so, and has the machine's series as ever."""
    with stopped(stack, "supervisor", "redis", "triton"):  # which would start another Triton within two seconds
        began, slowest = awake(), 0.0
        while True:
            asked = awake()
            now = scrape(stack)
            slowest = max(slowest, awake() - asked)
            if now["triton_up",] == now["redis_up",] == 0:
                break
            assert awake() - began < 15, "both were seen to be away"
            time.sleep(0.1)
        assert {name for name, *_ in now} >= OF_THE_MACHINE
        assert slowest < 1.0
    wait_until(lambda: scrape(stack)["triton_up",] == scrape(stack)["redis_up",] == 1, 20, "both are seen again")
