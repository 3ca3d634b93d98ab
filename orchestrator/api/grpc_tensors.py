"""KServe v2's inference messages, their tensors raw or typed, -> the InferBody that HTTP's bodies are read into."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any

from orchestrator.api.fields import wrong
from orchestrator.api.grpc_messages import InferResponse
from orchestrator.api.kserve_tensors import MAX_NAME, NO_SHARED_MEMORY, InferBody, repeated, wanted
from orchestrator.domain import InferResult, Tensor
from orchestrator.errors import InvalidRequest, PermissionDenied, Text
from orchestrator.tensors import check, pack, unpack

Scalar = str | int | float | bool

ENABLE_FINAL = "triton_enable_empty_final_response"
# The field of typed contents that holds a datatype, and struct's letter of it. FP16 and BF16 travel raw only.
_TYPED = {
    "BOOL": ("bool_contents", "?"), "INT8": ("int_contents", "b"), "INT16": ("int_contents", "h"),
    "INT32": ("int_contents", "i"), "INT64": ("int64_contents", "q"), "UINT8": ("uint_contents", "B"),
    "UINT16": ("uint_contents", "H"), "UINT32": ("uint_contents", "I"), "UINT64": ("uint64_contents", "Q"),
    "FP32": ("fp32_contents", "f"), "FP64": ("fp64_contents", "d"), "BYTES": ("bytes_contents", ""),
}  # fmt: skip


def read(request: Any) -> InferBody:
    """A ModelInferRequest. Raises InvalidRequest, or PermissionDenied where it points into shared memory."""
    parameters = _parameters(request.parameters)
    parameters.pop(ENABLE_FINAL, None)  # every final response here has outputs: there is no empty one to ask for
    raw, rows = request.raw_input_contents, request.inputs
    if raw and len(raw) != len(rows):
        raise InvalidRequest(
            Text(
                f"raw_input_contents has {len(raw)} elements for {len(rows)} inputs.",
                f"raw_input_contents tiene {len(raw)} elementos para {len(rows)} entradas.",
            ),
            "raw_input_contents",
        )
    inputs: dict[str, Tensor] = {}
    for index, row in enumerate(rows):
        tensor = _input(row, raw[index] if raw else None)
        if tensor.name in inputs:
            raise repeated(tensor.name)
        inputs[tensor.name] = tensor
    outputs = tuple(
        wanted({"name": _name(row.name, "outputs"), "parameters": _parameters(row.parameters)}, True)
        for row in request.outputs
    )
    return InferBody(request.id or None, tuple(inputs.values()), outputs, True, parameters)


def write(result: InferResult, id: str) -> Any:
    """The whole answer as a ModelInferResponse, its tensors raw as Triton's are."""
    answer = InferResponse(model_name=result.model, model_version=result.version, id=id)
    fill(answer, result.outputs)
    return answer


def fill(answer: Any, tensors: Iterable[Tensor]) -> None:
    """Add tensors to a ModelInferResponse."""
    for tensor in tensors:
        answer.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        answer.raw_output_contents.append(pack(tensor))


def _parameters(given: Any) -> dict[str, Scalar]:
    found: dict[str, Scalar] = {}
    for name, value in given.items():
        kind = value.WhichOneof("parameter_choice")
        if kind is None:
            raise wrong(f"parameters.{name[:100]}", "set to a value", "un valor")
        found[name] = getattr(value, kind)
    return found


def _name(name: str, at: str) -> str:
    if not 0 < len(name) <= MAX_NAME:
        raise wrong(f"{at}[].name", f"a string of 1 to {MAX_NAME} characters", f"un texto de 1 a {MAX_NAME} caracteres")
    return name


def _input(row: Any, raw: bytes | None) -> Tensor:
    name, datatype, shape = _name(row.name, "inputs"), row.datatype, tuple(row.shape)
    if any(parameter.startswith("shared_memory") for parameter in row.parameters):
        raise PermissionDenied(NO_SHARED_MEMORY)
    if raw is not None:
        if row.HasField("contents"):
            raise InvalidRequest(
                Text(
                    f"contents field must not be specified when using raw_input_contents for '{name}'",
                    f"la entrada '{name}' no puede tener contents junto a raw_input_contents",
                ),
                "contents",
            )
        return unpack(name, datatype, shape, raw)
    field, letter = _TYPED.get(datatype, ("", ""))
    for given, _ in row.contents.ListFields():
        if given.name != field:
            raise InvalidRequest(
                Text(
                    f"unexpected explicit tensor data for input tensor '{name}': {given.name} is not for '{datatype}'",
                    f"datos inesperados en la entrada '{name}': {given.name} no corresponde a '{datatype}'",
                ),
                "contents",
            )
    values: Sequence[Any] = getattr(row.contents, field) if field else ()
    if datatype == "BYTES":
        tensor = Tensor(name, datatype, shape, elements=tuple(values))
    else:
        try:
            data = struct.pack(f"<{len(values)}{letter}", *values) if letter else b""
        except struct.error as error:
            raise wrong(f"the data of input '{name}'", f"values of {datatype}", f"valores de {datatype}") from error
        tensor = Tensor(name, datatype, shape, data)
    check(tensor)
    return tensor
