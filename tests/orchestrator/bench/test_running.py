"""Whole measurements against servers that are good, slow, dying or lying."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.bench import running
from orchestrator.bench.answers import BenchError
from orchestrator.bench.figures import Run
from orchestrator.bench.plan import Goals, PlanError, Progress, Prompt
from orchestrator.bench.prompts import Sizing
from orchestrator.bench.running import measure
from tests.e2e.stack import free_ports

from .servers import (
    END,
    SIZED,
    STREAM,
    Exchange,
    answered,
    chats,
    chunk,
    delta,
    event,
    good,
    load,
    serving,
    sized,
    usage,
)  # fmt: skip


async def counting(exchange: Exchange) -> None:
    """Counts a word as two tokens and adds ten for a template."""
    words = len(exchange.json["messages"][0]["content"].split())
    told = [delta("one"), delta(" two", "length"), usage(2, 10 + 2 * words)]
    await exchange.send(STREAM + chunk(b"".join(event(one) for one in told) + event(b"[DONE]")) + END)


async def test_a_closed_loop_asks_as_many_as_it_should() -> None:
    """Three clients, twenty requests, two of warm-up that do not count; no prompt twice; prompts of the wanted size."""
    most = under_way = 0

    async def watching(exchange: Exchange) -> None:
        nonlocal most, under_way
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.005)
        under_way -= 1
        await counting(exchange)

    progress = Progress()
    async with serving(watching) as served:
        run = await measure(
            chats(served.url), load(concurrency=3, requests=20, warmup=2, prompt_tokens=50), progress
        )  # fmt: skip
    questions = len(served.asked) - 22
    assert run.completed == 20 and run.error_count == 0 and 1 <= questions <= 6 and most == 3
    assert run.sizing == Sizing(20, 50) and run.to_json()["prompt_tokens_mean"] == 50
    assert (progress.stage, progress.done, progress.total) == ("measuring", 20, 20)
    texts = [exchange.json["messages"][0]["content"] for exchange in served.asked]
    assert len(set(texts)) == len(texts)
    assert run.output_tokens == 40 and run.counted and run.seconds > 0


async def test_the_same_seed_sends_the_same_and_each_load_others() -> None:
    """A run can be repeated; the runs of a sweep share no prompt."""
    sent = []
    for clients, seed in ((1, 0), (1, 0), (2, 0), (1, 1)):
        async with serving(good) as served:
            await measure(chats(served.url), load(concurrency=clients, requests=4, seed=seed), sizing=SIZED)
        sent.append(sorted(exchange.json["messages"][0]["content"] for exchange in served.asked))
    assert sent[0] == sent[1]
    assert not set(sent[0]) & set(sent[2]) and not set(sent[0]) & set(sent[3])


async def test_time_ends_a_run_and_what_is_under_way_is_waited_for() -> None:
    """After its duration no more is begun; what was begun counts."""

    async def slow(exchange: Exchange) -> None:
        await asyncio.sleep(0.05)
        await good(exchange)

    async with serving(slow) as served:
        began = time.perf_counter()
        run = await measure(
            chats(served.url), load(concurrency=2, requests=None, duration_s=0.3), sizing=SIZED
        )  # fmt: skip
        took = time.perf_counter() - began
    assert 0.3 <= run.seconds <= took and run.completed == len(served.asked) >= 2 and run.error_count == 0


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    """A hundred requests a second to a server that takes 0.2 s: many are under way at once."""
    most = under_way = 0

    async def slow(exchange: Exchange) -> None:
        nonlocal most, under_way
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.2)
        under_way -= 1
        await good(exchange)

    async with serving(slow) as served:
        run = await measure(chats(served.url), load(concurrency=None, rate=100.0, requests=30), sizing=SIZED)
    assert run.completed == 30 and most > 5
    assert run.to_json()["rate"] == 100.0 and run.to_json()["concurrency"] is None


async def test_what_an_open_loop_could_not_send_in_time_is_the_later_for_it() -> None:
    """One place and a server that takes 50 ms: the twentieth request was due almost a second before it was sent."""
    most = under_way = 0

    async def slow(exchange: Exchange) -> None:
        nonlocal most, under_way
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.05)
        under_way -= 1
        await good(exchange)

    async with serving(slow) as served:
        given = load(concurrency=None, rate=1000.0, requests=20, max_in_flight=1)
        run = await measure(chats(served.url), given, sizing=SIZED)
    assert most == 1 and run.completed == 20
    assert max(run.latency.values) > 15 * 0.05 and max(run.ttft.values) > 15 * 0.05
    assert min(run.latency.values) < max(run.latency.values) / 4


async def test_an_open_loop_ends_in_time_and_says_what_it_could_not_send() -> None:
    """What was due and found no place before the end is an error, for nobody was answered."""

    async def slow(exchange: Exchange) -> None:
        await asyncio.sleep(0.2)
        await good(exchange)

    async with serving(slow) as served:
        given = load(concurrency=None, rate=500.0, requests=None, duration_s=0.5, max_in_flight=2)
        run = await measure(chats(served.url), given, sizing=SIZED)
    assert len(served.asked) < 20 and run.completed == len(served.asked)
    assert set(run.errors) == {"unsent"} and "2 requests were under way" in run.errors["unsent"][1]


async def test_arrivals_are_random_and_as_many_as_wanted() -> None:
    """At 200 a second 60 come in about 0.3 s, and not evenly."""
    moments: list[float] = []

    async def noting(exchange: Exchange) -> None:
        moments.append(time.perf_counter())
        await good(exchange)

    async with serving(noting) as served:
        run = await measure(chats(served.url), load(concurrency=None, rate=200.0, requests=60), sizing=SIZED)
    gaps = [after - before for before, after in zip(moments, moments[1:], strict=False)]
    assert run.completed == 60 and run.seconds > 0.1
    assert max(gaps) > 2 * sum(gaps) / len(gaps)


@pytest.mark.parametrize(("protocol", "hint"), [("openai", "truthgpt status"), ("kserve-http", "truthgpt status")])
async def test_a_dead_server_is_said_at_once(protocol: Any, hint: str) -> None:
    """Nothing is measured, and the hint says where to look."""
    target = replace(chats(f"http://127.0.0.1:{free_ports(1)[0]}"), protocol=protocol)
    with pytest.raises(BenchError, match="connect") as caught:
        await measure(target, load())
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("answer", "kind", "hint"),
    [
        (sized(b'{"error": {"message": "who?"}}', "401 Unauthorized"), "http_401", "TRUTHGPT_API_KEY"),
        (sized(b'{"error": {"message": "no such model"}}', "404 Not Found"), "http_404", "--model"),
        (sized(b"<html>", kind="text/html"), "content_type", "--protocol"), (b"SSH-2.0\r\n", "nonsense", "--protocol"),
        (sized(b"{}", "429 Too Many Requests"), "http_429", "rate limits"),
        (sized(b"{}", "418 Teapot"), "http_418", "mend"),
    ],
)  # fmt: skip
async def test_a_server_that_answers_badly_is_not_measured(answer: bytes, kind: str, hint: str) -> None:
    """The first question shows it, and the hint says what to do."""

    async def handler(exchange: Exchange) -> None:
        await exchange.send(answer)

    async with serving(handler) as served:
        with pytest.raises(BenchError, match=kind) as caught:
            await measure(chats(served.url), load())
    assert hint in caught.value.hint and len(served.asked) == 1


async def test_a_slow_server_times_out() -> None:
    """At the first question it ends all; later it is an error that says how far the answer was."""

    async def stalling(exchange: Exchange) -> None:
        if exchange.number % 2:
            await exchange.send(STREAM + chunk(event(delta("one"))))
        await asyncio.sleep(30)

    async with serving(stalling) as served:
        with pytest.raises(BenchError, match="no token within 0.2 s"):
            await measure(chats(served.url), load(timeout_s=0.2))
        run = await measure(chats(served.url), load(requests=2, timeout_s=0.2), sizing=SIZED)
    assert run.errors == {"timeout": (2, "no end within 0.2 s")} and run.completed == 0
    assert run.latency.to_json() is None


async def test_errors_are_counted_beside_good_answers() -> None:
    """Of every four answers one is a 429, one has an error in it, one lacks its end: only the fourth counts."""

    async def lying(exchange: Exchange) -> None:
        error = event({"error": {"message": "in flight"}})
        bad = {
            0: sized(b'{"error": {"message": "slow down"}}', "429 Too Many Requests"),
            1: STREAM + chunk(event(delta("a")) + error) + END, 2: STREAM + chunk(event(delta("a"))) + END,
        }  # fmt: skip
        await exchange.send(bad.get(exchange.number % 4, answered()))

    async with serving(lying) as served:
        run = await measure(chats(served.url), load(requests=12), sizing=SIZED)
    assert run.completed == 3 and {kind: count for kind, (count, _) in run.errors.items()} == {
        "http_429": 3, "in_band": 3, "no_end": 3
    }  # fmt: skip
    assert run.errors["http_429"][1] == "slow down" and len(run.latency.values) == 3


async def test_a_server_that_dies_in_the_middle_ends_the_run() -> None:
    """What it answered counts, what it did not is errors, and nobody asks a dead server a million times."""

    async def dying(exchange: Exchange) -> None:
        if exchange.number < 5:
            return await good(exchange)
        served.server.close()
        exchange.close = True
        return await exchange.send(STREAM)

    async with serving(dying) as served:
        run = await measure(chats(served.url), load(requests=1_000_000, concurrency=2), sizing=SIZED)
    assert run.completed == 5 and {"cut", "connect"} >= set(run.errors) >= {"connect"}
    assert run.error_count <= running.GIVE_UP * 2 + 2 and run.gave_up


async def test_an_open_loop_gives_up_on_a_dead_server() -> None:
    """As a closed one does."""
    target = chats(f"http://127.0.0.1:{free_ports(1)[0]}")
    run = await measure(target, load(concurrency=None, rate=500.0, requests=1_000_000), sizing=SIZED)
    assert run.completed == 0 and run.error_count < 100 and run.to_json()["gave_up"]


async def test_who_stops_a_run_gets_what_was_measured() -> None:
    """Quickly, and what was under way is neither an answer nor an error."""

    async def stalling(exchange: Exchange) -> None:
        if exchange.number >= 3:
            stop.set()
            await asyncio.sleep(30)
        await good(exchange)

    for shape in ({"concurrency": 2}, {"concurrency": None, "rate": 200.0}):
        stop = asyncio.Event()
        async with serving(stalling) as served:
            began = time.perf_counter()
            run = await measure(chats(served.url), load(requests=100, **shape), stop=stop, sizing=SIZED)
            assert time.perf_counter() - began < 10
        assert run.interrupted and run.completed == 3 and run.error_count == 0 and run.seconds > 0
        assert run.to_json()["interrupted"] is True


async def test_who_stops_it_before_its_first_answer_gets_an_empty_run() -> None:
    """While the first question is asked nothing has been measured."""
    stop = asyncio.Event()

    async def stalling(exchange: Exchange) -> None:
        stop.set()
        await asyncio.sleep(30)

    async with serving(stalling) as served:
        run = await measure(chats(served.url), load(), stop=stop)
    assert run.interrupted and run.completed == 0 and run.seconds == 0


async def test_prompts_that_are_given_are_sent_in_order() -> None:
    """And over again; conversations go as they are."""
    given = (Prompt("first"), Prompt(turns=(("system", "brief"), ("user", "second"))))
    async with serving(good) as served:
        run = await measure(chats(served.url), load(requests=3, prompts=given, prompt_tokens=None))
    sent = [[turn["content"] for turn in exchange.json["messages"]] for exchange in served.asked]
    assert sent == [["first"], ["first"], ["brief", "second"], ["first"]] and run.completed == 3


async def test_conversations_need_an_endpoint_that_takes_them() -> None:
    """Nothing is sent to one that does not."""
    given = load(prompts=(Prompt(turns=(("user", "a"),)),), prompt_tokens=None)
    for more in ({"endpoint": "completions"}, {"endpoint": "embeddings", "task": "encode"}):
        with pytest.raises(PlanError, match="messages"):
            await measure(chats("http://127.0.0.1:1", **more), given)


async def test_a_server_that_repeats_the_key_does_not_put_it_into_a_report() -> None:
    """Neither its first answer nor a later one, in whatever form the key is."""

    async def parrot(exchange: Exchange) -> None:
        body = json.dumps({"error": f"the key correct-horse and {exchange.head}"}).encode()
        await exchange.send(sized(body, "403 Forbidden"))

    async with serving(parrot) as served:
        target = chats(served.url, api_key="correct-horse", headers=(("X-Secret", "battery-staple"),))
        with pytest.raises(BenchError) as caught:
            await measure(target, load())
        run = await measure(target, load(), sizing=SIZED)
    told = f"{caught.value} {caught.value.hint} {caught.value!r} {json.dumps(run.to_json())} {run!r}"
    assert "the key ***" in told and "correct-horse" not in told and "battery-staple" not in told


async def test_a_model_that_ends_at_once_can_be_measured() -> None:
    """An answer of no tokens to the first question is no reason to stop; in the run it is an error."""

    async def silent(exchange: Exchange) -> None:
        await exchange.send(STREAM + chunk(event(delta(finish="stop")) + event(usage(0))) + END)

    async with serving(silent) as served:
        run = await measure(chats(served.url), load(requests=2))
    assert set(run.errors) == {"no_tokens"} and run.error_count == 2


async def test_goals_are_counted_while_it_runs() -> None:
    """Goodput is of whole measurements, not of the figures' type alone."""

    async def every_other(exchange: Exchange) -> None:
        await asyncio.sleep(0.0 if exchange.number % 2 else 0.6)
        await good(exchange)

    async with serving(every_other) as served:
        run: Run = await measure(chats(served.url), load(requests=4, goals=Goals(ttft_s=0.5)), sizing=SIZED)
    assert run.completed == 4 and run.good <= 2


async def test_an_answer_in_pieces_of_several_tokens() -> None:
    """Eight tokens in two pieces: the time between them is shared among the four that came."""

    async def lumpy(exchange: Exchange) -> None:
        head = STREAM + chunk(event(delta("a b c d")))
        tail = chunk(event(delta(" e f g h", "length")) + event(usage(8)) + event(b"[DONE]")) + END
        await exchange.send(head, tail, pause_s=0.2)

    async with serving(lumpy) as served:
        run = await measure(chats(served.url), load(), sizing=SIZED)
    assert len(run.itl.values) == 4 and all(0.04 <= value for value in run.itl.values)
    assert sum(run.itl.values) == pytest.approx(run.latency.values[0] - run.ttft.values[0], abs=0.05)
