"""What people ask and are answered stays with them: it is in no log, audit line, metric, trace, file or Redis key."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import queue
import secrets
import shutil
import signal
import socket
import tempfile
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from orchestrator.ops.keyring import Keyring
from tests.collector import Collector
from tests.counting import write_entry
from tests.redis import RealRedis

from .leaks import Place, everything, files, forms, found
from .stack import Stack, kill, wait_until

MANY = 500  # tokens of an answer that is not read to its end
AOF = "redis/appendonly.aof"


@dataclass(frozen=True)
class Marks:
    """Texts that nothing else has. `id` is a request id, which is logged: it shows that the search finds things."""

    prompt: str = field(default_factory=lambda: f"zq{secrets.token_hex(6)}")
    stop: str = field(default_factory=lambda: f"zq{secrets.token_hex(6)}")
    other: str = field(default_factory=lambda: f"zq{secrets.token_hex(6)}")
    answer: str = field(default_factory=lambda: f"zq{secrets.token_hex(6)}")
    id: str = field(default_factory=lambda: f"zq{secrets.token_hex(6)}")


@dataclass
class Talk:
    """Asks a stack, in every way and with every outcome, about things that nobody else may learn of."""

    stack: Stack
    marks: Marks
    key: str
    limited: str
    statuses: list[int] = field(default_factory=list)

    @property
    def prompt(self) -> str:
        return f"{self.marks.prompt} one {self.marks.prompt} two {self.marks.prompt} {secrets.token_hex(4)} two"

    def ask(self, path: str, body: Any, key: str | None = None, **headers: str) -> tuple[int, bytes]:
        """POST, as JSON unless the body is bytes."""
        given = {"Authorization": f"Bearer {key or self.key}", "X-Request-Id": self.marks.id, **headers}
        connection = self.connect()
        with connection:
            connection.sendall(_request(path, body, given))
            data = _all(connection)
        status = int(data.split(b" ", 2)[1])
        self.statuses.append(status)
        return status, data.partition(b"\r\n\r\n")[2]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.stack.ports["HTTP"]), timeout=20)

    def completion(self, **more: Any) -> dict[str, Any]:
        return {
            "model": self.stack.model, "prompt": self.prompt, "max_tokens": 4, "stop": [self.marks.stop],
            "user": self.marks.other, "metadata": {"about": self.marks.other}, **more,
        }  # fmt: skip

    def chat(self, **more: Any) -> dict[str, Any]:
        messages = [{"role": role, "content": self.prompt} for role in ("system", "user", "assistant", "user")]
        return {"model": self.stack.model, "messages": messages, "max_tokens": 4, "stop": self.marks.stop, **more}

    def sampling(self, **more: Any) -> str:
        return json.dumps({"max_tokens": 4, "stop": [self.marks.stop], **more})

    def tensors(self, **more: Any) -> dict[str, Any]:
        named = {"text_input": self.prompt, "sampling_parameters": self.sampling(**more)}
        return {"inputs": [{"name": n, "datatype": "BYTES", "shape": [1], "data": [t]} for n, t in named.items()]}

    # what is answered

    def answered(self) -> None:
        """Whole and streamed, twice each: from the model and from the cache. Each answer has the answer's mark."""
        v2 = f"/v2/models/{self.stack.model}"
        generate = {"text_input": self.prompt, "parameters": {"max_tokens": 4}}
        long = self.completion(max_tokens=120)  # so long that it is compressed in the cache
        for path, body in (
            ("/v1/completions", self.completion()), ("/v1/completions", self.completion(stream=True)),
            ("/v1/chat/completions", self.chat()), ("/v1/chat/completions", self.chat(stream=True)),
            (f"{v2}/generate", generate), (f"{v2}/infer", self.tensors()), ("/v1/completions", long),
            (f"{v2}/generate_stream", {**generate, "parameters": {"max_tokens": 4, "stream": True}}),
        ):  # fmt: skip
            for _ in range(2):
                status, answer = self.ask(path, body)
                assert status == 200 and self.marks.answer.encode() in answer, (path, answer)

    def over_grpc(self) -> None:
        """Unary, streamed, refused, and left in the middle."""
        metadata = {"authorization": f"Bearer {self.key}", "x-request-id": self.marks.id}
        with triton.InferenceServerClient(f"127.0.0.1:{self.stack.ports['GRPC']}") as client:
            answer = client.infer(self.stack.model, self._grpc(), headers=metadata)
            assert self.marks.answer in answer.as_numpy("text_output")[0].decode()
            for body in (self._grpc(unknown=self.marks.other), self._grpc(max_tokens=self.marks.other)):
                with pytest.raises(InferenceServerException):
                    client.infer(self.stack.model, body, headers=metadata)
            with pytest.raises(InferenceServerException):
                client.infer(self.stack.model, self._grpc(), headers={"authorization": self.marks.other})
            answers: queue.Queue[Any] = queue.Queue()
            client.start_stream(lambda result, error: answers.put((result, error)), headers=metadata)
            client.async_stream_infer(self.stack.model, self._grpc(max_tokens=MANY), parameters={"stream": True})
            assert answers.get(timeout=10)[1] is None
            client.stop_stream(cancel_requests=True)

    def _grpc(self, **more: Any) -> list[triton.InferInput]:
        inputs = []
        for name, text in (("text_input", self.prompt), ("sampling_parameters", self.sampling(**more))):
            tensor = triton.InferInput(name, [1], "BYTES")
            tensor.set_data_from_numpy(np.array([text], dtype=object))
            inputs.append(tensor)
        return inputs

    # what is not

    def refused(self) -> None:
        """By every rule and by every edge, with a mark in whatever was wrong."""
        mark, v1, v2 = self.marks.prompt, "/v1/completions", f"/v2/models/{self.stack.model}"
        for path, body in (
            (v1, self.completion(prompt=f"<script>{mark}</script> javascript:{mark}")),
            (v1, self.completion(prompt=f"{mark} " * 5000)),
            (v1, self.completion(prompt=f"{mark} one " * 450)),  # more tokens than the model has room for
            (v1, self.completion(max_tokens=mark)), (v1, self.completion(temperature=mark)),
            (v1, self.completion(stop=[mark * 200])), (v1, self.completion(stop={mark: mark})),
            (v1, self.completion(**{mark: mark})), (v1, self.completion(model="missing")),
            (v1, self.completion(response_format=mark)), (v1, self.completion(prompt={mark: [mark]})),
            (v1, f'{{"prompt": "{mark}'.encode()), (v1, f'"{mark}'.encode()), (v1, mark.encode() + b"\xff"),
            (v1, mark.encode() * 100_000), ("/v1/embeddings", {"model": self.stack.model, "input": mark}),
            ("/v1/chat/completions", self.chat(messages=[{"role": mark, "content": mark, "name": mark}])),
            ("/v1/chat/completions", self.chat(messages=[{"role": "user", "content": mark, "name": mark}, {}])),
            ("/v1/chat/completions", self.chat(tools=[{"type": mark}])),
            (f"{v2}/generate", {"text_input": mark, "parameters": {mark: mark}}), (f"{v2}/infer", {mark: mark}),
            (f"{v2}/infer", self.tensors(**{mark: mark})), (f"{v2}/infer", self.tensors(temperature=mark)),
            (f"{v2}/infer", {"inputs": [{"name": mark, "datatype": mark, "shape": [1], "data": [mark]}]}),
            (f"/v1/{mark}?{mark}={mark}", {}), (f"/v2/models/{self.stack.model}/{mark}", {}),
        ):  # fmt: skip
            status, answer = self.ask(path, body)
            assert 400 <= status < 500, (path, body, answer)
        assert self.ask(v1, self.completion(), key=f"tg_{mark}_{mark}")[0] == 401
        assert self.ask(v1, self.completion(), **{"Content-Encoding": mark})[0] == 415
        assert self.ask(v1, self.completion(), traceparent=mark, **{"Cache-Control": mark})[0] in (200, 400)
        assert [self.ask(v1, self.completion(), key=self.limited)[0] for _ in range(2)] == [200, 429]

    def left(self) -> None:
        """Hang up: in the middle of the request, before the answer, and in the middle of it. And speak no HTTP."""
        whole = _request("/v1/completions", self.completion(max_tokens=MANY, stream=True), self._headers)
        for sent, read in ((whole[:-40], 0), (whole, 0), (whole, 400), (f"{self.marks.prompt}\r\n\r\n".encode(), 99)):
            with self.connect() as client:
                client.sendall(sent)
                if read:
                    assert b"HTTP/1.1 " in client.recv(read)
        wait_until(lambda: self.stack.load()["running"] == 0, 10, "nothing runs any more")

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}", "X-Request-Id": self.marks.id}

    def broken(self, snapshot: list[Place]) -> None:
        """The model dies in the middle of an answer, and is asked while it is dead. What Redis holds in the meantime
        goes into `snapshot`.
        """
        body = self.completion(max_tokens=MANY, stream=True)
        with self.connect() as client:
            client.sendall(_request("/v1/completions", body, self._headers))
            assert b"200 OK" in client.recv(1000)
            with redis.Redis.from_url(self.stack.state.redis) as store:
                snapshot.extend(everything(store))
            kill(self.stack.pid("stub"), signal.SIGKILL)
            assert b'"error"' in _all(client)
        statuses = [self.ask("/v1/completions", self.completion())[0] for _ in range(4)]
        assert 503 in statuses or 500 in statuses, statuses


def served(stack: Stack) -> bool:
    """Whether Triton takes connections: on a busy machine a model that is reloaded too slowly has it started anew."""
    try:
        return bool(stack.request("GET", "/v2/health/ready", port="TRITON_HTTP")[0] == 200)
    except OSError:
        return False


def _request(path: str, body: Any, headers: dict[str, str]) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"Host": "h", "Connection": "close", "Content-Length": str(len(data)), **headers}
    head = "\r\n".join([f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in lines.items()), "", ""])
    return head.encode() + data


def _all(connection: socket.socket) -> bytes:
    """Everything until the other side closes; a request that is refused before it was read ends with a reset."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while more := connection.recv(65536):
            data += more
    return data


@dataclass(frozen=True)
class Search:
    """Where the marks of one stack were found, in its life and after it, and which statuses its clients had."""

    marks: Marks
    key: str
    places: set[str]
    found: set[tuple[str, str]]
    statuses: set[int]

    def of(self, mark: str) -> set[str]:
        return {place for each, place in self.found if each == mark}


def search(cache: bool) -> Search:
    """Run a stack with everything that writes switched on, talk to it, stop it, and look everywhere."""
    marks, folder = Marks(), Path(tempfile.mkdtemp(prefix="truthgpt-leaks-"))
    write_entry(
        folder / "repository", slots=4, step_delay_ms=4, max_len=600, words=("one", "two", marks.answer)
    )  # fmt: skip
    with Collector() as collector:
        extra = {
            "TRUTHGPT_AUTH": "keys", "TRUTHGPT_LOG_LEVEL": "debug", "TRUTHGPT_DEBUG": "true", "TRUTHGPT_WORKERS": "2",
            "TRUTHGPT_SANITIZE": "reject", "TRUTHGPT_OTLP_ENDPOINT": collector.url, "TRUTHGPT_AUDIT": "true",
            "TRUTHGPT_AUDIT_KEY": secrets.token_hex(16), "TRUTHGPT_CACHE": str(cache).lower(),
        }  # fmt: skip
        stack = Stack(folder / "home", folder / "repository", extra=extra)
        try:
            stack.start()
            try:
                with redis.Redis.from_url(stack.state.redis) as store:
                    limits = ({"per_minute": 1}, {})
                    (_, limited), (_, key) = (Keyring(store).create("acme", limits=each) for each in limits)
                wait_until(lambda: stack.knows(key), 5, "both workers know the keys")
                talk, places = Talk(stack, marks, key, limited), list[Place]()
                talk.answered()
                talk.over_grpc()
                talk.refused()
                talk.left()
                talk.broken(places)
                time.sleep(1.5)  # every worker has told the parent its figures once more
                wait_until(lambda: served(stack), 60, "Triton is there again, though it be a new one")
                pages = (("OPS", "/metrics"), ("TRITON_METRICS", "/metrics"), ("HTTP", "/health"))
                places += [(f"{port} {path}", stack.request("GET", path, port=port)[2]) for port, path in pages]
                with redis.Redis.from_url(stack.state.redis) as store:
                    places += everything(store)
            finally:
                stack.stop()
            places += files(stack.home)
            places += [("trace", body) for body in collector.bodies]
        finally:
            assert stack.leftovers() == []
            shutil.rmtree(folder)
    secret = key.split("_", 2)[2]
    seen = found([*vars(marks).values(), secret, extra["TRUTHGPT_AUDIT_KEY"]], places)
    return Search(marks, secret, {name for name, _ in places}, seen, set(talk.statuses))


def test_what_was_asked_and_answered_is_found_nowhere_but_in_the_cache() -> None:
    """Over every edge and with every outcome: prompts, stop texts, names and credentials are in no file, metric,
    trace or Redis key; the answer is in the cache's values and Redis's file of them, and without a cache nowhere.
    """
    with ThreadPoolExecutor(2) as pool:
        cached, bare = pool.map(search, (True, False))
    for one in (cached, bare):
        logged = one.of(one.marks.id)
        assert {"trace", "logs/gateway.log"} <= logged, "the search is blind: a request id is logged and traced"
        assert any("audit" in place for place in logged), logged
        assert {"OPS /metrics", "TRITON_METRICS /metrics", "HTTP /health", "logs/triton.log"} <= one.places
        assert {200, 400, 401, 404, 413, 415, 429} <= one.statuses and one.statuses & {500, 503}, one.statuses
        kept = {(mark, place) for mark, place in one.found if mark != one.marks.id}
        wanted = {(one.marks.answer, place) for _, place in kept if place == AOF or ":c:" in place}
        assert kept == (wanted if one is cached else set()), kept - wanted
    assert {place for _, place in cached.found if ":c:" in place}, "the cache had the answer"


@pytest.mark.parametrize("pad", [b"", b"a", b"ab"])
def test_the_search_sees_every_form(tmp_path: Path, pad: bytes) -> None:
    """Plain, in capitals, UTF-16, hexadecimal, base64 at any offset, gzip, and a cached answer's deflate are found."""
    mark = Marks().prompt
    plain = pad + mark.encode() + pad
    written = {
        "plain": plain, "capitals": plain.upper(), "utf-16": plain.decode().encode("utf-16"),
        "hexadecimal": plain.hex().encode(), "base64": base64.b64encode(plain), "gzip": gzip.compress(plain),
        "deflate": b"TG1 z\n" + zlib.compress(plain), "percent": f"a%20{mark}%C3".encode(), "none": os.urandom(99),
    }  # fmt: skip
    (tmp_path / "deep").mkdir()
    for name, content in written.items():
        (tmp_path / "deep" / name).write_bytes(content)
    assert {place for _, place in found([mark], files(tmp_path))} == {f"deep/{name}" for name in written} - {
        "deep/none"
    }
    assert len(forms(mark)) == len(set(forms(mark)))


@pytest.fixture
def store() -> Iterator[redis.Redis]:
    with RealRedis() as server, redis.Redis.from_url(server.url) as client:
        yield client


def test_the_search_reads_every_type_of_redis(store: redis.Redis) -> None:
    """Strings, hashes, lists, sets, sorted sets and streams, names and values: each mark in them is found."""
    mark = Marks().prompt
    store.set("string", mark)
    store.hset("hash", "field", mark)
    store.hset("hash-field", mark, "value")
    store.rpush("list", "a", mark)
    store.sadd("set", mark)
    store.zadd("zset", {mark: 1.0})
    store.xadd("stream", {"field": mark})
    store.set(f"key:{mark}", "value")
    kinds = ("string", "hash", "hash-field", "list", "set", "zset", "stream")
    places = {place for _, place in found([mark], everything(store))}
    assert places == {"redis key", *(f"redis {kind}" for kind in kinds)}
