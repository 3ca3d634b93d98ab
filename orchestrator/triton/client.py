"""The only module that talks to Triton (HTTP/1.1, KServe v2 and its `generate` extension).

HTTP costs the gateway a third of what gRPC does for a stream, and a hang-up reaches the backend as fast, because our
backend writes at least every 250 ms. Triton's errors are translated here, once: nobody else sees an aiohttp exception.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import orjson

from orchestrator.domain import TASKS, Abilities, GenerateRequest, InferRequest, InferResult
from orchestrator.errors import DeadlineExceeded, InvalidRequest, ModelNotFound, UpstreamError, UpstreamUnavailable
from orchestrator.triton.answers import Answers
from orchestrator.triton.attendance import Attendance, Deadlines
from orchestrator.triton.connection import Answer, Pool
from orchestrator.triton.infer import describe, infer
from orchestrator.triton.reading import Put, Reading
from orchestrator.triton.wire import Reply, decode, error_of, payload, read_body, sampling, scalar, tells_logprobs

_T = TypeVar("_T")
OUR_BACKEND = "inflight"
IN_PROCESSES = (OUR_BACKEND, "encoder", "python")  # backends each of whose instances is a process of its own
# What an encoder is known by, whichever backend runs it: its task, and the outputs that it has.
ENCODERS = {"embeddings": ("embed", "embedding"), "sentiment_analysis": ("classify", "scores")}
CACHED_TOKENS = "num_cached_tokens"  # an output of a model that tells what its prefix cache had
HEARTBEAT = "heartbeat"  # an output of a model that has one
# To a model with batches the beat is a row like another, but in front of all that wait where there are priorities.
_ENCODER_BEAT = {
    "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": [""]}],
    "outputs": [{"name": HEARTBEAT}],
    "parameters": {HEARTBEAT: True, "priority": 1},
}


@dataclass(frozen=True)
class Heartbeat:
    """What the stub process says of itself. `step_age_s`: age of the engine's step in progress, seconds.

    `digest` names the entry that it has loaded; empty where the backend does not say. `version` is Triton's word.
    `device` is where it runs (cpu, cuda or tensorrt; empty where it does not say), `fallback` whether that is the CPU
    because its device failed.
    """

    running: int
    waiting: int
    slots: int
    step_age_s: float
    busy: bool
    digest: str = ""
    device: str = ""
    fallback: bool = False
    version: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Abilities):
    """What is needed of a model's configuration. `beats`: it has a heartbeat. `processes`: how many a version of it
    has, 0 where it runs in the server's own.
    """

    beats: bool
    processes: int


@dataclass(frozen=True)
class Prompt:
    """What the model's tokenizer says of a prompt: its number of tokens, and the text of one given as token ids."""

    tokens: int
    text: str | None


class Triton:
    """One Triton server. Must be made inside a running event loop; `close()` it when done."""

    def __init__(self, url: str, deadlines: Deadlines, default_max_tokens: int | None = None) -> None:
        self.url = url.rstrip("/")
        self._deadlines = deadlines
        self._default_max_tokens = default_max_tokens
        at = urlsplit(self.url)
        if at.scheme != "http" or at.hostname is None:
            raise ValueError(f"Triton is reached over http://, not {url}")
        # No limit of its own: admission bounds the streams, and a heartbeat must never wait for a connection.
        self._pool = Pool(at.hostname, at.port or 80, deadlines.connect_s)

    async def close(self) -> None:
        self._pool.close()

    async def stream(self, request: GenerateRequest, attendance: Attendance, put: Put) -> None:
        """Hand the answer's chunks to `put` until the last one, which has a finish reason, or until it wants no more.

        A chunk is handed on where its bytes arrive. Cancelling this cancels the request in the backend. Raises
        InvalidRequest, Overloaded, OutOfMemory, DeadlineExceeded, UpstreamUnavailable, UpstreamError, Cancelled, or
        what `attendance.fail()` was given.
        """
        now = asyncio.get_running_loop().time()
        # from acceptance: a prompt that waited for its turn behind others of its request does not get it anew
        whole_s = min(self._deadlines.request_s, request.timeout_s or self._deadlines.request_s)
        total_at = now + whole_s - (time.monotonic() - request.accepted_at)
        first_at = min(total_at, now + self._deadlines.first_token_s)
        times = (now, first_at, total_at)
        try:
            return await self._stream(request, self._default_max_tokens, whole_s, attendance, put, times)
        except InvalidRequest as error:
            if not self._default_max_tokens or request.max_tokens is not None or error.param != "max_tokens":
                raise
        # The gateway's default is more than the prompt leaves room for: the model's own default is all the room.
        await self._stream(request, None, whole_s, attendance, put, times)

    async def _stream(
        self, request: GenerateRequest, default: int | None, whole_s: float, attendance: Attendance, put: Put,
        times: tuple[float, float, float],
    ) -> None:  # fmt: skip
        sent_at, first_at, _ = times
        if sent_at >= first_at:
            raise DeadlineExceeded
        body = orjson.dumps(payload(request, request.max_tokens or default, whole_s, attendance.tells_cached))
        headers = {"content-type": "application/json"}
        if request.traceparent:
            headers["traceparent"] = request.traceparent
        path = f"/{self._model_path(request.model, 'generate_stream')}"
        read = None if request.plain else Answers(request.answers, tells_logprobs(request)).chunk
        reading = Reading(put, self._deadlines, *times, read)
        answer = await self._send("POST", path, body, headers, whole_s)
        try:
            attendance.follow(answer)
            if await answer.hand_to(reading):
                return
            # An early failure is a plain body, even with status 200, or one event with status 400: the body decides.
            text = await self._within(lambda until: read_body(answer, until), answer, first_at)
        except OSError as error:
            # Its traceback has this frame, and this frame whoever keeps the answer and what ended it: a cycle.
            raise _lost(error) from error.with_traceback(None)
        finally:
            if reading.finished:
                answer.finish()
            else:
                answer.close()  # it is hung up on
        failure = error_of(text, answer.status)
        if isinstance(failure, ModelNotFound):  # it was served a moment ago: it is being reloaded or removed
            raise UpstreamUnavailable(str(failure)) from failure
        raise failure

    async def _send(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], within_s: float
    ) -> Answer:
        try:
            return await self._pool.request(method, path, body, headers, within_s)
        except OSError as error:
            raise _lost(error) from error

    async def _within(self, call: Callable[[float], Awaitable[_T]], answer: Answer, deadline: float) -> _T:
        """Await something of an answer until it stalls or the request's deadline passes."""
        now = asyncio.get_running_loop().time
        began = now()
        if began >= deadline:
            raise DeadlineExceeded
        try:
            return await call(min(began + self._deadlines.stall_s, deadline))
        except TimeoutError as error:
            if now() >= deadline:
                raise DeadlineExceeded from error
            raise UpstreamUnavailable(f"Triton sent nothing for {self._deadlines.stall_s} s", server=True) from error

    async def beat(self, model: str, config: ModelConfig, stall_s: float) -> Heartbeat | None:
        """How a model of this kind is; None of one without a heartbeat that Triton says is ready. Raises TruthGPTError.

        An encoder answers between two batches: as long as one may take, `stall_s`, there is nothing to be said of it.
        That its process is gone Triton itself says at once.
        """
        if config.generates:
            return await self.heartbeat(model)
        if not config.beats:
            await self.model_ready(model)
            return None
        answer = await self._call("POST", self._model_path(model, "infer"), _ENCODER_BEAT, stall_s)
        return _beat(model, answer, lambda: next(row["data"] for row in answer["outputs"] if row["name"] == HEARTBEAT))

    async def heartbeat(self, model: str) -> Heartbeat:
        """Ask a generation model's stub process how it is. Raises TruthGPTError when it does not answer properly in
        time.
        """
        answer = await self._call(
            "POST", self._model_path(model, "generate"), {"text_input": "", "parameters": {"heartbeat": True}}
        )
        return _beat(model, answer, lambda: answer["text_output"])

    async def prompt(self, request: GenerateRequest, timeout_s: float) -> Prompt:
        """Ask the model's tokenizer about a prompt. Raises InvalidRequest, UpstreamUnavailable, UpstreamError."""
        body = {
            "text_input": request.text or "",
            "sampling_parameters": orjson.dumps(sampling(request)).decode(),
            "parameters": {"inspect": True},
        }
        answer = await self._call("POST", self._model_path(request.model, "generate"), body, timeout_s)
        try:
            said = orjson.loads(scalar(answer["text_output"]))
            return Prompt(int(said["tokens"]), said.get("text"))
        except (KeyError, TypeError, ValueError) as error:
            raise UpstreamError(f"{request.model} says nothing of a prompt that makes sense") from error

    async def index(self) -> dict[str, tuple[str, str]]:
        """Model name -> (newest version, state); state is READY, LOADING, UNLOADING, UNAVAILABLE or empty."""
        rows = await self._call("POST", "v2/repository/index", {})
        try:
            models: dict[str, tuple[str, str]] = {}
            for row in rows:
                version, state = str(row.get("version", "")), str(row.get("state", ""))
                known = models.get(row["name"])
                # One row a version. A version that is ready beats an older one that was unloaded.
                if known is None or _rank(version, state) > _rank(*known):
                    models[row["name"]] = (version, state)
            return models
        except (KeyError, TypeError, AttributeError) as error:
            raise UpstreamError("the repository index makes no sense") from error

    async def model_config(self, model: str) -> ModelConfig:
        """What Triton has loaded of a model's config.pbtxt, which may have been changed on disk since."""
        answer = await self._call("GET", self._model_path(model, "config"), None)
        try:
            values = {name: str(value["string_value"]) for name, value in answer.get("parameters", {}).items()}
            length = values.get("max_len", "")
            outputs = {str(row["name"]) for row in answer.get("output", [])}
            operation = _operation(answer.get("backend"), values.get("task", ""), outputs)
            return ModelConfig(
                task=_known_task(values.get("task", "")),
                chat=values.get("chat") == "true",
                prefix_reuse=values.get("prefix_reuse") == "true",
                tells_cached=CACHED_TOKENS in outputs,
                max_len=int(length) if length else None,
                operation=operation,
                beats=operation == "generate" or (operation != "infer" and HEARTBEAT in outputs),
                dim=int(values["dim"]) if values.get("dim") else None,
                normalized=values.get("normalized") == "true",
                labels=tuple(map(str, orjson.loads(values.get("labels") or "[]"))),
                max_batch=max(1, int(answer.get("max_batch_size") or 0)),
                processes=_processes(answer.get("backend"), answer.get("instance_group", [])),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UpstreamError(f"the configuration of {model} makes no sense") from error

    async def model_ready(self, model: str) -> None:
        """Raises UpstreamUnavailable unless Triton says that the model is ready."""
        reply = await self.fetch("GET", self._model_path(model, "ready"), None, {}, self._deadlines.heartbeat_s)
        if reply.status != 200:
            raise UpstreamUnavailable(f"Triton says that {model} is not ready")

    async def infer(self, request: InferRequest, attendance: Attendance) -> InferResult:
        """Run a model that answers once; see infer.infer()."""
        return await infer(self.fetch, request, attendance, self._deadlines.request_s)

    async def encode(self, request: InferRequest, attendance: Attendance) -> InferResult:
        """Run one of our encoders; its errors are of our backends' kinds. Else as `infer`."""
        return await infer(self.fetch, request, attendance, self._deadlines.request_s, error_of)

    async def describe(self, model: str, version: str, what: str) -> Any:
        """Triton's JSON about a model; see infer.describe()."""
        return await describe(self.fetch, model, version, what, self._deadlines.heartbeat_s)

    @staticmethod
    @lru_cache(maxsize=1024)
    def _model_path(model: str, what: str) -> str:
        return f"v2/models/{quote(model, safe='')}/{what}"

    async def fetch(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float,
        attendance: Attendance | None = None,
    ) -> Reply:  # fmt: skip
        """One unary exchange as it is, errors of Triton's included.

        Raises UpstreamUnavailable, whose cause is a TimeoutError where the time was up, UpstreamError, or what
        `attendance.fail()` was given.
        """
        until = asyncio.get_running_loop().time() + timeout_s
        answer = await self._send(method, f"/{path.lstrip('/')}", body, headers, timeout_s)
        try:
            if attendance is not None:
                attendance.follow(answer)
            await answer.begun(until)
            return Reply(answer.status, answer.headers, await read_body(answer, until))
        except TimeoutError as error:
            url = f"{self.url}/{path.lstrip('/')}"
            raise UpstreamUnavailable(f"Triton did not answer {url} within {timeout_s} s") from error
        except OSError as error:
            raise _lost(error) from error
        finally:
            answer.close()

    async def _call(self, method: str, path: str, body: object, timeout_s: float | None = None) -> Any:
        """One unary call: the decoded JSON of its answer, an empty object for an empty one."""
        data = None if body is None else orjson.dumps(body)
        reply = await self.fetch(method, path, data, {}, timeout_s or self._deadlines.heartbeat_s)
        answer = decode(reply.body) if reply.body else {}
        if reply.status != 200 or (isinstance(answer, dict) and "error" in answer):
            raise error_of(reply.body, reply.status)
        return answer


def _lost(error: OSError) -> UpstreamUnavailable:
    return UpstreamUnavailable(f"the connection to Triton failed: {error}", server=True)


def _rank(version: str, state: str) -> tuple[bool, int]:
    return state == "READY", int(version) if version.isdecimal() else -1


def _operation(backend: object, task: str, outputs: Collection[str]) -> str:
    if backend == OUR_BACKEND:
        return "generate"
    operation, output = ENCODERS.get(task, ("infer", ""))
    return operation if {output, "num_input_tokens"} <= {*outputs} else "infer"


def _processes(backend: object, groups: Sequence[Mapping[str, Any]]) -> int:
    if backend not in IN_PROCESSES:
        return 0
    # where a group names GPUs, its count is for each of them
    return sum(int(group.get("count") or 1) * max(1, len(group.get("gpus") or ())) for group in groups) or 1


def _beat(model: str, answer: Mapping[str, Any], read: Callable[[], Any]) -> Heartbeat:
    """The heartbeat in an answer. Raises UpstreamError."""
    try:
        beat = orjson.loads(scalar(read()))
        return Heartbeat(
            running=int(beat["running"]),
            waiting=int(beat["waiting"]),
            slots=int(beat["slots"]),
            step_age_s=float(beat["step_age_s"]),
            busy=bool(beat["busy"]),
            digest=str(beat.get("digest", "")),
            device=str(beat.get("device", "")),
            fallback=bool(beat.get("fallback", False)),
            version=str(answer.get("model_version", "")),
        )
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise UpstreamError(f"the heartbeat of {model} makes no sense") from error


def _known_task(name: str) -> str:
    return name if name in TASKS else TASKS[0]
