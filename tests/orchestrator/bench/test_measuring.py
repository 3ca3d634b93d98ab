"""What a measurement makes of endpoints that are right, wrong, slow or dead: no fault is ever part of a figure."""

from __future__ import annotations

import asyncio
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.bench.answers import Answer, BenchError, Fault
from orchestrator.bench.figures import Run, Sample, percentile
from orchestrator.bench.plan import Goals, Load, PlanError, Progress, Target
from orchestrator.bench.prompts import Prompts, Sizing
from orchestrator.bench.running import GIVE_UP, measure

from .serving import DONE, STREAM, Answering, good, piece, role, serving, usage, whole

WORDS = {"prompt_tokens": 12, "output_tokens": 5, "timeout_s": 20.0}


async def measured(answer: Answering, load: Load | None = None, **target: Any) -> Run:
    """A measurement of an endpoint that answers so, without the questions that are not counted."""
    async with serving(answer) as url:
        made = Target(url, "openai", "m", **target)
        return await measure(made, load or Load(requests=4, **WORDS), sizing=Sizing(9, 12))


async def test_a_good_endpoint_has_figures_and_prompts_of_the_wanted_length() -> None:
    """Requests, tokens and lengths are the server's, and no prompt is asked twice, over a sweep of runs as well."""
    seen: list[str] = []

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        seen.append(body["messages"][0]["content"])
        await good(body, writer)

    async with serving(answer) as url:
        target, sizing = Target(url, "openai", "m"), None
        for clients in (1, 3):
            run = await measure(target, Load(concurrency=clients, requests=9, warmup=2, **WORDS), sizing=sizing)
            sizing = run.sizing
            found = run.to_json()
            assert (found["completed"], found["errors"], found["output_tokens"]) == (9, 0, 45)
            assert found["prompt_tokens_mean"] == 12 and found["tokens_counted_by"] == "server"
            assert set(found["ttft_s"]) >= {"p50", "p90", "p99"} and found["concurrency"] == clients
    assert len(set(seen)) == len(seen)


async def fail_in_band(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM + piece("a") + b'data: {"error": {"message": "the model died", "type": "x"}}\n\n')
    writer.close()


async def end_early(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM + piece("a"))
    writer.close()


async def say_nothing(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM + role() + DONE)
    writer.close()


async def lie_in_a_200(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(whole(200, {"error": "out of memory"}))


async def refuse(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(whole(429, {"error": {"message": "slow down"}}))


async def talk_html(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(whole(200, "<html>", "text/html"))


async def talk_nonsense(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x00\x01\x02 not http at all \r\n\r\n")


async def count_wrongly(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM + piece("a", "stop") + usage(3, 10**9) + DONE)
    writer.close()


async def count_in_words(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM + piece("a", "stop") + usage(3, "many") + DONE)
    writer.close()


async def hang_up(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.close()


async def never_end(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM)
    while not writer.is_closing():
        writer.write(piece("a") * 100)
        await writer.drain()


async def endless_headers(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while not writer.is_closing():
        writer.write(b"x-a: " + b"b" * 1000 + b"\r\n")
        await writer.drain()


async def endless_body(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 500 X\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"z" * 65536)
        await writer.drain()


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        (fail_in_band, "in_band", "the model died"),
        (end_early, "no_end", "DONE"),
        (say_nothing, "no_tokens", ""),
        (lie_in_a_200, "content_type", "application/json"),
        (refuse, "http_429", "slow down"),
        (talk_html, "content_type", "text/html"),
        (talk_nonsense, "nonsense", ""),
        (count_wrongly, "wrong_usage", "1000000000"),
        (count_in_words, "wrong_usage", "many"),
        (hang_up, "cut", ""),
        (never_end, "endless", "no end"),
        (endless_headers, "too_large", "65536"),
        (endless_body, "http_500", "zzz"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
async def test_a_wrong_answer_is_an_error_and_in_no_figure(answer: Answering, kind: str, says: str) -> None:
    """Each way in which an answer can fall short is counted by its kind, with what was said, and nowhere else."""
    tracemalloc.start()
    try:
        run = await measured(answer)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    found = run.to_json()
    assert set(found["error_kinds"]) == {kind}, found["error_kinds"]
    assert found["error_kinds"][kind]["count"] == found["errors"] == 4
    assert says in found["error_kinds"][kind]["first"]
    assert found["completed"] == 0 and found["latency_s"] is None and found["output_tokens_per_s"] == 0
    assert peak < 32 << 20  # whatever is sent


async def test_a_slow_endpoint_times_out() -> None:
    """A request that has no end within its time is a time-out; the run goes on."""

    async def wait(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM + piece("a"))
        await writer.drain()
        await asyncio.sleep(60)

    run = await measured(wait, Load(requests=2, **{**WORDS, "timeout_s": 0.5}))
    assert run.to_json()["error_kinds"]["timeout"]["count"] == 2


async def test_a_dead_endpoint_is_told_at_once() -> None:
    """Where nobody listens nothing is measured: one error with what to do."""
    async with serving(good) as url:
        pass
    with pytest.raises(BenchError, match="connect") as caught:
        await measure(Target(url, "openai", "m"), Load(requests=4, **WORDS))
    assert "check the URL" in caught.value.hint


async def test_an_endpoint_that_dies_meanwhile_ends_the_run() -> None:
    """What was answered until then stays, and nobody goes on asking for ever."""
    asked = 0

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await (good if asked < 10 else hang_up)(body, writer)

    run = await measured(answer, Load(requests=100_000, **WORDS))
    assert run.completed == 9 and run.error_count == GIVE_UP


async def test_the_first_token_is_the_first_with_text() -> None:
    """Neither the chunk with the role nor the one with the usage is a token, and tokens of one read share a moment."""

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM + role())
        await writer.drain()
        await asyncio.sleep(0.3)
        writer.write(piece("a"))
        await writer.drain()
        await asyncio.sleep(0.4)
        writer.write(piece("b") + piece("c") + piece("d") + piece("e", "length"))
        await writer.drain()
        await asyncio.sleep(0.3)
        writer.write(usage(3, 5) + DONE)
        writer.close()

    found = (await measured(answer, Load(requests=1, **WORDS))).to_json()
    assert found["ttft_s"]["p50"] >= 0.3 and found["latency_s"]["p50"] >= 1.0
    assert 0.09 <= found["itl_s"]["p50"] <= 0.25  # 0.4 s for four tokens; the usage's 0.3 s are no token's
    assert found["output_tokens"] == 5


async def test_an_open_loop_counts_from_when_a_request_was_due() -> None:
    """While all places are taken by a stalled server requests are late, and their latency says so."""
    busy = asyncio.Lock()

    async def one_by_one(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        async with busy:
            await asyncio.sleep(0.1)
            await good(body, writer)

    load = Load(concurrency=None, rate=50.0, requests=10, max_in_flight=1, **WORDS)
    run = await measured(one_by_one, load)
    found = run.to_json()
    assert found["completed"] == 10 and found["rate"] == 50.0 and found["concurrency"] is None
    assert found["latency_s"]["max"] > 0.5  # ten of 0.1 s that were due within 0.2 s


async def test_who_stops_it_gets_what_was_measured() -> None:
    """`stop` cancels what is under way, and the figures so far are there."""
    stop, progress = asyncio.Event(), Progress()

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if progress.done >= 3:
            stop.set()
            await asyncio.sleep(60)
        await good(body, writer)

    async with serving(answer) as url:
        run = await measure(Target(url, "openai", "m"), Load(requests=100, **WORDS), progress, stop=stop)
    assert run.interrupted and run.completed == 3 and run.error_count == 0


async def test_a_large_answer_may_come_in_one_read() -> None:
    """The bound of the headers is theirs alone."""

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if "input" not in body:
            return await good(body, writer)
        writer.write(whole(200, {"data": [{"embedding": [0.25] * 40_000}], "usage": {"prompt_tokens": 12}}))

    async with serving(answer) as url:
        target = Target(url, "openai", "m", endpoint="embeddings", task="encode")
        found = (await measure(target, Load(requests=3, **WORDS))).to_json()
    assert (found["completed"], found["errors"], found["itl_s"], found["output_tokens"]) == (3, 0, None, 0)


async def test_a_connection_that_the_server_keeps_is_used_again() -> None:
    """One that was closed while it was idle is no error: it is not used."""
    connections: set[int] = set()

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        connections.add(id(writer))
        words = len(body["messages"][0]["content"].split())
        fields = {"choices": [{"message": {"content": "a b"}, "finish_reason": "stop"}]}
        writer.write(whole(200, fields | {"usage": {"prompt_tokens": words, "completion_tokens": 2}}))

    async with serving(answer) as url:
        run = await measure(Target(url, "openai", "m", stream=False), Load(requests=30, **WORDS))
    assert run.completed == 30 and len(connections) == 1


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.floats(0, 1))
def test_a_percentile_lies_between_its_neighbours(values: list[float], share: float) -> None:
    """As many values are at most it as its share says, and the ends are the least and the greatest."""
    ordered = sorted(values)
    found = percentile(ordered, share)
    assert ordered[0] <= found <= ordered[-1]
    below = sum(value <= found for value in ordered)
    assert below >= int(share * (len(ordered) - 1)) + 1 or found < ordered[int(share * (len(ordered) - 1)) + 1]
    assert percentile(ordered, 0) == ordered[0] and percentile(ordered, 1) == ordered[-1]


def test_a_sample_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more values than are kept every second one is, so that its percentiles stay true."""
    monkeypatch.setattr("orchestrator.bench.figures.MAX_VALUES", 1000)
    sample = Sample()
    for number in range(100_000):
        sample.add(number / 100_000)
    found = sample.to_json()
    assert len(sample.values) < 1000 and found is not None
    assert abs(found["p50"] - 0.5) < 0.01 and abs(found["p99"] - 0.99) < 0.01


def test_what_is_late_is_no_goodput() -> None:
    """A request counts as good when it meets every goal that was given."""
    run = Run(Load(requests=2, goals=Goals(ttft_s=0.2, latency_s=1.0), **WORDS), seconds=1.0)
    for first, ended in ((0.1, 0.9), (0.3, 0.9), (0.1, 1.1)):
        answer = Answer(5)
        answer.piece(first)
        run.took(answer, 0.0, ended)
    assert run.completed == 3 and run.to_json()["goodput_per_s"] == 1.0


def test_prompts_begin_differently() -> None:
    """No two prompts of a seed share their first words, the same seed gives the same ones, another one others."""
    first = [Prompts("1", 20).take().text for _ in range(1)]
    many = Prompts("1", 20)
    texts = [many.take().text for _ in range(2000)]
    assert texts[0] == first[0] and len({text.split(" ", 1)[0] for text in texts[:100]}) == 100
    assert len(set(texts)) == 2000 and all(len(text.split()) == 20 for text in texts)
    assert Prompts("2", 20).take().text != texts[0]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"concurrency": 0}, "concurrency"), ({"rate": 1.0}, "either"), ({"requests": None}, "no end"),
        ({"prompt_tokens": -1}, "prompt_tokens"), ({"timeout_s": float("nan")}, "timeout_s"),
        ({"extra_body": {"model": "x"}}, "model"), ({"output_tokens": 10**9}, "output_tokens"),
    ],
)  # fmt: skip
def test_a_load_that_nobody_can_put_is_refused(fields: dict[str, Any], named: str) -> None:
    """The field is named, and what it may be."""
    with pytest.raises(PlanError, match=named) as caught:
        Load(**{"requests": 4, **WORDS, **fields})
    assert caught.value.hint


@pytest.mark.parametrize("url", ["", "ftp://a", "http://", "http://u:p@h", "http://h\n", "http://h?x=1", "nonsense"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    """Before anything is sent; a password in it is not repeated."""
    with pytest.raises(PlanError, match="url") as caught:
        Target(url, "openai", "m")
    assert "u:p" not in str(caught.value)


def test_no_key_is_shown() -> None:
    """Neither a target's text nor its JSON has the key or a header's value."""
    target = Target("http://h", "openai", "m", api_key="tg_secret", headers=(("x-token", "hidden"),))
    assert "secret" not in repr(target) + str(target.to_json()) and "hidden" not in repr(target) + str(target.to_json())


def test_errors_of_ever_new_kinds_stay_few() -> None:
    """A server that invents a status for each answer does not fill the memory."""
    run = Run(Load(requests=1, **WORDS))
    for number in range(1000):
        run.failed(Fault(f"http_{number}", "no"))
    assert run.error_count == 1000 and len(run.errors) <= 51


async def test_a_first_token_is_stamped_before_it_is_read() -> None:
    """A reader that takes its time with a chunk does not make the token late: its moment is that of the socket."""
    from orchestrator.bench import openai

    slow: list[float] = []
    event = openai.Stream._event

    def reading(self: openai.Stream, data: bytes, now: float) -> None:
        slow.append(time.perf_counter() - now)
        time.sleep(0.05)
        event(self, data, now)

    openai.Stream._event = reading  # type: ignore[method-assign]
    try:
        found = (await measured(good, Load(requests=1, **WORDS))).to_json()
    finally:
        openai.Stream._event = event  # type: ignore[method-assign]
    assert max(slow) >= 0.2  # the last chunk waited for those before it
    assert found["itl_s"] is None or found["itl_s"]["max"] < 0.05 * 5
