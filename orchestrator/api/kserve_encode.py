"""KServe v2's inference of our encoders, over HTTP and gRPC: tensors <-> EncodeRequest and its answer."""

from __future__ import annotations

from orchestrator.api import policy
from orchestrator.api.fields import MAX_TEXTS, boolean, required, too_many, unknown
from orchestrator.api.kserve_request import KSERVE, Asked, timeout_s
from orchestrator.api.kserve_tensors import InferBody
from orchestrator.domain import Encoded, EncodeRequest, InferResult, Model, Tensor
from orchestrator.encoding import OUTPUTS
from orchestrator.errors import InvalidRequest, Text

INPUT = "text_input"
# Of the request's own. As for a generation model, of KServe's only `timeout` means something.
PARAMETERS = ("truncate", "timeout_s", *KSERVE)
NEVER_SENT = ("heartbeat",)  # declared in the metadata, and taken from clients that ask for all of those


def request(body: InferBody, asked: Asked, model: Model, within_s: float | None) -> EncodeRequest:
    """`within_s` is a deadline that did not stand in the body; the nearest counts. Raises InvalidRequest."""
    for name in body.parameters:
        if name not in PARAMETERS:
            raise unknown(name, PARAMETERS)
    for wanted in body.outputs:
        if wanted.name not in (*OUTPUTS[model.operation], *NEVER_SENT) or wanted.classes:
            shown = wanted.name[:100]
            raise InvalidRequest(
                Text(
                    f"unexpected inference output '{shown}' for model '{model.name}'",
                    f"el modelo '{model.name}' no tiene la salida '{shown}' en esta forma",
                ),
                "outputs",
            )
    limits_s = [limit_s for limit_s in (within_s, timeout_s(dict(body.parameters))) if limit_s]
    return EncodeRequest(
        id=asked.id,
        model=model.name,
        accepted_at=asked.accepted_at,
        texts=_texts(body, model.name),
        operation=model.operation,
        truncate=boolean(dict(body.parameters), "truncate"),
        timeout_s=min(limits_s, default=None),
        task=policy.task(asked.headers, model.task),
        cache=policy.cache_policy(asked.headers),
        traceparent=asked.traceparent,
    )


def result(answer: Encoded, body: InferBody) -> InferResult:
    """The outputs that were asked for, all by default."""
    names = {wanted.name for wanted in body.outputs} or set(answer.outputs)
    tensors = tuple(tensor for name, tensor in answer.outputs.items() if name in names)
    return InferResult(answer.model.name, answer.model.version, tensors)


def _texts(body: InferBody, model: str) -> tuple[str, ...]:
    """The elements of the one input, BYTES of [texts, 1]."""
    for tensor in body.inputs:
        if tensor.name != INPUT:
            shown = tensor.name[:100]
            raise InvalidRequest(
                Text(
                    f"unexpected inference input '{shown}' for model '{model}'",
                    f"el modelo '{model}' no tiene la entrada '{shown}'",
                ),
                "inputs",
            )
    if not body.inputs:
        raise required(INPUT)
    (tensor,) = body.inputs
    if tensor.datatype != "BYTES":
        raise InvalidRequest(
            Text(
                f"inference input '{INPUT}' data-type is '{tensor.datatype}', but model '{model}' expects 'BYTES'",
                f"la entrada '{INPUT}' es de tipo '{tensor.datatype}', pero el modelo '{model}' espera 'BYTES'",
            ),
            INPUT,
        )
    if len(tensor.shape) != 2 or tensor.shape[1] != 1 or not tensor.shape[0]:
        shown = ",".join(map(str, tensor.shape))
        raise InvalidRequest(
            Text(
                f"unexpected shape for input '{INPUT}' for model '{model}'. Expected [n,1] of 1 and more texts, got "
                f"[{shown}].",
                f"forma inesperada de la entrada '{INPUT}' del modelo '{model}': se espera [n,1], con 1 o más textos, "
                f"no [{shown}].",
            ),
            INPUT,
        )
    if len(tensor.elements) > MAX_TEXTS:
        raise too_many(INPUT, len(tensor.elements))
    return tuple(_text(tensor, index) for index in range(len(tensor.elements)))


def _text(tensor: Tensor, index: int) -> str:
    at = f"{INPUT}[{index}]"
    try:
        text = tensor.elements[index].decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(Text(f"{at} is not valid UTF-8 text.", f"{at} no es texto UTF-8 válido."), at) from error
    if not text:
        raise InvalidRequest(Text(f"{at} must not be empty.", f"{at} no puede estar vacío."), at)
    return text
