"""The reader of protobuf's text format, against protobuf's own."""

from __future__ import annotations

import json

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from orchestrator import pbtxt
from tests.counting import CONFIG


def test_a_config_reads_as_it_is_written() -> None:
    """Strings, enums, numbers, lists and nested messages come out in order, repeated ones collected."""
    parsed = pbtxt.parse(
        """# comment
        name: "demo" max_batch_size: 0
        model_transaction_policy { decoupled: true }
        input [ { name: "a" dims: [1, -1] }, { name: 'b' dims: 2 dims: 3 } ];
        parameters: < key: "x", value: { string_value: "one" " two" } >
        f: 1.5e3 g: -0x10 kind: KIND_CPU"""
    )
    assert parsed == {
        "name": ["demo"],
        "max_batch_size": [0],
        "model_transaction_policy": [{"decoupled": [True]}],
        "input": [{"name": ["a"], "dims": [1, -1]}, {"name": ["b"], "dims": [2, 3]}],
        "parameters": [{"key": ["x"], "value": [{"string_value": ["one two"]}]}],
        "f": [1500.0],
        "g": [-16],
        "kind": ["KIND_CPU"],
    }
    assert isinstance(parsed["kind"][0], pbtxt.Name) and not isinstance(parsed["name"][0], pbtxt.Name)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("name: ", "line 1: expected a value"),
        ('a: 1\nb {\n c: "x', "line 3"),
        ("a: 1 }", "expected a field's name"),
        ("a [1", "expected ','"),
        ("a 1", "expected ':' or a message"),
        ('a: "\\q"', "unknown escape"),
        ('a: "\\377"', "not UTF-8"),
        ("a: -b", "expected a number"),
        ("@", "not understood"),
        ("a {" * 50, "nested"),
    ],
)
def test_nonsense_is_refused_with_its_line(source: str, what: str) -> None:
    """Whatever is not the format is a ValueError that says where."""
    with pytest.raises(ValueError, match="line [0-9]+") as caught:
        pbtxt.parse(source)
    assert what in str(caught.value)


@given(st.text())
def test_any_text_is_parsed_or_refused(source: str) -> None:
    """No text makes the reader fail in another way than ValueError."""
    try:
        pbtxt.parse(source)
    except ValueError as error:
        assert "line" in str(error)


@given(
    st.dictionaries(st.text(max_size=20), st.text(max_size=40), max_size=5),
    st.text(min_size=1, max_size=20),
    st.integers(0, 99),
)
def test_what_protobuf_writes_is_read_back(parameters: dict[str, str], name: str, size: int) -> None:
    """A ModelConfig written by protobuf's text_format, with any characters, is read with the same values."""
    config = model_config_pb2.ModelConfig(name=name, max_batch_size=size)
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    parsed = pbtxt.parse(text_format.MessageToString(config))
    assert parsed["name"] == [name] and parsed.get("max_batch_size", [0]) == [size]
    rows = {
        row["key"][0] if "key" in row else "": row["value"][0].get("string_value", [""])[0]
        for row in parsed.get("parameters", [])
    }
    assert rows == parameters


def test_our_own_config_means_the_same_to_protobuf() -> None:
    """The config.pbtxt of an entry gives the same tensors by this reader and by protobuf's."""
    source = CONFIG.format(name="demo")
    theirs = text_format.Parse(source, model_config_pb2.ModelConfig())
    ours = pbtxt.parse(source)
    assert [row["name"][0] for row in ours["input"]] == [tensor.name for tensor in theirs.input]
    assert [row["dims"] for row in ours["output"]] == [list(tensor.dims) for tensor in theirs.output]
    assert json.dumps(ours["backend"]) == json.dumps([theirs.backend])
