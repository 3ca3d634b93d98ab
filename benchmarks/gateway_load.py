"""A load generator for gateways: closed loop, raw sockets, one core, some 25 us a request.

    python -m benchmarks.gateway_load http://127.0.0.1:8080 --key tg_... [--clients 32] [--stream] [--cpu-of PID]

Each client has one keep-alive connection and sends its next request when it has all of its last answer. Moments are
taken where bytes come out of the socket. Every answer is checked: its status, the number of its tokens, its finish
reason, and a stream's end. What falls short is an error, and a run with errors is no result. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

import click
import httptools
import uvloop

from benchmarks.gateway_machine import cpu_s, memory_mb, tree

NUMBER = "#########N"  # stands in a prompt for ten digits that no other request has
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*\[?\s*"(?:stop|length)"')
# an error is an object or a text; some gateways send the key with null beside an answer
_ERROR = re.compile(rb'"error"\s*:\s*["{]')
_numbers = itertools.count(time.time_ns() // 1000 % 9_000_000_000 + 1_000_000_000)
WAIT_S = 30.0  # for the last answers


@dataclass(frozen=True)
class Ask:
    """One kind of request, and what its answer must have.

    `tokens` is the number of matches of the pattern `token` in an answer's body. `done`: a stream ends with [DONE].
    `same`, if not 0, is the number in every request, else each has one of its own. `needs` are bytes that an answer's
    packets have to hold, such as a header; an answer that is good but for them is a stray.
    """

    port: int
    path: str
    body: dict[str, Any] = field(repr=False)
    tokens: int
    token: str = " tick"  # noqa: S105  what a model writes
    done: bool = False
    same: int = 0
    needs: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    host: str = "127.0.0.1"

    def render(self) -> Callable[[], bytes]:
        """Makes the bytes of the next request."""
        text = json.dumps(self.body).encode()
        head = f"POST {self.path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: application/json\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in self.headers)
        whole = f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text
        before, number, after = whole.partition(NUMBER.encode())
        if not number:
            return lambda: whole
        if self.same:
            fixed = b"%s%010d%s" % (before, self.same, after)
            return lambda: fixed
        return lambda: b"%s%010d%s" % (before, next(_numbers), after)

    def fault(self, status: int, body: bytes) -> str | None:
        """What is wrong with an answer; None for a good one."""
        if status != 200:
            return f"status {status}: {body[:120].decode('utf-8', 'replace')}"
        if _ERROR.search(body):
            return "an error in the body of a 200"
        if self.done and not body.rstrip().endswith(b"data: [DONE]"):
            return "a stream without [DONE]"
        if not _FINISHED.search(body):
            return "no finish reason"
        found = len(re.findall(self.token.encode(), body))
        return None if found == self.tokens else f"{found} of {self.tokens} tokens"


@dataclass
class Result:
    """A measured window. Times are milliseconds; `first` is the time to the first token of an answer,
    `events` the mean number of server-sent events in one.

    `before` and `after` are what the sampler said at the window's ends.
    """

    clients: int
    requests: int
    seconds: float
    errors: dict[str, int]
    whole: dict[str, float]
    first: dict[str, float]
    events: float
    strays: int
    generator_us: float
    before: Any = None
    after: Any = None

    @property
    def rate(self) -> float:
        return self.requests / self.seconds if self.seconds else 0.0


class Connecting(Protocol):
    """Something that opens one client's connection and asks until the window tells it to stop."""

    async def __call__(self, window: Window) -> None: ...


class Window:
    """What all clients of a run share: whether to go on, and what they saw between its two ends."""

    def __init__(self, seconds: float, at_least: int, sample: Callable[[], Any]) -> None:
        self._seconds, self._at_least, self._sample = seconds, at_least, sample
        self.open, self.closed = False, asyncio.Event()
        self.whole: list[float] = []
        self.first: list[float] = []
        self.events = self.strays = 0
        self.errors: Counter[str] = Counter()
        self.before = self.after = None
        self._began = self._until = self._cpu = 0.0
        self.seconds = self.generator_s = 0.0

    def begin(self) -> None:
        """The warm-up is over."""
        self.before, self._cpu = self._sample(), time.process_time()
        self._began = time.perf_counter()
        self._until, self.open = self._began + self._seconds, True

    def saw(self, sent: float, first: float, ended: float, fault: str | None, events: int = 0) -> bool:
        """One answer has ended; whether to ask again."""
        if fault is not None:
            self.errors[fault] += 1  # also during the warm-up and after the end
            if self.open and ended >= self._until:
                self.end(ended)
        elif self.open:
            self.whole.append(ended - sent)
            self.events += events
            if first:
                self.first.append(first - sent)
            if ended >= self._until and len(self.whole) >= self._at_least:
                self.end(ended)
        return not self.closed.is_set()

    def fail(self, context: dict[str, Any]) -> None:
        """A fault of the generator itself, which asyncio would only log."""
        self.errors[f"in the generator: {context.get('exception') or context['message']!r}"] += 1
        self.closed.set()

    def end(self, now: float) -> None:
        if self.open:
            self.open, self.seconds = False, now - self._began
            self.generator_s = time.process_time() - self._cpu
            self.after = self._sample()
        self.closed.set()


class Client(asyncio.Protocol):
    """One connection; a lost one is an error, and is opened again."""

    def __init__(self, ask: Ask, window: Window) -> None:
        self._ask, self._window = ask, window
        self._render, self._token = ask.render(), re.compile(ask.token.encode())
        self.idle = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._body: list[bytes] = []
        self._missing = b""
        self._sent = self._first = self._now = 0.0

    async def __call__(self, window: Window) -> None:
        """Ask until the window is closed. A server that refuses connections is an error each time."""
        loop = asyncio.get_running_loop()
        while not window.closed.is_set():
            try:
                await loop.create_connection(lambda: self, self._ask.host, self._ask.port)
            except OSError as error:
                window.errors[f"no connection: {error.strerror}"] += 1
                await asyncio.sleep(0.05)
                continue
            await self.idle.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class, which switches Nagle's algorithm off
        self.idle.clear()
        self._send()

    def _send(self) -> None:
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)  # one a response: cheaper than what it parses
        self._body.clear()
        self._missing = self._ask.needs
        data = self._render()
        self._first, self._sent = 0.0, time.perf_counter()
        self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        if self._missing and self._missing in data:
            self._missing = b""
        parser = self._parser
        if parser is None:
            return
        try:
            parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._lost(f"no HTTP: {error}")

    def on_body(self, body: bytes) -> None:
        if not self._first and self._token.search(body):
            self._first = self._now
        self._body.append(body)

    def on_message_complete(self) -> None:
        parser, transport = self._parser, self._transport
        if parser is None or transport is None:
            return
        body = b"".join(self._body)
        fault = self._ask.fault(parser.get_status_code(), body)
        keep = parser.should_keep_alive()
        if fault is None and self._missing and self._window.open:
            self._window.strays += 1
        self._parser = None
        again = self._window.saw(self._sent, self._first, self._now, fault, body.count(b"data:"))
        if again and keep:
            if fault is None:
                self._send()
            else:  # a system that refuses everything must not be asked in a tight loop
                asyncio.get_running_loop().call_later(0.01, self._again)
        else:
            transport.close()

    def _again(self) -> None:
        if self._transport is not None and not self._window.closed.is_set():
            self._send()
        elif self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._parser is not None:
            self._lost("the connection was cut")
        self._transport = None
        self.idle.set()

    def _lost(self, fault: str) -> None:
        self._parser = None
        self._window.saw(self._sent, 0.0, time.perf_counter(), fault)
        if self._transport is not None:
            self._transport.abort()


async def drive(
    connecting: Callable[[Window], Connecting], clients: int, seconds: float, *, warm_s: float = 0.5,
    at_least: int = 0, at_most_s: float = 60.0, wait_s: float = WAIT_S, sample: Callable[[], Any] = lambda: None,
) -> Result:  # fmt: skip
    """Ask with so many clients for `seconds` after the warm-up, or until `at_least` answers, not past `at_most_s`.

    An answer that has not come `wait_s` after the end is an error. `sample` is called at both ends of the window.
    """
    window = Window(seconds, at_least, sample)
    asyncio.get_running_loop().set_exception_handler(lambda _, context: window.fail(context))
    gc.collect()
    gc.disable()  # its pauses would be counted as the system's
    try:
        tasks = [asyncio.create_task(connecting(window)(window)) for _ in range(clients)]
        await asyncio.sleep(warm_s)
        window.begin()
        try:
            async with asyncio.timeout(max(at_most_s, seconds)):
                await window.closed.wait()
        except TimeoutError:
            window.end(time.perf_counter())
        _, late = await asyncio.wait(tasks, timeout=wait_s)
        for task in late:
            window.errors["no answer"] += 1
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
    finally:
        gc.enable()
    count = len(window.whole)
    return Result(
        clients, count, window.seconds, dict(window.errors), quantiles(window.whole), quantiles(window.first),
        window.events / count if count else 0.0,
        window.strays,
        window.generator_s / count * 1e6 if count else 0.0, window.before, window.after,
    )  # fmt: skip


async def http(ask: Ask, clients: int, seconds: float, **options: Any) -> Result:
    """`drive` with clients of HTTP/1.1."""
    return await drive(lambda window: Client(ask, window), clients, seconds, **options)


def quantiles(values: list[float]) -> dict[str, float]:
    """p50, p90, p99 (nearest rank) and mean in milliseconds of values in seconds; empty for none."""
    if not values:
        return {}
    ranked = sorted(values)
    at = {f"p{q}": ranked[-(-len(ranked) * q // 100) - 1] * 1000 for q in (50, 90, 99)}  # rank: rounded up, from 1
    return {**at, "mean": statistics.fmean(values) * 1000}


def new_number() -> int:
    """Ten digits that no request had so far."""
    return next(_numbers)


def chat(port: int, stream: bool, tokens: int, model: str = "bench", key: str = "", **changes: Any) -> Ask:
    """A chat completion with a prompt of some 20 words."""
    prompt = f"Question {NUMBER}: what is the shortest way from the station to the old harbour on foot, and how long?"
    body: dict[str, Any] = {
        "model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "stream": stream,
    }  # fmt: skip
    headers = (("Authorization", f"Bearer {key}"),) if key else ()
    given: dict[str, Any] = {"headers": headers, "path": "/v1/chat/completions", **changes}
    return Ask(port, body=body, tokens=tokens, done=stream, **given)


@click.command(help=__doc__)
@click.argument("url")
@click.option("--key", default="", help="Sent as Authorization: Bearer.")
@click.option("--model", default="bench", show_default=True)
@click.option("--clients", default=32, show_default=True)
@click.option("--seconds", default=3.0, show_default=True)
@click.option("--warm", default=1.0, show_default=True, help="Seconds that are not counted.")
@click.option("--stream", is_flag=True, help="Server-sent events.")
@click.option("--tokens", type=int, help="Of each answer: 1, or 16 of a stream.")
@click.option("--token", default=" tick", show_default=True, help="Pattern of a token in an answer.")
@click.option("--same", is_flag=True, help="One prompt for all requests: a cache's hits.")
@click.option("--core", type=int, help="Run on this core alone.")
@click.option(
    "--cpu-of", type=int, multiple=True, help="Processes whose CPU and memory are measured, with their children."
)
def main(
    url: str, key: str, model: str, clients: int, seconds: float, warm: float, stream: bool, tokens: int | None,
    token: str, same: bool, core: int | None, cpu_of: tuple[int, ...],
) -> None:  # fmt: skip
    if core is not None:
        os.sched_setaffinity(0, {core})
    pids = [pid for root in cpu_of for pid in tree(root)]
    wanted = tokens or (16 if stream else 1)
    ask = chat(urlsplit(url).port or 80, stream, wanted, model, key, token=token, same=new_number() if same else 0)
    result = uvloop.run(http(ask, clients, seconds, warm_s=warm, sample=lambda: cpu_s(pids)))
    said: dict[str, Any] = {**result.__dict__, "per_s": round(result.rate, 1)}
    if pids and result.requests:
        said |= {"cpu_us": round((said["after"] - said["before"]) / result.requests * 1e6, 1), "mb": memory_mb(pids)}
    print(json.dumps(said))
    raise SystemExit(1 if result.errors else 0)


if __name__ == "__main__":
    main()
