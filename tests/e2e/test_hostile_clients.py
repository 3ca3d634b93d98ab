"""Clients that mean no good or leave: what they send is refused, what they hold is freed, and the others are served."""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.clock import awake
from tests.counting import WORDS, write_entry

from .stack import COMMAND, Stack, wait_until

FREED_S = 1.0  # a hang-up frees the slot within
SLOTS = 4
REQUEST_TIMEOUT_S = 15
MIB = 1 << 20
MANY = 3000  # tokens: 15 s
OPENAI, GENERATE = "/v1/completions", "/v2/models/counting/generate"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """One worker, so that what it holds can be counted; 4 slots, 5 ms a step, 8 prompt tokens a step."""
    folder = Path(tempfile.mkdtemp(prefix="truthgpt-e2e-"))
    write_entry(folder / "repository", slots=SLOTS, step_delay_ms=5, max_queue=80, max_len=8000, prefill_chunk=8)
    extra = {
        "TRUTHGPT_MAX_BATCH_SIZE": "3", "TRUTHGPT_MAX_INPUT_CHARS": "100000", "TRUTHGPT_MAX_OUTPUT_CHARS": "100000",
        "TRUTHGPT_REQUEST_TIMEOUT_S": str(REQUEST_TIMEOUT_S), "TRUTHGPT_FIRST_TOKEN_S": str(REQUEST_TIMEOUT_S),
    }  # fmt: skip
    running = Stack(folder / "home", folder / "repository", extra=extra)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        assert running.leftovers() == []
        shutil.rmtree(folder)


class Client:
    """One connection, spoken to byte by byte."""

    def __init__(self, stack: Stack, prepare: Callable[[socket.socket], None] = lambda sock: None) -> None:
        self.socket = socket.socket()
        prepare(self.socket)
        self.socket.settimeout(10)
        self.socket.connect(("127.0.0.1", stack.ports["HTTP"]))

    def ask(self, path: str, body: object) -> None:
        data = json.dumps(body).encode()
        self.send(path, {"content-length": str(len(data))}, data)

    def send(self, path: str, headers: dict[str, str], data: bytes = b"") -> None:
        lines = "".join(f"{name}: {value}\r\n" for name, value in {"host": "h", **headers}.items())
        self.socket.sendall(f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + data)

    def pour(self, parts: Iterator[bytes]) -> None:
        """Send until it is done or the server has had enough."""
        try:
            for part in parts:
                self.socket.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            return

    def status(self) -> int | None:
        """The answer's status, None when the connection is closed without one."""
        try:
            head = self.socket.recv(4096)
        except ConnectionResetError:
            return None
        return int(head.split()[1]) if head else None

    def hang_up(self) -> None:
        self.socket.close()


@contextmanager
def hanging_up(*clients: Client) -> Iterator[None]:
    try:
        yield
    finally:
        for client in clients:
            client.hang_up()


def memory(stack: Stack) -> int:
    """Bytes that the gateway's processes hold."""
    gateway = psutil.Process(stack.pid("gateway"))
    return sum(process.memory_info().rss for process in [gateway, *gateway.children(recursive=True)])


def in_flight(stack: Stack) -> int:
    return int(json.loads(stack.request("GET", "/health")[2])["in_flight"])


def idle(stack: Stack) -> bool:
    load = stack.load()
    return load["running"] == load["waiting"] == 0 and in_flight(stack) == 0


@pytest.fixture(autouse=True)
def quiet(stack: Stack) -> Iterator[None]:
    """Each test begins and ends with nothing running."""
    wait_until(lambda: idle(stack), 5, "nothing runs")
    yield
    wait_until(lambda: idle(stack), 5, "nothing runs any more")


def assert_served(stack: Stack, within_s: float = 1.0) -> None:
    """Another client is answered, and soon."""
    began = awake()
    status, _, body = stack.request("POST", OPENAI, {"model": stack.model, "prompt": "one", "max_tokens": 2})
    assert status == 200 and b"two three" in body, body
    assert awake() - began < within_s


def prompt(words: int) -> str:
    """A prompt that no other request has: it shares no answer that is being generated, and none that is cached."""
    return " ".join(random.choices(WORDS, k=words))


# Bodies and headers


@pytest.mark.parametrize("framing", ["declared", "chunked"])
@pytest.mark.parametrize("path", [OPENAI, GENERATE])
def test_a_body_of_100_mb_is_refused_and_not_held(stack: Stack, path: str, framing: str) -> None:
    """413, whether the size is declared or not, and the gateway's memory does not grow by it."""
    before = memory(stack)
    client = Client(stack)
    with hanging_up(client):
        piece = b"x" * MIB
        if framing == "declared":
            client.send(path, {"content-length": str(100 * MIB)})
            client.pour(piece for _ in range(100))
        else:
            client.send(path, {"transfer-encoding": "chunked"})
            client.pour(b"%x\r\n%s\r\n" % (MIB, piece) for _ in range(100))
        assert client.status() == 413
    assert memory(stack) - before < 20 * MIB
    assert_served(stack)


def test_ten_thousand_headers_are_refused(stack: Stack) -> None:
    """431, or the connection is closed, and nothing of it is kept."""
    client = Client(stack)
    with hanging_up(client):
        client.pour(iter([b"POST /v1/completions HTTP/1.1\r\nhost: h\r\n"]))
        client.pour(b"x-%d: %d\r\n" % (number, number) for number in range(10_000))
        client.pour(iter([b"content-length: 2\r\n\r\n{}"]))
        assert client.status() in (431, None)
    assert_served(stack)


@pytest.mark.parametrize("path", [OPENAI, GENERATE])
@pytest.mark.parametrize("deep", [b"[" * 500_000, b'{"prompt":' * 50_000, b"[" * 500 + b"]" * 500])
def test_deep_json_is_refused(stack: Stack, path: str, deep: bytes) -> None:
    """400 in the edge's own form, for nesting of any depth and either bracket."""
    client = Client(stack)
    with hanging_up(client):
        client.send(path, {"content-length": str(len(deep))}, deep)
        assert client.status() == 400
    assert_served(stack)


def test_a_gzip_bomb_is_refused_and_not_held(stack: Stack) -> None:
    """413 for a small body that unpacks to half a gigabyte, and the gateway's memory does not grow by it."""
    bomb = gzip.compress(bytes(50 * MIB), 9) * 10
    assert len(bomb) < MIB
    before = memory(stack)
    client = Client(stack)
    with hanging_up(client):
        client.send(OPENAI, {"content-length": str(len(bomb)), "content-encoding": "gzip"}, bomb)
        assert client.status() == 413
    assert memory(stack) - before < 20 * MIB
    assert_served(stack)


# Connections


def test_two_thousand_idle_connections_stall_nobody(stack: Stack) -> None:
    """Requests are answered while 2,000 connections say nothing, and those are not thrown out for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    before = memory(stack)
    try:
        idlers = [Client(stack) for _ in range(2000)]
        with hanging_up(*idlers):
            for _ in range(5):
                assert_served(stack)
            for client in idlers[::400]:
                client.ask(OPENAI, {"model": stack.model, "prompt": "one", "max_tokens": 1})
                assert client.status() == 200
            assert memory(stack) - before < 100 * MIB
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def small_window(sock: socket.socket) -> None:
    """A client that takes little at once, so that an unread answer soon fills what lies between."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)


def large(stack: Stack) -> dict[str, Any]:
    """A request with an answer of over 500 KB, several times what the buffers between gateway and client can hold."""
    prompts = [prompt(12) for _ in range(3)]
    return {"model": stack.model, "prompt": prompts, "max_tokens": 500, "stream": True, "logprobs": 5}


def test_a_client_that_does_not_read_stalls_nobody(stack: Stack) -> None:
    """Its answer is generated though nothing of it can be written, others are served, and once it reads it gets all."""
    client = Client(stack, small_window)
    with hanging_up(client):
        client.ask(OPENAI, large(stack))
        wait_until(lambda: stack.load()["running"] == 3, 5, "it is being answered")
        for _ in range(3):
            assert_served(stack)
        wait_until(lambda: stack.load()["running"] == 0, 10, "the slots are free")
        assert in_flight(stack) > 0, "all of it went into the network's buffers: this client was not slow"
        answer = b""
        while not answer.endswith(b"0\r\n\r\n"):
            answer += client.socket.recv(65536)
        assert b"data: [DONE]" in answer and answer.count(b"data: {") >= 50


@pytest.mark.slow
def test_a_client_that_never_reads_is_ended(stack: Stack) -> None:
    """What the gateway holds for it is given up soon after the request's own deadline."""
    client = Client(stack, small_window)
    with hanging_up(client):
        client.ask(OPENAI, large(stack))
        wait_until(lambda: in_flight(stack) > 0, 5, "it is being answered")
        wait_until(lambda: in_flight(stack) == 0, REQUEST_TIMEOUT_S + 8, "it is given up")


# Hang-ups


def openai(stream: bool, words: int) -> tuple[str, dict[str, Any]]:
    return OPENAI, {"model": "counting", "prompt": prompt(words), "max_tokens": MANY, "stream": stream}


def kserve(path: str, words: int) -> tuple[str, dict[str, Any]]:
    parameters = {"max_tokens": MANY, "stream": path.endswith("_stream")}
    return path, {"text_input": prompt(words), "parameters": parameters}


def infer(words: int) -> tuple[str, dict[str, Any]]:
    tensors = {"text_input": prompt(words), "sampling_parameters": json.dumps({"max_tokens": MANY})}
    inputs = [{"name": name, "datatype": "BYTES", "shape": [1], "data": [text]} for name, text in tensors.items()]
    return "/v2/models/counting/infer", {"inputs": inputs}


EDGES: dict[str, Callable[[int], tuple[str, dict[str, Any]]]] = {
    "completions": partial(openai, False),
    "completions-stream": partial(openai, True),
    "generate": partial(kserve, GENERATE),
    "generate_stream": partial(kserve, f"{GENERATE}_stream"),
    "infer": infer,
}


def assert_freed(stack: Stack, client: Client, running: int) -> None:
    """The client hangs up, and within a second there is as much running as before it and nobody waits."""
    client.hang_up()
    began, seen = awake(), []
    while not seen or (seen[-1]["running"], seen[-1]["waiting"]) != (running, 0):
        assert awake() - began < FREED_S, seen
        seen.append(stack.load())
        time.sleep(0.02)


@pytest.mark.parametrize("edge", EDGES)
def test_hanging_up_in_the_queue_gives_up_the_place(stack: Stack, edge: str) -> None:
    """A request that waits for a slot stops waiting when its client leaves."""
    others = [Client(stack) for _ in range(SLOTS)]
    client = Client(stack)
    with hanging_up(client, *others):
        for other in others:
            other.ask(*openai(True, 12))
        wait_until(lambda: stack.load()["running"] == SLOTS, 5, "every slot is taken")
        client.ask(*EDGES[edge](12))
        wait_until(lambda: stack.load()["waiting"] == 1, 5, "it waits")
        assert_freed(stack, client, SLOTS)


@pytest.mark.parametrize("edge", EDGES)
def test_hanging_up_before_the_first_token_frees_the_slot(stack: Stack, edge: str) -> None:
    """A long prompt is not read to its end for a client that has left."""
    client = Client(stack)
    with hanging_up(client):
        client.ask(*EDGES[edge](3000))
        wait_until(lambda: stack.load()["running"] == 1, 5, "the prompt is read")
        client.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.socket.recv(1)
        assert_freed(stack, client, 0)


@pytest.mark.parametrize("edge", EDGES)
def test_hanging_up_while_text_is_generated_frees_the_slot(stack: Stack, edge: str) -> None:
    """In the middle of a stream, and of an answer that would come in one piece."""
    client = Client(stack)
    with hanging_up(client):
        client.ask(*EDGES[edge](12))
        if "stream" in edge:
            received = b""
            while received.count(b"data: ") < 5:
                received += client.socket.recv(4096)
        else:
            wait_until(lambda: stack.load()["running"] == 1, 5, "it is being answered")
            time.sleep(0.1)
        assert_freed(stack, client, 0)


# The batch command is a client, too


def test_a_killed_batch_goes_on_where_it_was(stack: Stack, tmp_path: Path):
    """kill -9 twice in the middle, run again: every custom_id is exactly once in the output, with the right answer."""
    lines = 240
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    requests = [
        {
            "custom_id": f"r{n}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": stack.model, "prompt": f"{prompt(12)} one", "max_tokens": 2 + n % 3},
        }
        for n in range(lines)
    ]
    file.write_text("".join(json.dumps(request) + "\n" for request in requests))
    arguments = [*COMMAND, "batch", "run", str(file), "--output", str(out), "--json"]

    def done() -> int:
        return max(0, partial.read_bytes().count(b"\n") - 1) if partial.exists() else 0

    for share in (lines // 4, lines // 2):
        process = subprocess.Popen(arguments, env=stack.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            wait_until(lambda share=share: done() >= share, 30, f"{share} lines are done")
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        assert process.returncode == -signal.SIGKILL and not out.exists()

    before = done()
    ended = stack.cli(*arguments[len(COMMAND) :])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads(ended.stdout)
    assert lines // 2 <= before < lines and report["skipped"] == before
    assert (report["total"], report["succeeded"], report["failed"]) == (lines, lines, 0)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["custom_id"] for row in found] == [request["custom_id"] for request in requests]
    for row, request in zip(found, requests, strict=True):
        body = row["response"]["body"]
        assert body["usage"]["completion_tokens"] == request["body"]["max_tokens"]
        assert body["choices"][0]["text"].split()[0] == "two"
    assert report["output_tokens"] == sum(request["body"]["max_tokens"] for request in requests)
    assert not partial.exists()
