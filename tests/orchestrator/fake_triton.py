"""A Triton on a real socket that misbehaves on demand: for faults that the real one cannot be asked to have.

It speaks the part of Triton's HTTP that the gateway uses. What a stream does is a script: a list of steps.
    bytes    written as they are (one HTTP chunk)      float   seconds of silence (math.inf: for ever)
    "close"  the connection is cut                     "end"   the response ends cleanly
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from tests import encoding

Step = bytes | float | str


def event(
    text: str = "", finish: str = "", tokens: int | None = None, prompt_tokens: int = 3, cached: int | None = None
) -> bytes:
    """One chunk as Triton's generate_stream writes it."""
    fields = {
        "model_name": "m", "model_version": "1", "text_output": text, "finish_reason": finish,
        "num_input_tokens": prompt_tokens, "num_output_tokens": (1 if text else 0) if tokens is None else tokens,
        **({} if cached is None else {"num_cached_tokens": cached}),
    }  # fmt: skip
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def entry(text: str, logprob: float = -0.5, top: int = 0, data: bytes | None = None) -> dict[str, Any]:
    """One token's log-probability, and as many others': those of `<1>`, `<2>` and so on, each less likely."""
    others = [entry(f"<{rank}>", logprob - rank) for rank in range(1, top + 1)]
    own = {"id": 5, "token": text, "bytes": list(text.encode() if data is None else data), "logprob": logprob}
    return own | ({"top": others} if top else {"top": []})


def answers(texts: list[str], finishes: list[str], entries: list[list[dict[str, Any]]], **fields: Any) -> bytes:
    """One response of several answers, or with log-probabilities, as the backend writes it."""
    tokens = [len(own) for own in entries]
    given: dict[str, list[Any]] = {
        "text_output": texts, "finish_reason": finishes, "num_output_tokens": tokens,
        "logprobs": [json.dumps(own) for own in entries],
    }  # fmt: skip
    plain = {name: values[0] if len(values) == 1 else values for name, values in given.items()}
    body = {"model_name": "m", "model_version": "1", "num_input_tokens": 3, **plain, **fields}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def _for_each(step: bytes, asked: dict[str, Any]) -> bytes:
    """A plain chunk as a request for several answers, or for log-probabilities, gets it: answer i's text ends with i,
    each later one is a little less likely than the one before, and every chunk is one token.
    """
    how = json.loads(asked["sampling_parameters"])
    n, top = how.get("n", 1), how.get("logprobs")
    if (n == 1 and top is None) or b'"text_output": "' not in step or b'"logprobs"' in step:
        return step
    fields = json.loads(step[6:])
    text, finish, tokens = fields["text_output"], fields["finish_reason"], fields["num_output_tokens"]
    texts = [text + (str(index) if index and text else "") for index in range(n)]
    entries = [[entry(one, -0.5 - index / 10, top or 0)] * tokens for index, one in enumerate(texts)]
    more = {name: fields[name] for name in ("num_input_tokens", "num_cached_tokens") if name in fields}
    return answers(texts, [finish] * n, entries, **more)


def failure(message: str) -> bytes:
    """An error event inside a stream."""
    return b"data: " + json.dumps({"error": message}).encode() + b"\n\n"


def answer(*texts: str, finish: str = "stop") -> list[Step]:
    """A well-behaved stream of these texts."""
    return [*(event(text) for text in texts[:-1]), event(texts[-1], finish), "end"]


class FakeTriton:
    """Serves one model `m`. Change the attributes while it runs; `requests` and `hang_ups` tell what it saw."""

    def __init__(self) -> None:
        self.script: Sequence[Step] = answer("Hola", ", ", "¿qué tal?")
        self.scripts: list[Sequence[Step]] = []  # used up first, one a request
        self.by_text: dict[str, Sequence[Step]] = {}  # for requests with this text_input, before the other scripts
        self.status = 200
        self.content_type = "text/event-stream; charset=utf-8"
        self.plain: bytes | None = None  # the whole body of a stream's answer, instead of the script
        self.refusals: list[bytes] = []  # bodies of 400 answers, used up first, one a request
        self.models: dict[str, str] = {"m": "READY"}
        self.version = "1"
        self.parameters: dict[str, str] = {"task": "text_generation", "chat": "true", "max_len": "64"}
        self.beat: dict[str, Any] = {"running": 0, "waiting": 0, "slots": 4, "step_age_s": 0.0, "busy": False}
        self.beat_error: str | None = None
        self.words: dict[int, str] = {}
        self.inspected = 0
        self.other_backends: set[str] = set()  # models that are only inferred with
        self.infer_error: str | None = None
        self.config_facts: dict[str, Any] = {}  # further facts of a configuration
        self.encoders: dict[str, dict[str, Any]] = {}  # models that embed or classify: their config.pbtxt's facts
        self.read: list[list[str]] = []  # what these were given, a list a call
        self.encode_pause_s = 0.0
        self.beats_wait = False  # for the batch that is read
        self._batch = asyncio.Lock()
        self.encode_errors: list[tuple[int, str]] = []  # status and text, used up first, one a call
        self.broken_encoder: Callable[[dict[str, Any]], object] | None = None  # changes what it answers with
        self.stopped = False  # as after SIGSTOP: connections are accepted and nothing is answered
        self.port = 0
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.running = self.most_running = 0
        self.hang_ups = 0
        self.calls: list[str] = []
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", port)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """As kill -9: the port closes and every connection is cut."""
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in list(self._writers):
            writer.transport.abort()
        await self._server.wait_closed()

    async def __aenter__(self) -> FakeTriton:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            while await self._request(reader, writer):
                continue
        except (ConnectionError, asyncio.IncompleteReadError):
            return  # the gateway went away, which tests do on purpose
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.calls.append(f"{method} {path}")
        if self.stopped:
            await asyncio.sleep(3600)
        if path.endswith("/generate_stream"):
            self.requests.append(json.loads(body))
            self.headers.append(headers)
            return await self._stream(reader, writer)
        kind = "Content-Type: application/json\r\n"
        if path.endswith("/infer") and path.split("/")[-2] in self.encoders:
            status, data, json_length = await self._encode(path.split("/")[-2], body)
            kind += f"Inference-Header-Content-Length: {json_length}\r\n"
        else:
            status, value = self._unary(path, body)
            data = b"" if value is None else json.dumps(value).encode()
        writer.write(f"HTTP/1.1 {status} X\r\n{kind}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        return True

    async def _encode(self, name: str, body: bytes) -> tuple[int, bytes, int]:
        """Status, body and length of the JSON in front."""
        head, end = json.JSONDecoder().raw_decode(body.decode("latin-1"))
        if head["parameters"].get("heartbeat"):
            if self.beat_error is not None:
                data = json.dumps({"error": self.beat_error}).encode()
                return (503 if "queue" in self.beat_error else 400), data, len(data)
            async with self._batch if self.beats_wait else contextlib.nullcontext():
                pass
            row = {"name": "heartbeat", "datatype": "BYTES", "shape": [1, 1], "data": [json.dumps(self.beat)]}
            data = json.dumps({"model_name": name, "model_version": self.version, "outputs": [row]}).encode()
            return 200, data, len(data)
        texts = encoding.texts_of(body[end:])
        self.read.append(texts)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        async with self._batch if self.beats_wait else contextlib.nullcontext():
            await asyncio.sleep(self.encode_pause_s)
        self.running -= 1
        if self.encode_errors:
            status, said = self.encode_errors.pop(0)
        elif len(texts) > int(self.encoders[name].get("max_batch_size", 64)):
            status, said = 400, f"inference request batch-size must be <= 64 for '{name}'"
        else:
            version = self.version
            outputs = encoding.outputs(texts, self.encoders[name], bool(head["parameters"].get("truncate")))
            if isinstance(outputs, dict):
                if self.broken_encoder is not None:
                    self.broken_encoder(outputs)
                wanted = [row["name"] for row in head["outputs"]]
                return 200, *encoding.reply(name, {key: outputs[key] for key in wanted if key in outputs}, version)
            status, said = 500, outputs
        data = json.dumps({"error": said}).encode()
        return status, data, len(data)

    def _unary(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/v2/repository/index":
            return 200, [{"name": name, "version": self.version, "state": state} for name, state in self.models.items()]
        if path.endswith("/config"):
            name = path.split("/")[-2]
            if name in self.encoders:
                return 200, encoding.config_json(name, self.encoders[name])
            return 200, {
                "name": name,
                "backend": "python" if name in self.other_backends else "inflight",
                "parameters": {k: {"string_value": v} for k, v in self.parameters.items()},
                **self.config_facts,
            }
        if path.endswith("/ready"):
            return 200, None
        if path.endswith("/infer"):
            if self.infer_error is not None:
                return 500, {"error": self.infer_error}
            return 200, {"model_name": path.split("/")[-2], "model_version": "1", "outputs": []}
        if path.endswith("/generate"):
            if self.beat_error is not None:
                return 400, {"error": self.beat_error}
            said = self.beat if b'"heartbeat"' in body else self._inspect(json.loads(body))
            return 200, {"model_name": "m", "model_version": self.version, "text_output": json.dumps(said)}
        if path.endswith(("/load", "/unload")):
            name = path.split("/")[-2]
            if name not in self.models:
                return 400, {"error": f"failed to load '{name}', failed to poll from model repository"}
            return 200, None
        return 404, {"error": "no such path"}

    def _inspect(self, body: dict[str, Any]) -> dict[str, Any]:
        """A tokenizer of one token a word, and of `words` for token ids."""
        self.inspected += 1
        sampling = json.loads(body.get("sampling_parameters") or "{}")
        if "prompt_token_ids" in sampling:
            ids = sampling["prompt_token_ids"]
            return {"tokens": len(ids), "text": " ".join(self.words.get(token, f"w{token}") for token in ids)}
        texts = [body["text_input"], *(turn["content"] for turn in sampling.get("messages", []))]
        return {"tokens": sum(len(text.split()) for text in texts), "text": None}

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        plain = self.refusals.pop(0) if self.refusals else self.plain
        if plain is not None:
            status, kind = (self.status, self.content_type) if plain is self.plain else (400, "application/json")
            head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(plain)}\r\n\r\n"
            writer.write(head.encode() + plain)
            await writer.drain()
            return True
        at = len(self.requests) - 1
        script = self.by_text.get(str(self.requests[-1]["text_input"]))
        if script is None:
            script = self.scripts.pop(0) if self.scripts else self.script
        gone = asyncio.create_task(reader.read(1))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        started = False
        try:
            for step in script:
                if isinstance(step, (int, float)):
                    # inf would overflow the clock's integer arithmetic in some event loops
                    await asyncio.wait([gone], timeout=min(float(step), 3600.0))
                elif step == "close":
                    writer.transport.abort()
                    return False
                elif isinstance(step, bytes):
                    step = _for_each(step, self.requests[at])
                    if not started:  # Triton, too, sends the head with the first response, whose kind sets the status
                        status = 400 if step.startswith(b'data: {"error"') else self.status
                        writer.write(
                            f"HTTP/1.1 {status} X\r\nContent-Type: {self.content_type}\r\n"
                            "Transfer-Encoding: chunked\r\n\r\n".encode()
                        )
                        started = True
                    writer.write(b"%x\r\n%s\r\n" % (len(step), step))
                    await writer.drain()
                    await asyncio.sleep(0)
                if gone.done():
                    self.hang_ups += 1
                    return False
            writer.write(b"0\r\n\r\n")
            await writer.drain()
            return not gone.done()
        except ConnectionError:
            self.hang_ups += 1
            return False
        finally:
            self.running -= 1
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await gone
