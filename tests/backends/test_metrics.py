from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backends.inflight import metrics
from backends.inflight.counters import Counters
from backends.inflight.engine import Engine
from backends.inflight.errors import Internal
from backends.inflight.metrics import PREFIX, SERIES, Metrics, figures
from backends.inflight.scheduler import Scheduler

from .fakes import Collector, FakeRunner, sequence


class Triton:
    """Stands for Triton's registry: (name, labels) -> value, changed by messages that it counts."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], float] = {}
        self.messages = 0
        self.changed = threading.Condition()
        registry = self

        class Family:
            """pb_utils.MetricFamily."""

            COUNTER, GAUGE = "counter", "gauge"

            def __init__(self, name: str, description: str, kind: str) -> None:
                self.name, self.kind = name, kind

            def Metric(self, labels: dict[str, str]) -> Any:
                key = (self.name, labels["engine"])
                assert set(labels) == set(metrics.LABELS)
                assert key not in registry.values, "Triton would remove both when one goes"
                registry.values[key] = 0.0
                return Metric(key, self.kind)

        class Metric:
            def __init__(self, key: tuple[str, str], kind: str) -> None:
                self.key, self.kind = key, kind

            def set(self, value: float) -> None:
                assert self.kind == "gauge"
                self._to(value)

            def increment(self, by: float) -> None:
                assert self.kind == "counter" and by > 0
                self._to(registry.values[self.key] + by)

            def _to(self, value: float) -> None:
                with registry.changed:
                    registry.messages += 1
                    registry.values[self.key] = value
                    registry.changed.notify_all()

            def __del__(self) -> None:
                registry.values.pop(self.key, None)

        self.family = Family

    def wait(self, name: str, value: float, engine: str = "0") -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.values[PREFIX + name, engine] == value, 10)


@pytest.fixture
def triton() -> Triton:
    return Triton()


@pytest.fixture
def engine() -> Iterator[Engine]:
    running = Engine(FakeRunner(4, 64), Scheduler(slots=4, max_queue=8, chunk=8))
    running.start()
    yield running
    running.close(5)


def test_what_an_engine_did_is_counted(engine: Engine) -> None:
    """Prompt tokens, generated tokens and steps are those of the requests that ran; idle again, the gauges are 0."""
    sinks = [Collector(), Collector()]
    for prompt, sink in zip(([1, 2, 3], list(range(20))), sinks, strict=True):
        engine.submit(sequence(prompt, 5, sink))
    assert all(sink.ended.wait(10) for sink in sinks)
    while engine.load().busy:
        pass
    now = figures(engine, 256)
    assert (now["prefill_tokens_total"], now["decode_tokens_total"]) == (23, 10)
    assert now["steps_total"] >= 5 and now["step_seconds_total"] > 0
    assert (now["requests_running"], now["requests_waiting"], now["kv_positions_used"]) == (0, 0, 0)
    assert (now["slots"], now["kv_positions"]) == (4, 256)


def test_an_engine_that_has_ended_runs_nothing(engine: Engine) -> None:
    """Gauges that would go on saying what was last are 0; what was counted stays."""
    sink = Collector()
    engine.submit(sequence([1, 2], 3, sink))
    sink.ended.wait(10)
    engine.close(5)
    now = figures(engine, 256)
    assert (now["slots"], now["requests_running"], now["decode_tokens_total"]) == (0, 0, 3)

    class Dead:
        counters = Counters(steps=7, kv_positions=9)

        def load(self) -> Any:
            raise Internal("nor on the CPU")
    assert {name for name, value in figures(Dead(), 256).items() if value} == {"steps_total", "kv_positions"}


def test_who_was_cancelled_holds_no_positions(engine: Engine) -> None:
    """No step is taken after the last one has left, and yet nothing of it is shown."""
    engine.counters.kv_positions = 40
    assert figures(engine, 256)["kv_positions_used"] == 0


def test_series_are_named_as_prometheus_asks() -> None:
    """Counters and only they end in _total, names and help are well formed, and none is there twice."""
    assert len({series.name for series in SERIES}) == len(SERIES)
    for series in SERIES:
        assert re.fullmatch(r"[a-z_]+", series.name) and series.help.endswith(".")
        assert series.name.endswith("_total") == (series.kind == "counter")


def test_the_page_has_every_series() -> None:
    """docs/metrics.md says of each what Triton's endpoint says, and of no other."""
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(rf"^\| `({PREFIX}\w+)` \| (\w+) \| (.+) \|$", page, re.MULTILINE)
    assert rows == [(PREFIX + series.name, series.kind, series.help) for series in SERIES]


def test_changes_are_sent_and_nothing_else(triton: Triton) -> None:
    """Gauges are set, counters raised by what they grew, the last change is sent on stop, and then all are gone."""
    values = {series.name: 0.0 for series in SERIES} | {"slots": 4.0}
    sent = Metrics(triton.family, "m", "1", lambda: dict(values), period_s=0.01)
    sent.start()
    assert {name for name, _ in triton.values} == {PREFIX + series.name for series in SERIES}
    triton.wait("slots", 4)
    values |= {"decode_tokens_total": 10.0, "requests_running": 2.0}
    triton.wait("requests_running", 2)
    triton.wait("decode_tokens_total", 10)
    values |= {"decode_tokens_total": 15.0, "requests_running": 0.0}
    triton.wait("decode_tokens_total", 15)
    triton.wait("requests_running", 0)
    assert triton.messages == 5
    sent._period_s = 60.0
    values["steps_total"] = 3.0
    sent.stop(5)
    assert triton.messages == 6 and triton.values == {}


def test_engines_of_one_version_have_labels_of_their_own(triton: Triton) -> None:
    """Two at once are 0 and 1, as while a version is loaded again; the next takes the number that was given back."""
    values = SimpleNamespace(read=lambda: {series.name: 1.0 for series in SERIES})
    first, second, other = (Metrics(triton.family, "m", version, values.read, 60) for version in "112")
    first.start()
    second.start()
    assert {engine for _, engine in triton.values} == {"0", "1"}
    first.stop(5)
    assert {engine for _, engine in triton.values} == {"1"}
    third = Metrics(triton.family, "m", "1", values.read, 60)
    third.start()
    assert {engine for _, engine in triton.values} == {"0", "1"}
    third.stop(5)
    other.start()  # of another version, which has numbers of its own
    assert {engine for _, engine in triton.values} == {"0", "1"}
    other.stop(5)
    second.stop(5)
    assert triton.values == {}


def test_a_triton_without_metrics_serves_all_the_same() -> None:
    """What Triton raises is a line in the log, and stopping is no error."""
    lines: list[str] = []

    class Family:
        COUNTER = GAUGE = 0

        def __init__(self, **given: object) -> None:
            raise RuntimeError("metrics are not supported")

    refused = Metrics(Family, "m", "1", dict, tell=lines.append)
    refused.start()
    refused.stop(1)
    assert lines == ["m has no metrics of its own: metrics are not supported"]


def test_more_engines_than_numbers_go_without(triton: Triton, monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels are bounded: one engine too many has no series, and says so."""
    monkeypatch.setattr(metrics, "ENGINES", 1)
    lines: list[str] = []
    one, more = (Metrics(triton.family, "m", "1", dict, 60, tell=lines.append) for _ in range(2))
    one.start()
    more.start()
    assert {engine for _, engine in triton.values} == {"0"} and len(lines) == 1
    more.stop(1)
    one.stop(1)
