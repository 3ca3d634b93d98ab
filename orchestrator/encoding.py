"""What is asked of an encoder in parts and put together again, and the text by which its answer is shared and cached.

Flights and the cache hold texts: an encoder's answer is one chunk, whose text is its tensors in JSON, each as name,
datatype, shape and the base64 (RFC 4648) of its binary form (tensors.py).
"""

from __future__ import annotations

import math
import re
import struct
from base64 import b64decode, b64encode
from collections.abc import Sequence

import orjson

from orchestrator.domain import Chunk, Encoded, EncodeRequest, InferRequest, InferResult, Model, Tensor
from orchestrator.errors import InvalidRequest, Text, UpstreamError
from orchestrator.tensors import pack, unpack

INPUT = "text_input"
TOKENS = "num_input_tokens"
OUTPUTS = {"embed": ("embedding", TOKENS), "classify": ("scores", "label", TOKENS)}
_TOO_LONG = re.compile(r"text_input\[(\d{1,9})\] has (\d{1,18}) tokens; the model reads at most (\d{1,18})")
_PLACE = re.compile(r"text_input\[(\d{1,9})\]")


def parts(request: EncodeRequest, max_batch: int) -> list[InferRequest]:
    """What Triton is asked, at most `max_batch` texts at once."""
    outputs = dict.fromkeys(OUTPUTS[request.operation], 0)
    found = []
    for start in range(0, len(request.texts), max_batch):
        # text that is no valid Unicode, which off as a sanitising mode lets pass, reaches no model as something else
        elements = tuple(_utf8(text, start + at) for at, text in enumerate(request.texts[start : start + max_batch]))
        tensor = Tensor(INPUT, "BYTES", (len(elements), 1), elements=elements)
        found.append(
            InferRequest(
                id=request.id,
                model=request.model,
                accepted_at=request.accepted_at,
                inputs=(tensor,),
                outputs=outputs,
                parameters={"truncate": True} if request.truncate else {},
                timeout_s=request.timeout_s,
                traceparent=request.traceparent,
            )  # fmt: skip
        )
    return found


def together(request: EncodeRequest, model: Model, results: Sequence[InferResult]) -> Chunk:
    """The whole answer, from its parts in order. Raises UpstreamError where they are not as the model's entry says."""
    rows, tensors = len(request.texts), []
    by_name = [{tensor.name: tensor for tensor in result.outputs} for result in results]
    for name in OUTPUTS[request.operation]:
        own = [part[name] for part in by_name if name in part]
        kind, columns = _form(name, model)
        columns = columns or (own[0].shape[-1] if own and own[0].shape else 0)  # of an entry that does not say
        if [(one.datatype, one.shape[1:]) for one in own] != [(kind, (columns,))] * len(results):
            raise UpstreamError(f"the output {name} of {model.name} is not {kind} with {columns} columns")
        whole = Tensor(
            name, kind, (sum(one.shape[0] for one in own), columns), b"".join(one.data for one in own),
            tuple(element for one in own for element in one.elements),
        )  # fmt: skip
        if whole.shape[0] != rows:
            raise UpstreamError(f"the output {name} of {model.name} has {whole.shape[0]} rows for {rows} texts")
        if kind == "FP32" and not math.isfinite(sum(floats(whole.data))):  # NaN and infinities stay what they are
            raise UpstreamError(f"the output {name} of {model.name} is not finite")
        if name == "label" and not set(whole.elements) <= {label.encode() for label in model.labels}:
            raise UpstreamError(f"{model.name} answers with a label that is none of its own")
        tensors.append(whole)
    text = orjson.dumps([(t.name, t.datatype, t.shape, b64encode(pack(t)).decode()) for t in tensors]).decode()
    return Chunk(text, prompt_tokens=sum(_counts(tensors[-1])), finish_reason="stop")


def encoded(model: Model, chunk: Chunk) -> Encoded:
    """The answer that `together` has written. Raises UpstreamError where the cache has another."""
    try:
        rows = orjson.loads(chunk.text)
        found = [unpack(name, kind, tuple(shape), b64decode(data)) for name, kind, shape, data in rows]
    except (ValueError, TypeError, InvalidRequest) as error:
        raise UpstreamError("an encoder's answer cannot be read") from error
    return Encoded(model, {tensor.name: tensor for tensor in found}, chunk.prompt_tokens)


def floats(data: bytes) -> tuple[float, ...]:
    """The elements of an FP32 tensor."""
    return struct.unpack(f"<{len(data) // 4}f", data)


def placed(error: InvalidRequest, first: int) -> InvalidRequest:
    """What the model says of one text of a part whose first text is this one of the request."""
    text = error.text.en
    if found := _TOO_LONG.match(text):
        at, tokens, limit = int(found[1]) + first, found[2], found[3]
        return InvalidRequest(
            Text(
                f"{INPUT}[{at}] has {tokens} tokens; the model reads at most {limit}: shorten it or set truncate.",
                f"{INPUT}[{at}] tiene {tokens} tokens; el modelo lee {limit} como máximo: acórtelo o active truncate.",
            ),
            f"{INPUT}[{at}]",
        )
    if found := _PLACE.match(text):
        name = f"{INPUT}[{int(found[1]) + first}]"
        en, es = (name + text[found.end() :], f"{name}: el modelo rechazó el texto: {text[found.end() :].strip()}")
        return InvalidRequest(Text(en, es), name)
    return error


def _form(name: str, model: Model) -> tuple[str, int]:
    """Datatype and columns of an output; 0 for any number of them."""
    if name == "embedding":
        return "FP32", model.dim or 0
    if name == "scores":
        return "FP32", len(model.labels)
    return ("UINT32" if name == TOKENS else "BYTES"), 1


def _counts(tensor: Tensor) -> tuple[int, ...]:
    return struct.unpack(f"<{len(tensor.data) // 4}I", tensor.data)


def _utf8(text: str, at: int) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            Text(f"{INPUT}[{at}] is not valid Unicode text.", f"{INPUT}[{at}] no es texto Unicode válido."),
            f"{INPUT}[{at}]",
        ) from error
