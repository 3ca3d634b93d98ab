"""A request that has ended is gone: it is in no cycle of references that would keep it until a garbage collection.

Workers collect garbage rarely, and a request may be a megabyte: what piles up in between is memory that anybody can
make a worker take.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import types
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import aiohttp
import grpc
import pytest

from orchestrator.errors import InvalidRequest, RateLimited, Text
from tests.encoding import CLASSIFIES, EMBEDS
from tests.redis import RealRedis

from .api.calls import ask, number, stub, told
from .conftest import Stack, serving, until
from .fake_triton import FakeTriton, answer, event, failure

TIMES = 3
# What a connection to Triton that broke leaves, without anything of the request: no client can make it break.
BROKEN = {
    "orchestrator.triton.attendance.Attendance", "frame of Answer.read", "frame of Triton._within",
    *(f"orchestrator.triton.connection.{name}" for name in ("Answer", "Connection", "ConnectionFailed")),
}  # fmt: skip


@contextlib.contextmanager
def collecting() -> Iterator[set[str]]:
    """No collection in the context; afterwards the set has what of ours only a collection would have freed."""
    found: set[str] = set()
    logging.disable()  # pytest keeps log records, and with them the tracebacks of errors
    gc.collect()
    gc.freeze()  # what a test process holds besides takes a while to look through
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        for thing in gc.garbage:
            module = str(type(thing).__module__)
            if module.startswith("orchestrator."):
                found.add(f"{module}.{type(thing).__name__}")
            elif type(thing) is types.FrameType and thing.f_globals["__name__"].startswith("orchestrator."):
                found.add(f"frame of {thing.f_code.co_qualname}")
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        gc.enable()
        logging.disable(logging.NOTSET)


class Asked:
    """Ways to ask that gateway, by what they show. Each prompt is a new one unless it says so."""

    def __init__(self, stack: Stack, calls: Any) -> None:
        self._stack, self._calls, self._number = stack, calls, 0

    def _body(self, text: str = "", **more: Any) -> dict[str, Any]:
        self._number += 1
        return {"model": "m", "prompt": text or f"Hola {self._number}", **more}

    async def _post(self, status: int, path: str = "/v1/completions", **more: Any) -> None:
        body = more.pop("body", None) or self._body(**more)
        async with self._stack.http.post(self._stack.url + path, json=body) as response:
            text = await response.text()
            assert response.status == status, text

    async def miss(self) -> None:
        await self._post(200)

    async def hit(self) -> None:
        await self._post(200, text="the same")

    async def stream(self) -> None:
        await self._post(200, stream=True)

    async def several(self) -> None:
        await self._post(200, text=["one", "two"])  # type: ignore[arg-type]  # a list is a prompt, too

    async def generate(self) -> None:
        await self._post(200, "/v2/models/m/generate", body={"text_input": "Hola"})

    async def unsafe(self) -> None:
        await self._post(400, text="<script>Hola</script>")

    async def unknown_model(self) -> None:
        await self._post(404, body={"model": "missing", "prompt": "Hola"})

    async def wrong_parameter(self) -> None:
        await self._post(400, max_tokens=-1)

    async def too_long(self) -> None:
        await self._post(400, max_tokens=1000)

    async def embeddings(self) -> None:
        self._number += 1
        await self._post(200, "/v1/embeddings", body={"model": "e", "input": f"Hola {self._number}"})

    async def embeddings_hit(self) -> None:
        await self._post(200, "/v1/embeddings", body={"model": "e", "input": "the same"})

    async def embeddings_in_parts(self) -> None:
        self._number += 1
        await self._post(200, "/v1/embeddings", body={"model": "e", "input": [f"Hola {self._number}"] * 200})

    async def embeddings_of_another_model(self) -> None:
        await self._post(400, "/v1/embeddings", body={"model": "m", "input": "Hola"})

    async def embeddings_too_long(self) -> None:
        await self._post(400, "/v1/embeddings", body={"model": "e", "input": ["a"] * 100 + ["b " * 30]})

    async def classify_failing(self) -> None:
        self._stack.fake.encode_errors = [(500, "internal: no")]
        self._number += 1
        await self._post(500, "/v1/classify", body={"model": "c", "input": f"Hola {self._number}"})

    async def refused_by_the_model(self) -> None:
        self._stack.fake.refusals = [b'{"error": "no"}']
        await self._post(500)

    async def failing(self) -> None:
        self._stack.fake.scripts = [[failure("out of order"), "end"]]
        await self._post(500)

    async def failing_in_the_middle(self) -> None:
        self._stack.fake.scripts = [[event("Hola"), "close"]]
        await self._post(200, stream=True)

    async def failing_other_model(self) -> None:
        self._stack.fake.infer_error = "out of order"
        inputs = [{"name": "x", "datatype": "INT32", "shape": [1], "data": [1]}]
        await self._post(500, "/v2/models/plain/infer", body={"inputs": inputs})

    async def hang_up(self) -> None:
        fake, hung = self._stack.fake, self._stack.fake.hang_ups
        fake.scripts = [[event("Hola"), 60.0]]
        with contextlib.suppress(TimeoutError):
            await self._stack.http.post(
                self._stack.url + "/v1/completions", json=self._body(), timeout=aiohttp.ClientTimeout(total=0.05)
            )
        await until(lambda: fake.hang_ups > hung)

    async def grpc_answered(self) -> None:
        self._number += 1
        await self._calls.ModelInfer(ask(f"Hola {self._number}"))
        assert not [
            one.error_message async for one in self._calls.ModelStreamInfer(iter([number()])) if one.error_message
        ]

    async def grpc_refused(self) -> None:
        for request in (ask("<script>Hola</script>"), ask(model="missing"), ask(max_tokens=-1)):
            assert (await told(self._calls.ModelInfer(request)))[0] is not grpc.StatusCode.OK
            assert [one.error_message async for one in self._calls.ModelStreamInfer(iter([request]))] != [""]

    async def grpc_hang_up(self) -> None:
        fake, hung = self._stack.fake, self._stack.fake.hang_ups
        fake.scripts = [[event("Hola"), 60.0]]
        self._number += 1
        call = self._calls.ModelStreamInfer(iter([ask(f"Hola {self._number}", stream=True)]))
        await call.read()
        call.cancel()
        await until(lambda: fake.hang_ups > hung)


WAYS = [name for name in vars(Asked) if not name.startswith("_")]


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RealRedis]:
    with RealRedis() as server:
        yield server


@pytest.mark.slow
async def test_no_request_waits_for_the_garbage_collector(fake: FakeTriton, redis_server: RealRedis) -> None:
    """However it ended and by whichever edge: nothing of ours is left in a cycle, neither objects nor frames."""
    fake.models |= dict.fromkeys(("plain", "e", "c"), "READY")
    fake.other_backends = {"plain"}
    fake.encoders = {"e": EMBEDS, "c": CLASSIFIES}
    fake.script = answer("Hola", "!")
    settings = {"redis_url": redis_server.url, "sanitize": "reject", "breaker_failures": 1000, "retries": 0}
    settings |= {"heartbeat_timeout_s": 20.0, "stall_s": 20.0}  # collecting all that a test process has takes a while
    async with serving(fake, grpc=True, max_batch_size=2, **settings) as stack, stub(stack.grpc) as calls:
        asked, left = Asked(stack, calls), {}
        for name in WAYS:
            way: Callable[[], Awaitable[None]] = getattr(asked, name)
            await way()  # the first of its kind makes what stays
            with collecting() as found:
                for _ in range(TIMES):
                    await way()
                await asyncio.sleep(0.02)
            fake.infer_error = None
            if found - BROKEN:
                left[name] = sorted(found)
        assert left == {}


def keep_and_raise(again: bool) -> None:
    """As whoever finds an error early and tells of it late."""
    kept = InvalidRequest(Text("No.", "No."))
    with contextlib.suppress(InvalidRequest):
        raise kept.again() if again else kept


@pytest.mark.parametrize("again", [False, True])
def test_an_error_that_is_kept_is_raised_as_another(again: bool) -> None:
    """Raised itself it is in a cycle with the frame that keeps it, and the check sees that; raised `again()` it is not,
    and has its kind, its texts, its parameter and its cause.
    """
    with collecting() as found:
        keep_and_raise(again)
    assert bool(found) is not again
    kept = RateLimited("minute", 60, 1.5)
    kept.__cause__ = OSError("why")
    other = kept.again()
    assert (other.text, other.retry_after_s, str(other)) == (kept.text, 1.5, str(kept)) and other is not kept
    assert type(other) is RateLimited and other.__cause__ is kept.__cause__ and other.__traceback__ is None
