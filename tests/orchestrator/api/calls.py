"""gRPC requests as Triton's own client sends them, and a stub of its service."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc


def raw(*elements: str) -> bytes:
    """BYTES elements in their binary form."""
    return b"".join(struct.pack("<I", len(element.encode())) + element.encode() for element in elements)


def ask(
    text: str = "Hola", model: str = "m", id: str = "", stream: bool = False, version: str = "", **sampling: Any
) -> pb.ModelInferRequest:
    """A request to a generation model."""
    request = pb.ModelInferRequest(model_name=model, model_version=version, id=id)
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(raw(text))
    if sampling:
        request.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1])
        request.raw_input_contents.append(raw(json.dumps(sampling)))
    if stream:
        request.inputs.add(name="stream", datatype="BOOL", shape=[1])
        request.raw_input_contents.append(b"\1")
    return request


def number(model: str = "plain") -> pb.ModelInferRequest:
    """A request to a model that does not generate."""
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name="x", datatype="INT32", shape=[1])
    request.raw_input_contents.append(struct.pack("<i", 1))
    return request


def rows(model: str, *given: str, **parameters: bool) -> pb.ModelInferRequest:
    """A request to an encoder."""
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name="text_input", datatype="BYTES", shape=[len(given), 1])
    request.raw_input_contents.append(raw(*given))
    for name, value in parameters.items():
        request.parameters[name].bool_param = value
    return request


def texts(response: Any) -> list[str]:
    """The elements of a response's text_output."""
    at = [output.name for output in response.outputs].index("text_output")
    data, found = response.raw_output_contents[at], []
    while data:
        (length,) = struct.unpack_from("<I", data)
        found.append(data[4 : 4 + length].decode())
        data = data[4 + length :]
    return found


@asynccontextmanager
async def stub(address: str) -> AsyncIterator[Any]:
    """Triton's own stub of the service, on a connection of its own."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


async def told(call: Any) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Status, details and trailing metadata of a call that has been made."""
    return await call.code(), await call.details(), dict(tuple(pair) for pair in await call.trailing_metadata())
