"""What both KServe edges do between the wire and the gateway: find the model, decide what is asked of it, collect."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from orchestrator.api import kserve_encode, kserve_request, policy
from orchestrator.api.fields import Defaults
from orchestrator.api.kserve_request import Asked, Call
from orchestrator.api.kserve_tensors import InferBody
from orchestrator.choices import Choice, merged
from orchestrator.domain import Chunk, InferRequest, InferResult, Model, Tensor, Usage
from orchestrator.errors import ModelNotFound, Text, UpstreamError
from orchestrator.gateway import Gateway

# Triton's names of what is offered at every KServe edge.
EXTENSIONS = (
    "classification", "schedule_policy", "model_configuration", "binary_tensor_data", "parameters", "statistics",
)  # fmt: skip
ADMIN_ONLY = Text(
    "Model control, trace, log and shared-memory settings are offered on the admin port only, with an admin key.",
    "El control de modelos y los ajustes de trazas, registro y memoria compartida solo se ofrecen en el puerto de "
    "administración, con una clave de administrador.",
)
_UINT32 = struct.Struct("<I").pack
NUMBERS = ("num_input_tokens", "num_output_tokens", "num_cached_tokens")


async def find(gateway: Gateway, name: str, version: str | None) -> Model:
    """The served model. Raises ModelNotFound also when another version of it is served."""
    model = await gateway.find(name)
    if version and model.version and version != model.version:
        raise ModelNotFound(name, version)
    return model


def generation(
    body: InferBody, asked: Asked, model: Model, defaults: Defaults, within_s: float | None = None
) -> Call | None:
    """What an inference request asks of a generation model, None for another one. Raises InvalidRequest.

    `within_s` is a deadline that did not stand in the body; the nearest counts.
    """
    # Of a model that does not answer it may not be known yet what it is: 503 then, for whatever it is.
    if not model.generates or not (model.ready or any(map(_is_prompt, body.inputs))):
        return None
    call = kserve_request.infer(body, asked, model, defaults)
    if within_s is None:
        return call
    nearest_s = min(within_s, call.request.timeout_s or within_s)
    return replace(call, request=replace(call.request, timeout_s=nearest_s))


async def infer(
    gateway: Gateway, body: InferBody, asked: Asked, model: Model, call: Call | None, within_s: float | None = None
) -> InferResult:
    """The whole answer: of a generation model, whose `call` is given, collected. Raises TruthGPTError."""
    if model.operation in ("embed", "classify"):
        request = kserve_encode.request(body, asked, model, within_s)
        return kserve_encode.result(await gateway.encode(asked.caller, request, asked.notes), body)
    if call is not None:
        whole = await collect(gateway, asked, call)
        return InferResult(model.name, model.version, tuple(Shown(call).tensors(whole)))
    plain = InferRequest(
        id=asked.id,
        model=model.name,
        accepted_at=asked.accepted_at,
        inputs=body.inputs,
        outputs={wanted.name: wanted.classes for wanted in body.outputs},
        parameters=body.parameters,
        timeout_s=within_s,
        task=policy.task(asked.headers, model.task),
        cache=policy.cache_policy(asked.headers),
        traceparent=asked.traceparent,
    )
    return await gateway.infer(asked.caller, plain, asked.notes)


def _is_prompt(tensor: Tensor) -> bool:
    return tensor.name == "text_input" and len(tensor.elements) == 1


async def collect(gateway: Gateway, asked: Asked, call: Call) -> Chunk:
    """The whole answer as one chunk."""
    async with aclosing(gateway.generate(asked.caller, call.request, asked.notes)) as chunks:
        return await joined(chunks)


async def joined(chunks: AsyncIterator[Chunk]) -> Chunk:
    """All of an answer's chunks as one."""
    parts, pieces, usage, reason = [], list[Choice](), Usage(), None
    async for chunk in chunks:
        parts.append(chunk.text)
        pieces += chunk.choices
        usage.add(chunk)
        reason = chunk.finish_reason
        if reason is not None:
            return Chunk(
                "".join(parts), usage.completion_tokens, usage.prompt_tokens, reason, choices=merged(pieces),
                cached_tokens=usage.cached_tokens,
            )  # fmt: skip
    raise UpstreamError("the answer has no end")


class Shown:
    """One answer's chunks as Triton has them: an element of each output for each of the answers that are wanted."""

    def __init__(self, call: Call) -> None:
        self._asked, self._n = call.outputs, call.request.n
        self._plain = call.request.plain
        self._prompt_tokens = self._cached_tokens = 0
        self._prefixes = dict.fromkeys(range(self._n), call.prefix) if call.prefix else {}

    def outputs(self, chunk: Chunk) -> dict[str, list[Any]]:
        """The elements of each output that was asked for, of the next chunk. The prompt, where it was asked for, stands
        in front of each answer's first text; what was told of it once is told again.
        """
        self._prompt_tokens = self._prompt_tokens or chunk.prompt_tokens
        self._cached_tokens = chunk.cached_tokens or self._cached_tokens
        asked = self._asked
        if self._plain:
            given = [Choice(0, chunk.text, chunk.tokens, chunk.finish_reason)]
        else:
            given = [Choice(index, "") for index in range(self._n)]
            for choice in chunk.choices:
                given[choice.index] = choice
        found: dict[str, list[Any]] = {}
        if "text_output" in asked:
            found["text_output"] = [self._text(choice) for choice in given]
        if "finish_reason" in asked:
            found["finish_reason"] = [choice.finish_reason or "" for choice in given]
        if "logprobs" in asked:
            found["logprobs"] = [choice.logprobs or "[]" for choice in given]
        if "num_input_tokens" in asked:
            found["num_input_tokens"] = [self._prompt_tokens]
        if "num_output_tokens" in asked:
            found["num_output_tokens"] = [choice.tokens for choice in given]
        if "num_cached_tokens" in asked:
            found["num_cached_tokens"] = [self._cached_tokens]
        return found

    def tensors(self, chunk: Chunk) -> list[Tensor]:
        """The same as tensors."""
        return [_tensor(name, values) for name, values in self.outputs(chunk).items()]

    def _text(self, choice: Choice) -> str:
        if self._prefixes and (choice.text or choice.finish_reason):
            return self._prefixes.pop(choice.index, "") + choice.text
        return choice.text


def _tensor(name: str, values: list[Any]) -> Tensor:
    if name in NUMBERS:
        return Tensor(name, "UINT32", (len(values),), b"".join(map(_UINT32, values)))
    return Tensor(name, "BYTES", (len(values),), elements=tuple(value.encode() for value in values))
