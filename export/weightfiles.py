"""What a weight file holds, learnt without reading the weights themselves."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from export.errors import DAMAGED, SourceError

# 8-bit floats are left out: they are quantised weights, whose scales live elsewhere.
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_MAX_HEADER = 100_000_000  # as in the reference implementation


@dataclass(frozen=True)
class Tensor:
    """Name, element count, type (in safetensors' spelling: F32, BF16, I8, …) and dimensions of a stored tensor."""

    name: str
    elements: int
    dtype: str
    dims: int

    @property
    def floating(self) -> bool:
        """Whether the type is one that weights are trained in."""
        return self.dtype in FLOATS


def safetensors_tensors(path: Path) -> Iterator[Tensor]:
    """The tensors of a safetensors file. Raises `SourceError` if its header or its length is wrong.

    Source: https://github.com/huggingface/safetensors#format: 8 bytes little-endian header length, JSON, data.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER, size):
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        found = []
        end = 0
        for name, entry in header.items():
            if name != "__metadata__":
                shape = [int(size) for size in entry["shape"]]
                found.append(Tensor(name, math.prod(shape), str(entry["dtype"]), len(shape)))
                end = max(end, int(entry["data_offsets"][1]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error) as error:
        raise SourceError(f"The weight file {path.name} is damaged.", DAMAGED) from error
    if size != 8 + length + end:
        raise SourceError(
            f"The weight file {path.name} is damaged: it has {size} bytes, its header speaks of {8 + length + end}.",
            DAMAGED,
        )
    yield from found


def pickled_tensors(path: Path) -> Iterator[Tensor]:
    """The tensors of a ``torch.save`` file, opened by torch's restricted unpickler (``weights_only``), without data.

    Raises:
        SourceError: damaged, or it holds something other than tensors: nothing of it has been run.
    """
    import torch

    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

    def kind(tensor: torch.Tensor) -> str:
        return names.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))

    try:
        state = torch.load(path, map_location="meta", weights_only=True)
        found = [
            Tensor(str(name), tensor.numel(), kind(tensor), tensor.dim())
            for name, tensor in state.items()
            if isinstance(tensor, torch.Tensor)
        ]
    except Exception as error:
        raise SourceError(
            f"The weight file {path.name} is damaged or holds more than weights, and was not opened further.",
            "A pickle that needs more could run code: convert the checkpoint to safetensors where you trust it.",
        ) from error
    yield from found
