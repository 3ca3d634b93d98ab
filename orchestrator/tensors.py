"""KServe v2's datatypes, and its binary form of a tensor: little-endian elements, BYTES ones with their lengths."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

from orchestrator.domain import Tensor
from orchestrator.errors import InvalidRequest, Text

# Bytes of one element. BYTES has none: each of its elements has its own length.
SIZES = {
    "BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8,
    "FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8,
}  # fmt: skip
MAX_DIMS = 32
_LENGTH = struct.Struct("<I")


def count(shape: Sequence[int]) -> int:
    """Elements of a tensor of this shape; 1 for a scalar's empty shape."""
    return math.prod(shape)


def pack(tensor: Tensor) -> bytes:
    """The binary form. In BYTES each element is its length, 4 bytes little-endian, and itself."""
    if tensor.datatype != "BYTES":
        return tensor.data
    return b"".join(part for element in tensor.elements for part in (_LENGTH.pack(len(element)), element))


def unpack(name: str, datatype: str, shape: tuple[int, ...], raw: bytes) -> Tensor:
    """The tensor of a binary form. Raises InvalidRequest when the bytes do not fit the datatype and shape."""
    if datatype != "BYTES":
        tensor = Tensor(name, datatype, shape, raw)
    else:
        elements, at, end = [], 0, len(raw)
        while at < end:
            start = at + _LENGTH.size
            length = _LENGTH.unpack_from(raw, at)[0] if start <= end else end
            at = start + length
            if at > end:
                raise InvalidRequest(
                    Text(
                        f"input '{name}': the length of an element goes beyond the end of its data.",
                        f"entrada '{name}': la longitud de un elemento rebasa el final de sus datos.",
                    ),
                    name,
                )
            elements.append(raw[start:at])
        tensor = Tensor(name, datatype, shape, elements=tuple(elements))
    check(tensor)
    return tensor


def check(tensor: Tensor) -> None:
    """Raises InvalidRequest unless the datatype is known, the shape possible, and the data as much as both say."""
    name, shape = tensor.name, tensor.shape
    if tensor.datatype != "BYTES" and tensor.datatype not in SIZES:
        raise InvalidRequest(
            Text(f"invalid datatype for input '{name}'.", f"entrada '{name}': tipo de dato desconocido."), name
        )
    if len(shape) > MAX_DIMS or any(size < 0 for size in shape):
        raise InvalidRequest(
            Text(
                f"input '{name}': the shape must be at most {MAX_DIMS} sizes of 0 and more.",
                f"entrada '{name}': la forma debe tener como máximo {MAX_DIMS} tamaños de 0 en adelante.",
            ),
            name,
        )
    wanted = count(shape)  # not before: a product of very many sizes takes for ever
    if tensor.datatype == "BYTES":
        unit, have = ("elements", "elementos"), len(tensor.elements)
    else:
        unit, have, wanted = ("bytes", "bytes"), len(tensor.data), wanted * SIZES[tensor.datatype]
    if have != wanted:
        shown = wanted if wanted < 2**63 else "2^63"
        raise InvalidRequest(
            Text(
                f"input '{name}': its shape and datatype need {shown} {unit[0]}, there are {have}.",
                f"entrada '{name}': su forma y su tipo requieren {shown} {unit[1]}; hay {have}.",
            ),
            name,
        )
