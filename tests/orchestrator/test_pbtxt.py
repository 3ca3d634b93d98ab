"""The reader of protobuf's text format, against protobuf's own."""

from __future__ import annotations

import json

import pytest
from google.protobuf import json_format, text_format
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


@pytest.mark.parametrize(
    "source",
    [
        CONFIG.format(name="demo") + 'parameters { key: "slots" value { string_value: "4" } }',
        """name: "e" max_batch_size: 64
        dynamic_batching { preferred_batch_size: [8, 16] preferred_batch_size: 32 max_queue_delay_microseconds: 1000
          default_queue_policy { max_queue_size: 256 timeout_action: REJECT }
          priority_queue_policy { key: 1 value { max_queue_size: 2 allow_timeout_override: true } } }
        model_warmup { name: "w" batch_size: 1
          inputs { key: "t" value { data_type: TYPE_STRING dims: 1 zero_data: true } } }
        instance_group { count: 2 kind: KIND_GPU gpus: 0 }
        version_policy { latest { num_versions: 2 } }
        optimization { cuda { graphs: true graph_spec { batch_size: 1 input { key: "a" value { dim: [1, 2] } }
          graph_lower_bound { batch_size: 1 input { key: "a" value { dim: 1 } } } } }
          execution_accelerators { gpu_execution_accelerator { name: "tensorrt"
            parameters { key: "precision_mode" value: "FP16" } } } }
        metric_tags { key: "team" value: "a" } input { name: "x" data_type: TYPE_FP32 dims: 1 optional: 1 }""",
        """name: "s" sequence_batching { direct { minimum_slot_utilization: 0.5 } control_input { name: "START"
          control { kind: CONTROL_SEQUENCE_START int32_false_true: 0 int32_false_true: 1 } }
          state { input_name: "a" output_name: "b" data_type: TYPE_INT32 dims: -1 } }""",
        """name: "n" ensemble_scheduling { step { model_name: "a" model_version: -1
          input_map { key: "i" value: "j" } output_map { key: "o" value: "p" } } }""",
    ],
)
def test_a_config_for_triton_means_what_the_file_means(source: str) -> None:
    """As JSON, which Triton's load takes, the configuration is the message that protobuf reads from the text."""
    made = json_format.Parse(json.dumps(pbtxt.model_config(pbtxt.parse(source))), model_config_pb2.ModelConfig())
    assert made == text_format.Parse(source, model_config_pb2.ModelConfig())
