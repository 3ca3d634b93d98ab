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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

if not __package__:  # Triton loads this file by path; its folder is a package beside Triton's other backends
    sys.path.insert(0, str(Path(__file__).parent.parent))
    __package__ = Path(__file__).parent.name

from . import entry as entries
from .engine import Engine
from .errors import EngineError, Internal, InvalidArgument, ResourceExhausted, Unavailable
from .metrics import Metrics, figures
from .opening import open_model
from .outbox import Outbox, Stream
from .prompt import PromptCodec
from .request import Prompt, SamplingParams, parse
from .scheduler import Scheduler
from .sequence import Sequence
from .trt import check_engine

DEFAULT_DEADLINE_S = 600.0
DRAIN_S = 10.0
LONG_BYTES = 16_384  # prompts longer than this are read in a thread of their own
FLAGS = (
    "stream",
    "exclude_input_in_output",
    "return_finish_reason",
    "return_num_input_tokens",
    "return_num_output_tokens",
    "return_logprobs",
)
# Fields of a KServe request that Triton hands on among its parameters.
KSERVE = {"id", "priority", "timeout", "sequence_id", "sequence_start", "sequence_end", "binary_data_output"}
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
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
            responder = _Responder(request.get_response_sender())
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

    def _accept(self, request: Any, responder: _Responder) -> None:
        given = json.loads(request.parameters() or "{}")
        if given.pop("heartbeat", False):
            responder.send(self._heartbeat(), "", 0, final=True)
            return
        inspect = bool(given.pop("inspect", False))
        wire_timeout_us = given.get("timeout") or request.timeout()
        flags, sampling = _merge(request, given)
        if flags.get("return_logprobs"):
            raise InvalidArgument("return_logprobs is not supported by this backend")
        text = _bytes(request, "text_input") or b""
        prompt, params = parse(text, sampling)
        responder.describe(flags, text.decode() if not flags.get("exclude_input_in_output", True) else "")
        long = len(text) + len(sampling) > LONG_BYTES
        if long and not self._unread.acquire(blocking=False):
            raise ResourceExhausted(f"{self._entry.max_queue} long prompts (max_queue) are waiting to be read")
        if inspect:
            begin = partial(self._inspect, responder, prompt)
        else:
            stream = self._outbox.open(responder, bool(flags.get("stream", False)))
            begin = partial(self._begin, stream, responder, prompt, params, _deadline(params, wire_timeout_us))
        if long:
            self._reader.submit(begin).add_done_callback(lambda _: self._unread.release())
        else:
            begin()

    def _inspect(self, responder: _Responder, prompt: Prompt) -> None:
        """Answer with what the tokenizer makes of a prompt: its tokens, and its text where it came as token ids."""
        try:
            ids = self._codec.encode(prompt)
            text = self._codec.decode(ids) if prompt.token_ids is not None else None
            responder.describe({}, "")
            responder.send(json.dumps({"tokens": len(ids), "text": text}), "", 0, final=True)
        except EngineError as error:
            responder.fail(error)
        except Exception as error:  # a prompt that breaks the tokenizer must be answered all the same
            responder.fail(Internal(f"{type(error).__name__}: {error}"))

    def _begin(
        self, stream: Stream, responder: _Responder, prompt: Prompt, params: SamplingParams, deadline: float
    ) -> None:
        """Read the prompt and queue it. What is wrong with it goes out on the stream."""
        try:
            if stream.closed or self._engine.closing:
                raise Unavailable("the request was given up before its prompt was read")
            ids = self._codec.encode(prompt)
            responder.input_tokens = len(ids)
            budget = self._budget(len(ids), params)
            sequence = Sequence(ids, params, budget, self._entry.eos, self._codec.decode, stream, deadline)
            stream.attach(partial(setattr, sequence, "cancelled", True))
            self._engine.submit(sequence)
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


def _merge(request: Any, given: dict[str, Any]) -> tuple[dict[str, bool], bytes]:
    """Flags and sampling parameters, each from its tensor or else from the request's parameters (the tensor wins)."""
    flags: dict[str, bool] = {}
    for name in FLAGS:
        value = given.pop(name, None)
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is not None:
            value = bool(tensor.as_numpy().reshape(-1)[0])
        if value is not None:
            if not isinstance(value, bool):
                raise InvalidArgument(f"{name} must be true or false, not {value!r}")
            flags[name] = value
    scalars = {name: value for name, value in given.items() if name not in KSERVE and not name.startswith("triton_")}
    raw = _bytes(request, "sampling_parameters")
    if not scalars:
        return flags, raw or b""
    try:
        tensor_values = json.loads(raw or b"{}")
    except ValueError:
        return flags, raw or b""  # parse() reports it
    return flags, json.dumps({**scalars, **tensor_values}).encode() if isinstance(tensor_values, dict) else raw or b""


def _bytes(request: Any, name: str) -> bytes | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    value = tensor.as_numpy().reshape(-1)[0]
    return value.encode() if isinstance(value, str) else bytes(value)


class _Responder:
    """One request's response sender; see outbox.Responder."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender
        self._finish_reason = self._output_tokens = self._count_input = False
        self.input_tokens = 0  # known once the prompt is read
        self.started = False
        self._prefix = ""

    def describe(self, flags: dict[str, bool], prefix: str) -> None:
        self._finish_reason = flags.get("return_finish_reason", False)
        self._output_tokens = flags.get("return_num_output_tokens", False)
        self._count_input = flags.get("return_num_input_tokens", False)
        self._prefix = prefix

    def send(self, text: str, finish: str, tokens: int, final: bool) -> None:
        if text or final:
            self.started = True
            text, self._prefix = self._prefix + text, ""
        tensors = [pb_utils.Tensor("text_output", np.array([text.encode()], dtype=object))]
        if self._finish_reason:
            tensors.append(pb_utils.Tensor("finish_reason", np.array([finish.encode()], dtype=object)))
        if self._count_input:
            count = self.input_tokens if self.started else 0
            tensors.append(pb_utils.Tensor("num_input_tokens", np.array([count], dtype=np.uint32)))
        if self._output_tokens:
            tensors.append(pb_utils.Tensor("num_output_tokens", np.array([tokens], dtype=np.uint32)))
        self._sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL if final else 0)

    def fail(self, error: EngineError) -> None:
        code = {"invalid_argument": pb_utils.TritonError.INVALID_ARG, "internal": pb_utils.TritonError.INTERNAL}.get(
            error.kind, pb_utils.TritonError.UNAVAILABLE
        )
        failure = pb_utils.TritonError(error.wire(), code)
        self._sender.send(pb_utils.InferenceResponse(error=failure), flags=FINAL)

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())
