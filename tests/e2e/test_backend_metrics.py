"""The engine's own series at Triton's metrics endpoint."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from backends.inflight.metrics import LABELS, PREFIX, SERIES
from tests.counting import write_entry

from .stack import Stack, wait_until
from .test_backend import generate, raw_stream

Samples = dict[str, float]


def scrape(stack: Stack, model: str = "counting") -> dict[str, Samples]:
    """engine -> the values of its series, without PREFIX."""
    status, _, text = stack.request("GET", "/metrics", port="TRITON_METRICS")
    assert status == 200
    found: dict[str, Samples] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            if sample.name.startswith(PREFIX) and sample.labels["model"] == model:
                assert set(sample.labels) == set(LABELS)
                found.setdefault(sample.labels["engine"], {})[sample.name.removeprefix(PREFIX)] = sample.value
    return found


def values(stack: Stack) -> Samples:
    """Those of the counting model's one engine."""
    (only,) = scrape(stack).values()
    return only


def told(stack: Stack, model: str, name: str) -> list[float]:
    """One series of each of a model's engines."""
    return [each[name] for each in scrape(stack, model).values()]


def settled(stack: Stack) -> Samples:
    """The series while nobody asks, once what earlier tests did is in them."""
    wait_until(lambda: values(stack)["requests_running"] + values(stack)["kv_positions_used"] == 0, 10, "idle")
    return values(stack)


def test_every_series_is_there_with_its_kind_and_help(stack: Stack) -> None:
    """Triton's endpoint has each series of the backend as it is documented, and the slots' memory in positions."""
    text = stack.request("GET", "/metrics", port="TRITON_METRICS")[2].decode()
    for series in SERIES:
        assert f"# HELP {PREFIX}{series.name} {series.help}\n# TYPE {PREFIX}{series.name} {series.kind}\n" in text
    wait_until(lambda: values(stack)["slots"] == 4, 5, "the first values are told")
    assert set(values(stack)) == {series.name for series in SERIES}
    assert values(stack)["kv_positions"] == 4 * 2000


def test_the_series_move_when_requests_run(stack: Stack) -> None:
    """Four streams on four slots and a fifth in the queue are seen; afterwards each token and step is counted."""
    before = settled(stack)
    with contextlib.ExitStack() as clients:
        for _ in range(5):
            clients.callback(raw_stream(stack).close)
        wait_until(lambda: values(stack)["requests_waiting"] == 1, 10, "the fifth waits")
        now = values(stack)
        assert now["requests_running"] == 4 and now["slots"] == 4
        wait_until(lambda: values(stack)["kv_positions_used"] > 4, 10, "positions fill")
    between = settled(stack)
    assert between["requests_waiting"] == 0
    assert generate(stack, text_input="one " * 20, max_tokens=7)[0] == 200
    wait_until(lambda: values(stack)["decode_tokens_total"] >= between["decode_tokens_total"] + 7, 5, "it is counted")
    grown = {name: value - between[name] for name, value in settled(stack).items()}
    assert (grown["prefill_tokens_total"], grown["decode_tokens_total"]) == (20, 7)
    assert grown["steps_total"] == 9  # three chunks of up to eight tokens, of which the last gives the first token
    assert 9 * 0.02 <= grown["step_seconds_total"] < 9 * 5
    assert all(between[name] >= value for name, value in before.items() if name.endswith("_total"))


@pytest.fixture
def second(stack: Stack) -> Iterator[str]:
    """A model of its own, so that it can be loaded, loaded again and unloaded at Triton."""
    folder = write_entry(stack.repository, "counted", step_delay_ms=5)
    yield folder.name
    stack.request("POST", f"/v2/repository/models/{folder.name}/unload", {}, "TRITON_HTTP")
    wait_until(lambda: scrape(stack, folder.name) == {}, 20, "it is gone")
    shutil.rmtree(folder)


@pytest.mark.slow
def test_series_go_with_their_model_and_never_clash(stack: Stack, second: str) -> None:
    """While a version is loaded again, two engines of it have series side by side; unloading takes all away, and the
    server lives on.
    """
    load = f"/v2/repository/models/{second}/load"
    assert stack.request("POST", load, {}, "TRITON_HTTP", timeout=30)[0] == 200
    body = {"text_input": "one", "max_tokens": 3}
    ask = f"/v2/models/{second}/generate"
    assert stack.request("POST", ask, body, "TRITON_HTTP")[0] == 200
    wait_until(lambda: scrape(stack, second)["0"]["decode_tokens_total"] == 3, 5, "its tokens are counted")
    config = json.loads(stack.request("GET", f"/v2/models/{second}/config", port="TRITON_HTTP")[2])
    for slots in ("2", "3"):  # another config makes Triton start a new process beside the old one
        with contextlib.closing(raw_stream(SimpleNamespace(model=second, ports=stack.ports), max_tokens=300)):
            config["parameters"]["slots"] = {"string_value": slots}
            given = {"parameters": {"config": json.dumps(config)}}
            assert stack.request("POST", load, given, "TRITON_HTTP", timeout=30)[0] == 200
        wait_until(lambda: told(stack, second, "slots") == [float(slots)], 20, "the old one is gone")  # noqa: B023 (it waits)
        assert stack.request("POST", ask, body, "TRITON_HTTP")[0] == 200
        wait_until(lambda: told(stack, second, "decode_tokens_total") == [3.0], 5, "the new engine counts from 0")
    stack.request("POST", f"/v2/repository/models/{second}/unload", {}, "TRITON_HTTP")
    wait_until(lambda: scrape(stack, second) == {}, 20, "its series are gone")
    assert set(scrape(stack)) == {"0"} and stack.load()["slots"] == 4
