"""What is asked of an encoder in parts and put together again, and the text by which its answer is shared and cached.

Flights and the cache hold texts: an encoder's answer is one chunk, whose text is lines of JSON. The first says which
version wrote it, its labels, and whether its vectors are normalised; each other one is a part's tensors, each as name,
datatype, shape and the base64 (RFC 4648) of its binary form (tensors.py). A large answer is megabytes: it is read and
written in pieces, between which others come to their turn.
"""

from __future__ import annotations

import asyncio
import math
import re
import struct
from base64 import b64decode, b64encode
from collections.abc import Sequence

import orjson

from orchestrator.domain import Chunk, Encoded, EncodeRequest, InferRequest, InferResult, Model, Tensor, changed
from orchestrator.errors import InvalidRequest, Text, UpstreamError
from orchestrator.tensors import pack, unpack

INPUT = "text_input"
TOKENS = "num_input_tokens"
OUTPUTS = {"embed": ("embedding", TOKENS), "classify": ("scores", "label", TOKENS)}
PIECE_BYTES = 1 << 18  # of numbers that are looked through at once: about a millisecond
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


async def require_finite(result: InferResult) -> None:
    """Raises UpstreamError for a number that is none."""
    for tensor in result.outputs:
        for at in range(0, len(tensor.data) if tensor.datatype == "FP32" else 0, PIECE_BYTES):
            if at:
                await asyncio.sleep(0)
            if not math.isfinite(sum(floats(tensor.data[at : at + PIECE_BYTES]))):  # a sum with one of them is one
                raise UpstreamError(f"the output {tensor.name} of {result.model} is not finite")


async def together(request: EncodeRequest, model: Model, results: Sequence[InferResult]) -> Chunk:
    """The whole answer, from its parts in order, all of the version that `model` describes.

    Raises UpstreamError where they are not as the model's entry says.
    """
    facts = {"version": model.version, "labels": model.labels, "normalized": model.normalized}
    lines, parts, columns = [orjson.dumps(facts).decode()], [], dict[str, int]()
    for result in results:
        if lines[1:]:
            await asyncio.sleep(0)
        tensors = _part(request, model, result, columns)
        parts.append(tensors)
        lines.append(
            orjson.dumps([(t.name, t.datatype, t.shape, b64encode(pack(t)).decode()) for t in tensors]).decode()
        )
    rows = sum(tensors[0].shape[0] for tensors in parts)
    if rows != len(request.texts):
        raise UpstreamError(f"{model.name} answers with {rows} rows for {len(request.texts)} texts")
    tokens = sum(sum(_counts(tensors[-1])) for tensors in parts)
    whole = Encoded(model, _joined(parts), tokens)
    return Chunk("\n".join(lines), prompt_tokens=tokens, finish_reason="stop", version=model.version, encoded=whole)


def _part(request: EncodeRequest, model: Model, result: InferResult, columns: dict[str, int]) -> list[Tensor]:
    """The outputs of one part. `columns` are those of an entry that does not say, as the first part has them."""
    by_name = {tensor.name: tensor for tensor in result.outputs}
    found: list[Tensor] = []
    for name in OUTPUTS[request.operation]:
        tensor, (kind, wanted) = by_name.get(name), _form(name, model)
        if tensor is not None and tensor.shape:
            wanted = wanted or columns.setdefault(name, tensor.shape[-1])
        if tensor is None or (tensor.datatype, tensor.shape[1:]) != (kind, (wanted,)):
            raise UpstreamError(f"the output {name} of {model.name} is not {kind} with {wanted} columns")
        if found and tensor.shape[0] != found[0].shape[0]:
            raise UpstreamError(
                f"the output {name} of {model.name} has {tensor.shape[0]} rows, not {found[0].shape[0]}"
            )
        if name == "label":
            _require_known(tensor, model)
        found.append(tensor)
    return found


def _require_known(tensor: Tensor, model: Model) -> None:
    if not set(tensor.elements) <= {label.encode() for label in model.labels}:
        raise UpstreamError(f"{model.name} answers with a label that is none of its own")


def _joined(parts: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """Each output whole."""
    if len(parts) == 1:
        return {tensor.name: tensor for tensor in parts[0]}
    return {
        own[0].name: Tensor(
            own[0].name, own[0].datatype, (sum(one.shape[0] for one in own), *own[0].shape[1:]),
            b"".join(one.data for one in own), tuple(element for one in own for element in one.elements),
        )
        for own in zip(*parts, strict=True)
    }  # fmt: skip


async def encoded(model: Model, chunk: Chunk) -> Encoded:
    """The answer that `together` has written, with the model as it was then.

    Raises UpstreamError where the cache has another.
    """
    if chunk.encoded is not None:
        return chunk.encoded
    try:
        first, *lines = chunk.text.split("\n")
        facts, parts = orjson.loads(first), list[list[Tensor]]()
        for line in lines:
            if parts:
                await asyncio.sleep(0)
            parts.append(
                [unpack(name, kind, tuple(shape), b64decode(data)) for name, kind, shape, data in orjson.loads(line)]
            )
        outputs = _joined(parts)
        version, labels, normalized = facts["version"], tuple(map(str, facts["labels"])), bool(facts["normalized"])
        of = changed(model, version=version, labels=labels, normalized=normalized)
        if "embedding" in outputs:
            of = changed(of, dim=outputs["embedding"].shape[1])
        if "scores" in outputs:
            if outputs["scores"].shape[1:] != (len(labels),):
                raise ValueError("scores without labels")
            _require_known(outputs["label"], of)
    except (ValueError, TypeError, LookupError, InvalidRequest) as error:
        raise UpstreamError("an encoder's answer cannot be read") from error
    return Encoded(of, outputs, chunk.prompt_tokens)


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
