"""Every kind of request that a gateway sees, mixed at random, at an even rate, by clients that also hang up."""

from __future__ import annotations

import asyncio
import json
import random
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp
import grpc
import numpy as np
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from tests.counting import WORDS
from tests.e2e.load import outcome_of

POOL = 8  # prompts that are asked again and again: so few that most times the answer has not expired
LONG = 60  # tokens of an answer that somebody may hang up on
MOST = 40  # requests at once; a machine that does not keep up is asked less, and not later
PATIENCE_S = 30.0
HANG_UP_S = 0.25

Kind = Callable[[], Awaitable[str]]
Ends = Mapping[str, float]  # how a kind of request may end -> the least part that must end so: at least one unless 0

# An answer of HTTP's is called by its status and code, a good one by what the cache had; a look-up that takes too long
# is given up (bypass), which is right, but proves nothing.
NEW: Ends = {"ok miss": 0.9, "ok bypass": 0.0}
CACHED: Ends = {"ok hit": 0.5, "ok miss": 0.0, "ok bypass": 0.0}
LEFT: Ends = {"hung up": 0.25, "ok": 0.0, "ok miss": 0.0, "ok bypass": 0.0}


def lacking(outcomes: Mapping[tuple[str, str], int], kinds: Mapping[str, Ends]) -> list[str]:
    """What a run did not prove, a line each: kinds that were not asked, or that too rarely ended as they are named."""
    found = []
    for name, ends in kinds.items():
        asked = sum(count for (kind, _), count in outcomes.items() if kind == name)
        if not asked:
            found.append(f"{name} was never asked")
        for how, part in ends.items():
            count = outcomes.get((name, how), 0)
            if asked and part and count < max(1, part * asked):
                found.append(f"{name}: {count} of {asked} were {how!r}")
    return found


@dataclass
class Traffic:
    """An asynchronous context in which `rate` requests a second are asked of a gateway and its gRPC edge.

    `limited` is a key of few requests a minute. `outcomes` counts how each kind ended, by the kind and what came of it;
    `wrong` has what should not have come.
    """

    http: str
    grpc: str
    ops: str
    model: str
    key: str
    limited: str
    rate: float
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    done: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random()
        self._pool = [self._prompt() for _ in range(POOL)]
        self._running: set[asyncio.Task[None]] = set()
        # how often of each, what it does, and how it ends
        self._kinds: list[tuple[int, str, Kind, Ends]] = [
            (20, "hit", lambda: self._completion(self._pooled()), CACHED),
            (10, "miss", lambda: self._completion(self._prompt()), NEW),
            (5, "forced miss", lambda: self._completion(self._pooled(), **{"cache-control": "no-cache"}),
             {"ok bypass": 0.9, "ok hit": 0.0}),  # a hit: it has joined another one that was on its way
            (5, "not stored", lambda: self._completion(self._prompt(), **{"cache-control": "no-store"}),
             {"ok bypass": 1.0}),
            (12, "stream", lambda: self._chat(self._prompt()), NEW),
            (6, "replayed stream", lambda: self._chat(self._pooled()), CACHED),
            (5, "generate", lambda: self._generate(""), NEW),
            (5, "generate_stream", lambda: self._generate("_stream"), NEW),
            (5, "infer", self._infer, NEW),
            (5, "gRPC infer", self._grpc_infer, {"ok": 1.0}),
            (4, "gRPC stream", self._grpc_stream, {"ok": 1.0}),
            (3, "gRPC hang-up", self._hanging_up(lambda: self._grpc_stream(LONG)), LEFT),
            (7, "stream hang-up", self._hanging_up(lambda: self._chat(self._prompt(), LONG)), LEFT),
            (4, "hang-up", self._hanging_up(lambda: self._completion(self._prompt(), LONG)), LEFT),
            (3, "infer hang-up", self._hanging_up(lambda: self._infer(LONG)), LEFT),
            (4, "limited", lambda: self._completion(self._prompt(), key=self.limited),
             {"429 rate_limit_exceeded": 0.01, "ok miss": 0.01, "ok bypass": 0.0}),
            # while a worker's copy of the keys is not fresh, a key that may be good is not called a bad one
            (2, "gRPC bad key", self._grpc_bad_key, {"StatusCode.UNAUTHENTICATED": 0.5, "StatusCode.UNAVAILABLE": 0.0}),
            (3, "bad key", self._bad_key, {"401 invalid_api_key": 0.5, "503 keys_unavailable": 0.0}),
            (2, "bad JSON", lambda: self._post("/v1/completions", b'{"model": '), {"400 None": 1.0}),
            (2, "bad parameter", lambda: self._completion(self._prompt(), -1), {"400 None": 1.0}),
            (2, "unsafe", lambda: self._completion("one <script>two</script>"), {"400 unsafe_input": 1.0}),
            (2, "unknown model", self._unknown_model, {"404 model_not_found": 1.0}),
            (2, "probe", self._probe, {"200": 1.0}),
        ]  # fmt: skip

    @property
    def lacking(self) -> list[str]:
        """What has not been proved so far, as `lacking` says."""
        return lacking(self.outcomes, {name: ends for _, name, _, ends in self._kinds})

    async def __aenter__(self) -> Self:
        self._stack = AsyncExitStack()
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        # most connections are kept, as those of clients in earnest are; some are new
        sessions = [
            aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0, force_close=fresh))
            for fresh in (False, False, False, True)
        ]
        self._sessions = [await self._stack.enter_async_context(session) for session in sessions]
        # gRPC connections are few and kept: two, so that both workers are likely to have one
        options = [("grpc.use_local_subchannel_pool", 1)]
        clients = [triton.InferenceServerClient(self.grpc, channel_args=options) for _ in range(2)]
        self._grpc = [await self._stack.enter_async_context(client) for client in clients]
        self._pacing = asyncio.create_task(self._pace())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pacing.cancel()
        await asyncio.gather(self._pacing, *self._running, return_exceptions=True)
        await self._stack.aclose()

    async def _pace(self) -> None:
        loop, weights = asyncio.get_running_loop(), [weight for weight, *_ in self._kinds]
        at = loop.time()
        while True:
            # never more than a second behind: what could not be asked is not caught up with in one go
            at = max(at + self._random.expovariate(self.rate), loop.time() - 1.0)
            await asyncio.sleep(at - loop.time())
            if len(self._running) < MOST:
                _, name, ask, expected = self._random.choices(self._kinds, weights)[0]
                task = asyncio.create_task(self._one(name, ask, expected))
                self._running.add(task)
                task.add_done_callback(self._running.discard)

    async def _one(self, name: str, ask: Kind, expected: Ends) -> None:
        try:
            ended = await ask()
        except Exception as error:  # whatever it is, it must not go unseen in a task
            ended = f"{type(error).__name__}: {error}"
        self.done += 1
        if ended in expected:
            self.outcomes[name, ended] += 1
        else:
            self.outcomes[name, "wrong"] += 1
            self.wrong.append(f"{name}: {ended}"[:300])

    def _prompt(self) -> str:
        return " ".join(self._random.choices(WORDS, k=20))  # so many that none comes twice

    def _pooled(self) -> str:
        return self._random.choice(self._pool)

    def _hanging_up(self, ask: Kind) -> Kind:
        async def leave() -> str:
            try:
                return await asyncio.wait_for(ask(), self._random.uniform(0.0, HANG_UP_S))
            except TimeoutError:
                return "hung up"

        return leave

    async def _post(self, path: str, body: Any, key: str | None = None, stream: bool = False, **headers: str) -> str:
        given = {"Authorization": f"Bearer {key or self.key}", "x-request-id": secrets.token_hex(8), **headers}
        if self._random.random() < 0.5:
            given["traceparent"] = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self._random.choice(self._sessions).post(self.http + path, data=data, headers=given) as answer:
            content = await answer.read()
        if path.startswith("/v1"):
            ended = outcome_of(answer.status, content, stream)
        else:
            ended = "ok" if answer.status == 200 and b'"error"' not in content else repr(content[:200])
        if answer.status != 200:
            return f"{answer.status} {ended}"
        return f"ok {answer.headers.get('x-cache')}" if ended == "ok" else ended

    async def _completion(self, prompt: str, tokens: int = 4, key: str | None = None, **headers: str) -> str:
        return await self._post(
            "/v1/completions", {"model": self.model, "prompt": prompt, "max_tokens": tokens}, key, **headers
        )

    async def _chat(self, prompt: str, tokens: int = 12) -> str:
        messages = [{"role": "user", "content": prompt}]
        body = {"model": self.model, "messages": messages, "max_tokens": tokens, "stream": True}
        return await self._post("/v1/chat/completions", body, stream=True)

    async def _generate(self, suffix: str) -> str:
        parameters = {"max_tokens": 4, "stream": bool(suffix)}
        body = {"text_input": self._prompt(), "parameters": parameters}
        return await self._post(f"/v2/models/{self.model}/generate{suffix}", body)

    async def _infer(self, tokens: int = 8) -> str:
        tensors = {"text_input": self._prompt(), "sampling_parameters": json.dumps({"max_tokens": tokens})}
        inputs = [{"name": name, "datatype": "BYTES", "shape": [1], "data": [text]} for name, text in tensors.items()]
        return await self._post(f"/v2/models/{self.model}/infer", {"inputs": inputs})

    async def _bad_key(self) -> str:
        return await self._completion("one", key=f"tg_{secrets.token_hex(6)}_{secrets.token_hex(16)}")

    async def _unknown_model(self) -> str:
        return await self._post("/v1/completions", {"model": f"m{secrets.token_hex(8)}", "prompt": "one"})

    async def _probe(self) -> str:
        url = self._random.choice([f"{self.http}/health", f"{self.http}/health/ready", f"{self.ops}/metrics"])
        async with self._sessions[0].get(url) as answer:
            await answer.read()
            return str(answer.status)

    # gRPC

    def _inputs(self, tokens: int = 8) -> list[triton.InferInput]:
        inputs, sampling = [], json.dumps({"max_tokens": tokens})
        for name, text in (("text_input", self._prompt()), ("sampling_parameters", sampling)):
            tensor = triton.InferInput(name, [1], "BYTES")
            tensor.set_data_from_numpy(np.array([text], dtype=object))
            inputs.append(tensor)
        return inputs

    @property
    def _metadata(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    async def _grpc_infer(self) -> str:
        client = self._random.choice(self._grpc)
        answer = await client.infer(self.model, self._inputs(), headers=self._metadata)
        return "ok" if answer.as_numpy("text_output").size == 1 else "no text"

    async def _grpc_bad_key(self) -> str:
        metadata = {"authorization": f"Bearer tg_{secrets.token_hex(6)}_{secrets.token_hex(16)}"}
        try:
            await self._random.choice(self._grpc).infer(self.model, self._inputs(), headers=metadata)
        except InferenceServerException as error:
            return str(error.status())
        return "ok"

    async def _grpc_stream(self, tokens: int = 8) -> str:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": self.model, "inputs": self._inputs(tokens)}

        client, error = self._random.choice(self._grpc), None
        answers = client.stream_infer(requests(), headers=self._metadata)
        try:
            async for _, failure in answers:
                error = failure or error
        except grpc.aio.AioRpcError as failure:
            return f"{failure.code()}: {failure.details()}"
        return "ok" if error is None else str(error)
