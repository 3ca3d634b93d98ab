"""Between the path and Triton: retries before the first token, the fallback, the breaker, and checks of the answer."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest

from .conftest import Stack, serving, until
from .fake_triton import FakeTriton, answer, event, failure

PLAIN: dict[str, Any] = {"model": "m", "prompt": "Hola"}
PATH = "/v1/completions"


def text(body: Any) -> str:
    return str(body["choices"][0]["text"])


async def test_a_failure_before_the_first_token_is_tried_again(fake: FakeTriton) -> None:
    """A connection lost before anything came is tried once more, and the client sees only the answer."""
    fake.scripts = [["close"]]
    async with serving(fake) as stack:
        status, body, _ = await stack.post(PATH, PLAIN)
        assert (status, text(body)) == (200, "Hola, ¿qué tal?")
        assert len(fake.requests) == 2
        assert [record.outcome for record in stack.records] == ["ok"]


@pytest.mark.parametrize("retries", [0, 2])
async def test_retries_are_bounded(fake: FakeTriton, retries: int) -> None:
    """A model that always fails is asked once and as often again as the setting says."""
    fake.script = ["close"]
    async with serving(fake, retries=retries) as stack:
        assert (await stack.post(PATH, PLAIN))[0] == 503
        assert len(fake.requests) == 1 + retries


async def test_nothing_is_tried_again_after_the_first_token(fake: FakeTriton) -> None:
    """Half an answer is followed by an in-band error, never by the beginning of another answer."""
    fake.scripts = [[event("a"), "close"]]
    async with serving(fake, retries=3, fallback_text="Lo siento.") as stack:
        events = await stack.events(PATH, {**PLAIN, "stream": True})
        assert json.loads(events[-1])["error"]["code"] == "model_unavailable"
        assert len(fake.requests) == 1


@pytest.mark.parametrize("kind", ["resource_exhausted: full", "invalid_argument: top_k"])
async def test_what_another_attempt_cannot_mend_is_not_tried_again(fake: FakeTriton, kind: str) -> None:
    """A full queue and a wrong request are answered at once, also where a fallback is set."""
    fake.script = [failure(kind), "end"]
    async with serving(fake, fallback_text="Lo siento.") as stack:
        status, _, headers = await stack.post(PATH, PLAIN)
        assert status in (400, 503)
        assert "x-truthgpt-fallback" not in headers
        assert len(fake.requests) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_fallback_text_is_marked(fake: FakeTriton, stream: bool) -> None:
    """While the model is away the configured text answers, with a header that says so and a record that does too."""
    async with serving(fake, fallback_text="Vuelva luego.", breaker_failures=1000) as stack:
        fake.beat_error = "Stub process is not healthy"
        await until(lambda: not stack.gateway.ready)
        async with stack.http.post(stack.url + PATH, json={**PLAIN, "stream": stream}) as response:
            assert (response.status, response.headers["x-truthgpt-fallback"]) == (200, "text")
            assert "Vuelva luego." in (await response.text())
        assert (stack.records[0].fallback, stack.records[0].outcome) == ("text", "ok")


async def test_without_a_fallback_the_error_is_returned(fake: FakeTriton) -> None:
    """An error is never disguised as an answer unless it was switched on."""
    async with serving(fake) as stack:
        fake.beat_error = "Stub process is not healthy"
        await until(lambda: not stack.gateway.ready)
        status, body, headers = await stack.post(PATH, PLAIN, **{"accept-language": "es"})
        assert (status, body["error"]["code"]) == (503, "model_unavailable")
        assert "no está disponible" in body["error"]["message"]
        assert int(headers["retry-after"]) >= 1


async def test_a_fallback_model_is_marked_and_comes_before_the_text(fake: FakeTriton) -> None:
    """The other model answers and is named; when it fails too, the text does."""
    fake.models["spare"] = "READY"
    fake.scripts = [["close"], answer("spare ", "answers"), ["close"], ["close"]]
    async with serving(fake, retries=0, fallback_model="spare", fallback_text="Nada.") as stack:
        status, body, headers = await stack.post(PATH, PLAIN)
        assert (status, text(body), headers["x-truthgpt-fallback"]) == (200, "spare answers", "model=spare")
        status, body, headers = await stack.post(PATH, PLAIN)
        assert (status, text(body), headers["x-truthgpt-fallback"]) == (200, "Nada.", "text")
        assert [call for call in fake.calls if "generate_stream" in call] == [
            "POST /v2/models/m/generate_stream", "POST /v2/models/spare/generate_stream",
        ] * 2  # fmt: skip


async def test_the_breaker_opens_fails_readiness_and_closes_by_itself(fake: FakeTriton) -> None:
    """After some failures Triton is left alone, readiness is false and clients get 503; then one answer heals it."""
    fake.script = ["close"]
    async with serving(fake, retries=0, breaker_failures=3, breaker_open_s=0.4) as stack:
        for _ in range(3):
            assert (await stack.post(PATH, PLAIN))[1]["error"]["code"] == "model_unavailable"
        assert not stack.gateway.ready
        status, body, headers = await stack.post(PATH, PLAIN)
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "breaker_open", "1")
        assert len(fake.requests) == 3
        assert (await stack.get("/health/ready"))[1]["breakers"] == {"m": "open"}
        fake.script = answer("bien")
        await until(lambda: stack.gateway.ready)
        assert (await stack.post(PATH, PLAIN))[0] == 200
        assert stack.gateway.breakers == {"m": "closed"}


async def test_hang_ups_do_not_open_the_breaker(fake: FakeTriton) -> None:
    """Clients who leave in the middle say nothing of the model."""
    fake.script = [event("a"), math.inf]
    async with serving(fake, breaker_failures=2) as stack:
        for count in range(4):
            async with stack.http.post(stack.url + PATH, json={**PLAIN, "stream": True}) as response:
                await response.content.readany()
            await until(lambda count=count: fake.hang_ups == count + 1)
        assert stack.gateway.breakers == {"m": "closed"}


async def test_an_answer_that_is_too_long_ends_at_the_limit(fake: FakeTriton) -> None:
    """The text is cut at max_output_chars with finish_reason length, and the model is stopped."""
    fake.script = [event("abcde"), event("fghij"), event("klmno"), math.inf]
    async with serving(fake, max_output_chars=12) as stack:
        _, body, _ = await stack.post(PATH, PLAIN)
        assert (text(body), body["choices"][0]["finish_reason"]) == ("abcdefghijkl", "length")
        await until(lambda: fake.hang_ups == 1)


async def test_an_empty_answer_is_an_error(stack: Stack) -> None:
    """An answer without a character is 500 with its own code, and not the model's breaker's business."""
    stack.fake.script = [event("", "stop"), "end"]
    status, body, _ = await stack.post(PATH, PLAIN)
    assert (status, body["error"]["code"]) == (500, "empty_answer")
    assert stack.gateway.breakers == {"m": "closed"}


async def test_a_gap_between_tokens_is_bounded(fake: FakeTriton) -> None:
    """A model that only keeps the connection alive and says nothing more is given up after token_gap_s."""
    fake.script = [event("a"), *[0.1, event()] * 100]
    async with serving(fake, token_gap_s=0.5) as stack:
        async with asyncio.timeout(5):
            events = await stack.events(PATH, {**PLAIN, "stream": True})
        assert json.loads(events[-1])["error"]["code"] == "model_unavailable"
        await until(lambda: fake.hang_ups == 1)


async def test_a_name_that_only_its_client_knows_gets_no_breaker(fake: FakeTriton) -> None:
    """While Triton is away nobody can say that a model does not exist; what clients call it is remembered nowhere."""
    async with serving(fake, breaker_failures=2) as stack:
        await fake.stop()
        await until(lambda: not stack.gateway.triton_up)
        for number in range(6):
            status, body, _ = await stack.post(PATH, {**PLAIN, "model": f"made-up-{number // 3}"})
            assert (status, body["error"]["code"]) == (503, "model_unavailable")
        numbers = {"inputs": [{"name": "x", "datatype": "INT32", "shape": [1], "data": [1]}]}
        assert (await stack.post("/v2/models/made-up/infer", numbers))[0] == 503
        assert set(stack.gateway.breakers) <= {"m"}
        await fake.start(fake.port)


@pytest.mark.parametrize("fallback", [{"fallback_text": "Nada."}, {"fallback_model": "spare"}])
async def test_no_fallback_begins_when_the_drain_is_over(fake: FakeTriton, fallback: dict[str, str]) -> None:
    """Who had no token by then is told to ask another gateway, and nothing new is started."""
    fake.models["spare"] = "READY"
    fake.script = [event(), math.inf]
    async with serving(fake, stall_s=20.0, **fallback) as stack:
        asking = asyncio.create_task(stack.post(PATH, PLAIN))
        await until(lambda: fake.running == 1)
        await stack.gateway.drain(0.1)
        status, body, headers = await asking
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "draining", "1")
        assert len(fake.requests) == 1


async def test_a_request_that_is_tried_again_is_one_failure(fake: FakeTriton) -> None:
    """Attempts do not count by themselves: three failing requests open a breaker of three, not two."""
    fake.script = ["close"]
    async with serving(fake, retries=2, breaker_failures=3) as stack:
        for _ in range(2):
            await stack.post(PATH, PLAIN)
        assert (len(fake.requests), stack.gateway.breakers) == (6, {"m": "closed"})
        await stack.post(PATH, PLAIN)
        assert stack.gateway.breakers == {"m": "open"}


async def test_a_backend_that_answers_with_an_error_is_not_broken(fake: FakeTriton) -> None:
    """Many backends say 500 to a wrong input: one caller's inputs cannot open the breaker for all."""
    fake.models["plain"] = "READY"
    fake.other_backends, fake.infer_error = {"plain"}, "A and B differ in shape"
    numbers = {"inputs": [{"name": "x", "datatype": "INT32", "shape": [1], "data": [1]}]}
    async with serving(fake, breaker_failures=2) as stack:
        assert [(await stack.post("/v2/models/plain/infer", numbers))[0] for _ in range(4)] == [500] * 4
        assert stack.gateway.breakers.get("plain", "closed") == "closed"
        fake.infer_error = None
        assert (await stack.post("/v2/models/plain/infer", numbers))[0] == 200
