"""KServe v2's inference bodies: JSON tensors, and binary ones behind their JSON (Triton's binary tensor extension)."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.api.bodies import json_object
from orchestrator.api.fields import is_int, required, unknown, wrong
from orchestrator.domain import Tensor
from orchestrator.errors import InvalidRequest, PermissionDenied, Text
from orchestrator.tensors import SIZES, check, count, pack, unpack

HEADER_LENGTH = b"inference-header-content-length"
# struct's letter of each datatype that JSON can hold; Triton takes FP16 and BF16 in binary only
_LETTERS = {
    "BOOL": "?", "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q", "INT8": "b", "INT16": "h", "INT32": "i",
    "INT64": "q", "FP32": "f", "FP64": "d",
}  # fmt: skip
_MAX_NESTING = 32
MAX_NAME = 256
BODY = {"id", "model_name", "model_version", "parameters", "inputs", "outputs"}
INPUT = {"name", "datatype", "shape", "parameters", "data"}
NO_SHARED_MEMORY = Text(
    "Shared memory is offered on the admin port only.",
    "La memoria compartida solo se ofrece en el puerto de administración.",
)


@dataclass(frozen=True)
class Wanted:
    """One output that was asked for. `classes` above 0: that many top classes in place of the tensor."""

    name: str
    binary: bool
    classes: int = 0


@dataclass(frozen=True)
class InferBody:
    """A parsed body. No `outputs` means all of them, binary or not by `binary`."""

    id: str | None
    inputs: tuple[Tensor, ...]
    outputs: tuple[Wanted, ...]
    binary: bool
    parameters: dict[str, str | int | float | bool]


def read(body: bytes, headers: Mapping[bytes, bytes]) -> InferBody:
    """An inference request. Raises InvalidRequest, or PermissionDenied where it points into shared memory."""
    length = _json_length(headers, len(body))
    fields = json_object(body[:length])
    for name in fields:
        if name not in BODY:
            raise unknown(name, BODY)
    id = fields.get("id")
    if id is not None and not isinstance(id, str):
        raise wrong("id", "a string", "un texto")
    parameters = scalars(fields.get("parameters"))
    binary = parameters.pop("binary_data_output", False)
    if not isinstance(binary, bool):
        raise wrong("binary_data_output", "true or false", "true o false")
    if fields.get("inputs") is None:
        raise required("inputs")
    inputs: dict[str, Tensor] = {}
    at = length
    for row in _rows(fields, "inputs"):
        tensor, at = _input(row, body, at)
        if tensor.name in inputs:
            raise repeated(tensor.name)
        inputs[tensor.name] = tensor
    if at != len(body):
        raise InvalidRequest(
            Text(
                f"The inputs' binary data takes {at - length} bytes, the body has {len(body) - length}.",
                f"Los datos binarios de las entradas ocupan {at - length} bytes; el cuerpo tiene {len(body) - length}.",
            ),
            "binary_data_size",
        )
    outputs = tuple(wanted(row, binary) for row in _rows(fields, "outputs"))
    return InferBody(id, tuple(inputs.values()), outputs, binary, parameters)


def scalars(value: object) -> dict[str, str | int | float | bool]:
    """A `parameters` object. Raises InvalidRequest."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong("parameters", "an object", "un objeto")
    for name, item in value.items():
        if not isinstance(item, (str, int, float, bool)):
            raise wrong(f"parameters.{name}", "a string, a number, true or false", "un texto, un número, true o false")
    return dict(value)


def repeated(name: str) -> InvalidRequest:
    """The refusal of a second input of the same name."""
    return InvalidRequest(
        Text(f"input '{name}' already exists in request", f"la entrada '{name}' está repetida"), "inputs"
    )


def write(
    head: dict[str, object], tensors: Sequence[Tensor], binary: Callable[[str], bool]
) -> tuple[bytes, int | None]:
    """The body of an inference response, and the length of its JSON where binary data follows.

    Raises InvalidRequest for a tensor that JSON cannot hold: it has to be asked for as binary data.
    """
    rows, blobs = [], []
    for tensor in tensors:
        row: dict[str, object] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if binary(tensor.name):
            blobs.append(pack(tensor))
            row["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            row["data"] = _json_data(tensor)
        rows.append(row)
    encoded = json.dumps({**head, "outputs": rows}, ensure_ascii=False, separators=(",", ":")).encode()
    return b"".join([encoded, *blobs]), len(encoded) if blobs else None


def _json_length(headers: Mapping[bytes, bytes], size: int) -> int:
    given = headers.get(HEADER_LENGTH)
    if given is None:
        return size
    if not given.isdigit() or len(given) > 18 or int(given) > size:
        raise InvalidRequest(
            Text(
                f"Inference-Header-Content-Length must be a number of bytes from 0 to the body's {size}.",
                f"Inference-Header-Content-Length debe ser un número de bytes de 0 a los {size} del cuerpo.",
            )
        )
    return int(given)


def _rows(fields: dict[str, Any], name: str) -> list[dict[str, Any]]:
    rows = [] if fields.get(name) is None else fields[name]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise wrong(name, "a list of objects", "una lista de objetos")
    for row in rows:
        if not isinstance(row.get("name"), str) or not 0 < len(row["name"]) <= MAX_NAME:
            raise wrong(
                f"{name}[].name", f"a string of 1 to {MAX_NAME} characters", f"un texto de 1 a {MAX_NAME} caracteres"
            )
    return rows


def _input(row: dict[str, Any], body: bytes, at: int) -> tuple[Tensor, int]:
    """One input, whose binary data would begin at `at`, and where the next one's would."""
    name, datatype, shape = row["name"], row.get("datatype"), row.get("shape")
    for field in row:
        if field not in INPUT:
            raise unknown(field, INPUT)
    if not isinstance(datatype, str) or (datatype not in SIZES and datatype != "BYTES"):
        known = ", ".join([*SIZES, "BYTES"])
        raise InvalidRequest(
            Text(
                f"invalid datatype for input {name}: it must be one of {known}.",
                f"tipo de dato no válido en la entrada {name}: debe ser uno de {known}.",
            ),
            name,
        )
    if not isinstance(shape, list) or not all(is_int(size) for size in shape):
        raise wrong(f"the shape of input '{name}'", "a list of integers", "una lista de enteros")
    parameters = scalars(row.get("parameters"))
    if any(parameter.startswith("shared_memory") for parameter in parameters):
        raise PermissionDenied(NO_SHARED_MEMORY)
    size = parameters.get("binary_data_size")
    if size is None:
        tensor = _of_json(name, datatype, tuple(shape), row.get("data"))
        return tensor, at
    if "data" in row or not is_int(size) or not 0 <= size <= len(body) - at:  # type: ignore[operator]  # is_int
        raise InvalidRequest(
            Text(
                f"input '{name}': binary_data_size must be the number of its bytes behind the JSON, without data.",
                f"entrada '{name}': binary_data_size debe ser el número de sus bytes tras el JSON, sin data.",
            ),
            "binary_data_size",
        )
    end = at + int(size)
    return unpack(name, datatype, tuple(shape), body[at:end]), end


def wanted(row: Mapping[str, Any], binary: bool) -> Wanted:
    """An output as it is asked for. Raises InvalidRequest, or PermissionDenied where it is shared memory."""
    parameters = scalars(row.get("parameters"))
    if any(parameter.startswith("shared_memory") for parameter in parameters):
        raise PermissionDenied(NO_SHARED_MEMORY)
    own, classes = parameters.get("binary_data", binary), parameters.get("classification", 0)
    if not isinstance(own, bool):
        raise wrong("binary_data", "true or false", "true o false")
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 0:
        raise wrong("classification", "an integer of 0 and more", "un entero de 0 en adelante")
    return Wanted(row["name"], own, classes)


def _of_json(name: str, datatype: str, shape: tuple[int, ...], data: object) -> Tensor:
    shown = f"the data of input '{name}'"
    if not isinstance(data, list):
        raise wrong(shown, "a list", "una lista")
    flat = data
    for _ in range(_MAX_NESTING):
        if not any(isinstance(item, list) for item in flat):
            break
        flat = [one for item in flat for one in (item if isinstance(item, list) else (item,))]
    if datatype == "BYTES":
        if not all(isinstance(item, str) for item in flat):
            raise wrong(shown, "strings", "textos")
        tensor = Tensor(name, datatype, shape, elements=tuple(item.encode() for item in flat))
    else:
        letter = _LETTERS.get(datatype)
        if letter is None:
            raise InvalidRequest(
                Text(
                    f"receiving {datatype} data via JSON is not supported. Please use the binary data format for input "
                    f"{name}",
                    f"los datos {datatype} no se admiten en JSON: envíe la entrada {name} en formato binario",
                ),
                name,
            )
        kinds = {bool} if datatype == "BOOL" else {int, float} if datatype.startswith("FP") else {int}
        try:
            if not {type(item) for item in flat} <= kinds:
                raise ValueError
            raw = struct.pack(f"<{len(flat)}{letter}", *flat)
        except (struct.error, ValueError, OverflowError) as error:
            raise wrong(shown, f"values of {datatype}", f"valores de {datatype}") from error
        tensor = Tensor(name, datatype, shape, raw)
    check(tensor)
    return tensor


def _json_data(tensor: Tensor) -> list[Any]:
    try:
        if tensor.datatype == "BYTES":
            return [element.decode("utf-8") for element in tensor.elements]
        values = list(struct.unpack(f"<{count(tensor.shape)}{_LETTERS[tensor.datatype]}", tensor.data))
        if tensor.datatype.startswith("FP") and not all(map(math.isfinite, values)):
            raise ValueError
        return values
    except (KeyError, ValueError) as error:
        raise InvalidRequest(
            Text(
                f"JSON cannot hold the output '{tensor.name}': ask for it with binary_data.",
                f"JSON no puede contener la salida '{tensor.name}': pídala con binary_data.",
            ),
            tensor.name,
        ) from error
