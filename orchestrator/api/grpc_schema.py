"""Protocol buffers messages from a few lines of text, in a descriptor pool of our own.

Generated code lives in the process's one default pool, where two copies of a file (ours and a client library's) are an
error; a private pool knows nobody. The text has a line a type, indented lines go on:

    Outer.Inner: string name 1, repeated int64 shape 2, map<string,Value> values 3, bool choice.flag 4
    Outer.Kind = ZERO 0, ONE 1
    Outer ! Method(Request) returns (stream Reply)

The first is a message (`choice.` puts a field into the oneof `choice`), the second an enum, the third a service's
method. A type is looked up as protoc does it: inside out, from where it is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

POOL = descriptor_pool.DescriptorPool()

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {name.removeprefix("TYPE_").lower(): number for name, number in _Field.Type.items()}
_MAP = re.compile(r"map<(\w+),([\w.]+)>$")
_METHOD = re.compile(r"(\w+)\((stream )?([\w.]+)\) returns \((stream )?([\w.]+)\)$")


_declared: list[tuple[str, str]] = []  # package and file


def declare(file: str, package: str, text: str) -> None:
    """Add a file to the pool; it may use the types of all files of its package that were declared before."""
    proto = descriptor_pb2.FileDescriptorProto(name=file, package=package, syntax="proto3")
    proto.dependency.extend(name for of, name in _declared if of == package)
    messages: dict[str, Any] = {}
    services: dict[str, Any] = {}
    for line in _lines(text):
        name, sign, rest = re.split(r"\s*([:=!])\s*", line, maxsplit=1)
        outer, _, own = name.rpartition(".")
        items = rest.split(", ") if rest else []
        if sign == "!":
            if name not in services:
                services[name] = proto.service.add(name=name)
            _method(services[name], rest)
        elif sign == "=":
            values = (messages[outer] if outer else proto).enum_type.add(name=own).value
            for value, number in map(str.split, items):
                values.add(name=value, number=int(number))
        else:
            messages[name] = (messages[outer].nested_type if outer else proto.message_type).add(name=own)
            for item in items:
                _field(messages[name], item)
    POOL.AddSerializedFile(proto.SerializeToString())
    _declared.append((package, file))


def message(name: str) -> Any:
    """The class of a declared message, by its full name."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))


def _lines(text: str) -> Iterator[str]:
    return iter(re.sub(r"\n\s+", " ", text.strip()).split("\n"))


def _field(owner: Any, item: str) -> None:
    *repeated, kind, name, number = item.split()
    choice, _, name = name.rpartition(".")
    field = owner.field.add(name=name, number=int(number))
    field.label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
    if of_map := _MAP.match(kind):
        entry = owner.nested_type.add(name=name.title().replace("_", "") + "Entry")
        entry.options.map_entry = True
        for part, (inner, at) in zip(of_map.groups(), (("key", 1), ("value", 2)), strict=True):
            _type(entry.field.add(name=inner, number=at, label=_Field.LABEL_OPTIONAL), part)
        field.label = _Field.LABEL_REPEATED
        kind = entry.name
    _type(field, kind)
    if choice:
        names = [one.name for one in owner.oneof_decl]
        if choice not in names:
            owner.oneof_decl.add(name=choice)
            names.append(choice)
        field.oneof_index = names.index(choice)


def _type(field: Any, kind: str) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type_name = kind


def _method(service: Any, text: str) -> None:
    found = _METHOD.match(text)
    if found is None:
        raise ValueError(f"no method: {text}")
    name, client, request, server, reply = found.groups()
    service.method.add(
        name=name, input_type=request, output_type=reply, client_streaming=bool(client), server_streaming=bool(server)
    )
