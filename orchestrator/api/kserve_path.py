"""What both KServe edges do between the wire and the gateway: find the model, decide what is asked of it, collect."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

from orchestrator.api import kserve_encode, kserve_request, policy
from orchestrator.api.fields import Defaults
from orchestrator.api.kserve_request import Asked, Call
from orchestrator.api.kserve_tensors import InferBody
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
        whole = replace(whole, text=call.prefix + whole.text)
        return InferResult(model.name, model.version, tuple(tensors(call.outputs, whole)))
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
    parts, usage, reason = [], Usage(), None
    async for chunk in chunks:
        parts.append(chunk.text)
        usage.add(chunk)
        reason = chunk.finish_reason
        if reason is not None:
            return Chunk("".join(parts), usage.completion_tokens, usage.prompt_tokens, reason)
    raise UpstreamError("the answer has no end")


def tensors(outputs: frozenset[str], chunk: Chunk) -> list[Tensor]:
    """The outputs that were asked for, each of one element."""
    every = (
        Tensor("text_output", "BYTES", (1,), elements=(chunk.text.encode(),)),
        Tensor("finish_reason", "BYTES", (1,), elements=((chunk.finish_reason or "").encode(),)),
        Tensor("num_input_tokens", "UINT32", (1,), _UINT32(chunk.prompt_tokens)),
        Tensor("num_output_tokens", "UINT32", (1,), _UINT32(chunk.tokens)),
    )
    return [tensor for tensor in every if tensor.name in outputs]
