"""Triton's side of a request: its tensors and parameters read, its responses written."""

from __future__ import annotations

import json
from collections.abc import Sequence as Ids
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from .answer import Part
from .errors import EngineError, InvalidArgument

FLAGS = (
    "stream",
    "exclude_input_in_output",
    "return_finish_reason",
    "return_num_input_tokens",
    "return_num_output_tokens",
    "return_num_cached_tokens",
    "return_logprobs",
)
# Fields of a KServe request that Triton hands on among its parameters.
KSERVE = {"id", "priority", "timeout", "sequence_id", "sequence_start", "sequence_end", "binary_data_output"}
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


def merge(request: Any, given: dict[str, Any]) -> tuple[dict[str, bool], bytes]:
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
    raw = string(request, "sampling_parameters")
    if not scalars:
        return flags, raw or b""
    try:
        tensor_values = json.loads(raw or b"{}")
    except ValueError:
        return flags, raw or b""  # parse() reports it
    return flags, json.dumps({**scalars, **tensor_values}).encode() if isinstance(tensor_values, dict) else raw or b""


def string(request: Any, name: str) -> bytes | None:
    """The one element of a text tensor, None where the request has no such tensor."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    value = tensor.as_numpy().reshape(-1)[0]
    return value.encode() if isinstance(value, str) else bytes(value)


class Responder:
    """One request's response sender; see stream.Responder. `wants` are the outputs beside the text that it sends."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender
        self._wants: frozenset[str] = frozenset()
        self.input_tokens = 0  # known once the prompt is read
        self.started = False
        self.cached = 0

    def describe(self, wants: frozenset[str]) -> None:
        self._wants = wants

    def send(self, parts: Ids[Part], final: bool) -> None:
        self.started = self.started or final or any(part.text for part in parts)
        tensors = [_strings("text_output", [part.text for part in parts])]
        if "finish_reason" in self._wants:
            tensors.append(_strings("finish_reason", [part.finish for part in parts]))
        if "logprobs" in self._wants:
            tensors.append(_strings("logprobs", [part.logprobs for part in parts]))
        if "num_input_tokens" in self._wants:
            tensors.append(_counts("num_input_tokens", [self.input_tokens if self.started else 0]))
        if "num_cached_tokens" in self._wants:
            tensors.append(_counts("num_cached_tokens", [self.cached if self.started else 0]))
        if "num_output_tokens" in self._wants:
            tensors.append(_counts("num_output_tokens", [part.tokens for part in parts]))
        self._sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL if final else 0)

    def fail(self, error: EngineError) -> None:
        code = {"invalid_argument": pb_utils.TritonError.INVALID_ARG, "internal": pb_utils.TritonError.INTERNAL}.get(
            error.kind, pb_utils.TritonError.UNAVAILABLE
        )
        failure = pb_utils.TritonError(error.wire(), code)
        self._sender.send(pb_utils.InferenceResponse(error=failure), flags=FINAL)

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


def _strings(name: str, values: Ids[str]) -> Any:
    return pb_utils.Tensor(name, np.array([value.encode() for value in values], dtype=object))


def _counts(name: str, values: Ids[int]) -> Any:
    return pb_utils.Tensor(name, np.array(values, dtype=np.uint32))
