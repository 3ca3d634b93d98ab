"""Triton's entry point: one TritonPythonModel a model instance. Glue only: tensors in, sequences to the engine,
responses out.

The tensor contract is that of Triton's vLLM backend; docs/protocol.md has it whole.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

if not __package__:  # Triton loads this file by path; its folder is a package beside Triton's other backends
    sys.path.insert(0, str(Path(__file__).parent.parent))
    __package__ = Path(__file__).parent.name

from . import entry as entries
from .answer import Answer, Part
from .engine import Engine
from .errors import EngineError, Internal, InvalidArgument, ResourceExhausted, Unavailable
from .metrics import Metrics, figures
from .opening import open_model, tuning
from .outbox import Outbox
from .prompt import PromptCodec
from .request import Prompt, SamplingParams, parse
from .scheduler import Scheduler
from .sequence import Sequence
from .stream import Stream
from .trt import check_engine
from .wire import Responder, merge, string

DEFAULT_DEADLINE_S = 600.0
DRAIN_S = 10.0
LONG_BYTES = 16_384  # prompts longer than this are read in a thread of their own


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self._outputs = {output["name"] for output in config["output"]}
        parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        try:
            self._entry = entries.load(Path(args["model_repository"]) / args["model_version"], parameters)
            check_engine(self._entry.folder)
            self._codec = PromptCodec(self._entry)
            # KIND_GPU names a device; with KIND_CPU, which every machine can load, it is the first one
            on_gpu = args.get("model_instance_kind") == "GPU"
            opened = open_model(self._entry, int(args.get("model_instance_device_id") or 0) if on_gpu else 0)
        except entries.EntryError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        scheduler = Scheduler(self._entry.slots, self._entry.max_queue, self._entry.prefill_chunk)
        self._engine = Engine(
            opened.runner,
            scheduler,
            step_delay_s=self._entry.step_delay_s,
            reopen=opened.on_cpu,
            fallback=opened.fallback,
            tuning=tuning(self._entry, opened.runner),
        )
        self._outbox = Outbox()
        # Reading a megabyte takes most of a second: in a thread of its own, heartbeats and others are not behind it.
        self._reader = ThreadPoolExecutor(1, "inflight-reader")
        self._unread = threading.BoundedSemaphore(self._entry.max_queue)
        read = partial(figures, self._engine, self._entry.slots * self._entry.graph.max_len)
        self._metrics = Metrics(pb_utils.MetricFamily, args["model_name"], args["model_version"], read)
        self._outbox.start()
        self._engine.start()
        self._metrics.start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            responder = Responder(request.get_response_sender())
            try:
                self._accept(request, responder)
            except EngineError as error:
                responder.fail(error)
            except Exception as error:  # a request that breaks the glue must be answered all the same
                responder.fail(Internal(f"{type(error).__name__}: {error}"))

    def finalize(self) -> None:
        self._engine.close(DRAIN_S)  # from here on a prompt that is still being read is refused
        self._reader.shutdown()
        self._outbox.stop(DRAIN_S)
        self._metrics.stop(DRAIN_S)
        gc.collect()  # response senders that a cycle still holds go before Triton's side of them does

    def _accept(self, request: Any, responder: Responder) -> None:
        given = json.loads(request.parameters() or "{}")
        if given.pop("heartbeat", False):
            responder.send([Part(self._heartbeat())], final=True)
            return
        inspect = bool(given.pop("inspect", False))
        wire_timeout_us = given.get("timeout") or request.timeout()
        flags, sampling = merge(request, given)
        text = string(request, "text_input") or b""
        prompt, params = parse(text, sampling)
        self._check(params, flags)
        long = len(text) + len(sampling) > LONG_BYTES
        if long and not self._unread.acquire(blocking=False):
            raise ResourceExhausted(f"{self._entry.max_queue} long prompts (max_queue) are waiting to be read")
        begin: Callable[[], None]
        if inspect:
            begin = partial(self._inspect, responder, prompt)
        else:
            begin = self._open(responder, prompt, params, flags, _deadline(params, wire_timeout_us))
        if long:
            self._reader.submit(begin).add_done_callback(lambda _: self._unread.release())
        else:
            begin()

    def _inspect(self, responder: Responder, prompt: Prompt) -> None:
        """Answer with what the tokenizer makes of a prompt: its tokens, and its text where it came as token ids."""
        try:
            ids = self._codec.encode(prompt)
            text = self._codec.decode(ids) if prompt.token_ids is not None else None
            responder.send([Part(json.dumps({"tokens": len(ids), "text": text}))], final=True)
        except EngineError as error:
            responder.fail(error)
        except Exception as error:  # a prompt that breaks the tokenizer must be answered all the same
            responder.fail(Internal(f"{type(error).__name__}: {error}"))

    def _check(self, params: SamplingParams, flags: dict[str, bool]) -> None:
        """Raises InvalidArgument for answers that can never be given together."""
        if params.best_of > params.n and flags.get("stream"):
            raise InvalidArgument("best_of above n cannot be streamed: only the end shows which answers are the best")
        places = self._entry.max_queue
        if params.best_of > places:
            raise InvalidArgument(f"best_of (by default n) is {params.best_of}; this model queues {places} (max_queue)")

    def _open(
        self, responder: Responder, prompt: Prompt, params: SamplingParams, flags: dict[str, bool], deadline: float
    ) -> Callable[[], None]:
        """Open the request's stream; what is returned reads the prompt and queues its sequences."""
        wants = {name.removeprefix("return_") for name, wanted in flags.items() if wanted}
        if params.logprobs is not None:
            wants.add("logprobs")
        responder.describe(frozenset(wants & self._outputs))
        if params.logprobs is None and ("logprobs" in wants or params.best_of > params.n):
            params = replace(params, logprobs=0)
        head = self._codec.pieces.head if "logprobs" in wants else None
        answers = [Answer(self._codec.decode, head) for _ in range(params.best_of)]
        stream = self._outbox.open(responder, flags.get("stream", False), answers, params.n)
        echo = not flags.get("exclude_input_in_output", True)
        return partial(self._begin, stream, responder, prompt, params, echo, deadline)

    def _begin(
        self, stream: Stream, responder: Responder, prompt: Prompt, params: SamplingParams, echo: bool, deadline: float
    ) -> None:
        """Read the prompt and queue its sequences. What is wrong with it goes out on the stream."""
        try:
            if stream.closed or self._engine.closing:
                raise Unavailable("the request was given up before its prompt was read")
            ids = self._codec.encode(prompt)
            responder.input_tokens = len(ids)
            budget = self._budget(len(ids), params)
            if echo:
                stream.echo(self._codec.decode(ids) if prompt.text is None else prompt.text)
            entry, decode = self._entry, self._codec.decode
            sequences = [
                Sequence(ids, answer, budget, entry.eos, decode, sink, deadline, entry.graph.vocab_size)
                for answer, sink in zip(_seeded(params), stream.sinks, strict=True)
            ]
            stream.attach(*sequences)
            self._engine.submit(*sequences)
        except EngineError as error:
            stream.error(error)
        except Exception as error:  # a prompt that breaks the tokenizer must be answered all the same
            stream.error(Internal(f"{type(error).__name__}: {error}"))

    def _budget(self, prompt_tokens: int, params: SamplingParams) -> int:
        """How many tokens may be generated. Raises InvalidArgument for what can never fit, before it queues."""
        room = self._entry.graph.max_len - prompt_tokens
        if room < 1:
            raise InvalidArgument(
                f"the prompt has {prompt_tokens} tokens; the model's context of {self._entry.graph.max_len} tokens "
                "leaves no room to answer"
            )
        wanted = params.max_tokens or min(room, self._entry.default_max_tokens or room)
        if wanted > room:
            raise InvalidArgument(
                f"max_tokens is {wanted}; {prompt_tokens} prompt tokens leave {room} of the model's context "
                f"of {self._entry.graph.max_len}"
            )
        if params.min_tokens > wanted:
            raise InvalidArgument(f"min_tokens is {params.min_tokens}; at most {wanted} tokens may be generated here")
        return wanted

    def _heartbeat(self) -> str:
        load = self._engine.load()
        return json.dumps({"running": load.running, "waiting": load.waiting, "slots": load.slots,
                           "step_age_s": round(load.step_age_s, 3), "busy": load.busy,
                           "digest": self._entry.digest, "device": load.device,
                           "fallback": load.fallback})  # fmt: skip


def _deadline(params: SamplingParams, wire_timeout_us: Any) -> float:
    """Monotonic time by which the answer must be complete: the nearest of all limits."""
    limits_s = [DEFAULT_DEADLINE_S]
    if params.timeout_s is not None:
        limits_s.append(params.timeout_s)
    if isinstance(wire_timeout_us, int) and wire_timeout_us > 0:
        limits_s.append(wire_timeout_us / 1e6)
    return time.monotonic() + min(limits_s)


def _seeded(params: SamplingParams) -> list[SamplingParams]:
    """The parameters of each answer: it is made as a request of its own with the next seed would be."""
    return [replace(params, seed=(params.seed + i) % 2**64) for i in range(params.best_of)]
