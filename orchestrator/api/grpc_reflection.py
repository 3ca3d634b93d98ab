"""gRPC's server reflection (grpc/doc/server-reflection.md), v1 and v1alpha, of the services declared here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from orchestrator.api.grpc_door import Door, Methods, Rpc, Stream, parse, soon
from orchestrator.api.grpc_schema import POOL, declare, message

PACKAGES = ("grpc.reflection.v1", "grpc.reflection.v1alpha")

for _package in PACKAGES:
    declare(
        f"truthgpt/{_package}.proto",
        _package,
        """
ServerReflectionRequest: string host 1, string message_request.file_by_filename 3,
    string message_request.file_containing_symbol 4, ExtensionRequest message_request.file_containing_extension 5,
    string message_request.all_extension_numbers_of_type 6, string message_request.list_services 7
ExtensionRequest: string containing_type 1, int32 extension_number 2
ServerReflectionResponse: string valid_host 1, ServerReflectionRequest original_request 2,
    FileDescriptorResponse message_response.file_descriptor_response 4,
    ExtensionNumberResponse message_response.all_extension_numbers_response 5,
    ListServiceResponse message_response.list_services_response 6, ErrorResponse message_response.error_response 7
FileDescriptorResponse: repeated bytes file_descriptor_proto 1
ExtensionNumberResponse: string base_type_name 1, repeated int32 extension_number 2
ListServiceResponse: repeated ServiceResponse service 1
ServiceResponse: string name 1
ErrorResponse: int32 error_code 1, string error_message 2
ServerReflection ! ServerReflectionInfo(stream ServerReflectionRequest) returns (stream ServerReflectionResponse)
""",
    )


def methods(services: Sequence[str]) -> Methods:
    """The handlers, which tell of these services and of themselves."""
    own = [f"{package}.ServerReflection" for package in PACKAGES]
    listed = sorted([*services, *own])
    return {
        f"{service}/ServerReflectionInfo": Stream(_Reflection(package, listed).tell, open=True)
        for service, package in zip(own, PACKAGES, strict=True)
    }


class _Reflection:
    def __init__(self, package: str, services: Sequence[str]) -> None:
        self._services = services
        self._request = message(f"{package}.ServerReflectionRequest")
        self._response = message(f"{package}.ServerReflectionResponse")

    async def tell(self, door: Door, rpc: Rpc, messages: AsyncIterator[bytes]) -> None:
        more = True
        while more:
            async with soon():
                more = await self._next(rpc, messages)

    async def _next(self, rpc: Rpc, messages: AsyncIterator[bytes]) -> bool:
        """Answer the next message; whether there was one."""
        raw = await anext(messages, None)
        if raw is None:
            return False
        request = parse(self._request, raw)
        response = self._response(valid_host=request.host, original_request=request)
        try:
            self._fill(request, response)
        except KeyError:
            response.error_response.error_code = grpc.StatusCode.NOT_FOUND.value[0]
            response.error_response.error_message = "It is not known here."
        await rpc.context.write(response.SerializeToString())
        return True

    def _fill(self, request: Any, response: Any) -> None:
        """Raises KeyError for what is not known; nothing here has extensions."""
        asked = request.WhichOneof("message_request")
        if asked == "list_services":
            for name in self._services:
                response.list_services_response.service.add(name=name)
        elif asked == "file_by_filename":
            _files(POOL.FindFileByName(request.file_by_filename), response)
        elif asked == "file_containing_symbol":
            _files(POOL.FindFileContainingSymbol(request.file_containing_symbol), response)
        elif asked == "all_extension_numbers_of_type":
            name = POOL.FindMessageTypeByName(request.all_extension_numbers_of_type).full_name
            response.all_extension_numbers_response.base_type_name = name
        else:
            raise KeyError(asked)


def _files(file: Any, response: Any) -> None:
    """The file and what it needs, its types by their full names."""
    for needed in (file, *file.dependencies):
        proto = FileDescriptorProto()
        needed.CopyToProto(proto)
        response.file_descriptor_response.file_descriptor_proto.append(proto.SerializeToString())
