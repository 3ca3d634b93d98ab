"""The messages that we declare ourselves against those that Triton's own client was generated with."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorProto
from tritonclient.grpc import model_config_pb2, service_pb2

from orchestrator.api.grpc_messages import PACKAGE
from orchestrator.api.grpc_schema import POOL


def facts(messages: Any, path: str) -> dict[str, set[Any]]:
    """Each message's fields, with all that decides what is on the wire, and each enum's values."""
    found: dict[str, set[Any]] = {}
    for message in messages:
        own = f"{path}.{message.name}"
        oneofs = [choice.name for choice in message.oneof_decl]
        found[own] = {
            (f.name, f.number, f.type, f.type_name, f.label, oneofs[f.oneof_index] if f.HasField("oneof_index") else "")
            for f in message.field
        }
        found[own].add(message.options.map_entry)
        found |= {f"{own}.{enum.name}": {(v.name, v.number) for v in enum.value} for enum in message.enum_type}
        found |= facts(message.nested_type, own)
    return found


def of(descriptor: Any) -> FileDescriptorProto:
    proto = FileDescriptorProto()
    descriptor.CopyToProto(proto)
    return proto


def test_every_message_is_what_tritons_client_has() -> None:
    """Numbers, types, labels, oneofs, maps and enums of every message agree, and none is missing on either side."""
    ours = [of(POOL.FindFileByName(f"truthgpt/{name}.proto")) for name in ("model_config", "grpc_service")]
    theirs = [of(module.DESCRIPTOR) for module in (model_config_pb2, service_pb2)]
    for own, other in zip(ours, theirs, strict=True):
        assert facts(own.message_type, PACKAGE) == facts(other.message_type, PACKAGE)
        assert [(e.name, list(e.value)) for e in own.enum_type] == [(e.name, list(e.value)) for e in other.enum_type]


def test_every_method_is_what_tritons_client_has() -> None:
    """The service has the same methods, with the same messages and the same sides streaming."""
    ours, theirs = of(POOL.FindFileByName("truthgpt/grpc_service.proto")), of(service_pb2.DESCRIPTOR)
    (own,), (other,) = ours.service, theirs.service
    assert own.name == other.name

    def shape(method: Any) -> tuple[object, ...]:
        streams = (method.client_streaming, method.server_streaming)
        return method.name, method.input_type, method.output_type, *streams

    assert sorted(map(shape, own.method)) == sorted(map(shape, other.method))
