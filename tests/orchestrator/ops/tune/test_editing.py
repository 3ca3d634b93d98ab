"""config.pbtxt with other values: what was asked for and nothing else, byte for byte."""

from __future__ import annotations

import difflib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import pbtxt
from orchestrator.ops.tune.editing import current, edited, expected
from orchestrator.ops.tune.errors import TuneError

DECODER = """# written by hand, α
name: "m"
backend: "inflight"
instance_group [ { kind: KIND_CPU count: 1 } ]
parameters { key: "slots" value: { string_value: "16" } }  # ours
parameters { key: "note" value: { string_value: "slots # \\"no\\" }" } }
"""
ENCODER = """name: "m", backend: 'encoder'; max_batch_size: 64
instance_group [
  { kind: KIND_CPU, count: 2 }
]
dynamic_batching {
  preferred_batch_size: [8, 16,
                         32] # sizes
  default_queue_policy < max_queue_size: 5 >
}
parameters [ { key: "threads" value { string_value: "" "0" } }, { key: "dim" value { string_value: "8" } } ]
"""
SLOTS, CHUNK, THREADS = ("parameters", "slots"), ("parameters", "prefill_chunk"), ("parameters", "threads")
DELAY = ("dynamic_batching", "max_queue_delay_microseconds")
PREFERRED = ("dynamic_batching", "preferred_batch_size")


def changed(before: str, after: str) -> list[tuple[str, str]]:
    """The pieces that differ, as (was, is)."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    return [(before[a:b], after[c:d]) for tag, a, b, c, d in matcher.get_opcodes() if tag != "equal"]


def test_a_value_is_replaced_where_it_stands() -> None:
    """Only the characters of the value differ: comments, order, odd spellings and other fields stay."""
    after = edited(DECODER, {SLOTS: "32"})
    assert after == DECODER.replace('string_value: "16"', 'string_value: "32"')
    values = {("max_batch_size",): "128", ("instance_group", "count"): "4", PREFERRED: "64,128", THREADS: "2"}
    after = edited(ENCODER, values)
    assert after == (
        ENCODER.replace("max_batch_size: 64", "max_batch_size: 128").replace("count: 2", "count: 4")
        .replace("[8, 16,\n                         32]", "[ 64, 128 ]").replace('"" "0"', '"2"')
    )  # fmt: skip


def test_a_value_that_is_not_there_is_added() -> None:
    """A parameter becomes a row behind the others, a field one in its message; a file without parameters gets some."""
    assert changed(DECODER, edited(DECODER, {THREADS: "2"})) == [
        ("", 'parameters { key: "threads" value: { string_value: "2" } }\n')
    ]
    after = edited(ENCODER, {DELAY: "500", CHUNK: "64"})
    assert "dynamic_batching { max_queue_delay_microseconds: 500\n" in after
    assert after.endswith('\nparameters { key: "prefill_chunk" value: { string_value: "64" } }\n')
    assert edited('name: "m"', {("max_batch_size",): "8"}) == 'name: "m"\nmax_batch_size: 8\n'
    assert edited("a: 1\r\n", {SLOTS: "4"}).endswith("}\r\n")


def test_of_several_the_one_that_counts_is_replaced() -> None:
    """As protobuf takes the last value of a field and of a key, that one is changed."""
    text = 'max_batch_size: 1 max_batch_size: 2 parameters { key: "slots" value { string_value: "1" } } ' + DECODER
    after = edited(text, {SLOTS: "9", ("max_batch_size",): "3"})
    assert after == text.replace("max_batch_size: 2", "max_batch_size: 3").replace('"16"', '"9"')


@pytest.mark.parametrize("text", [
    "preferred_batch_size: 8 preferred_batch_size: 16",  # a list in two fields
    "preferred_batch_size: [8] preferred_batch_size: [16]",
])  # fmt: skip
def test_what_cannot_be_edited_is_refused(text: str) -> None:
    """A file in which the result would be another than the wanted one is left alone, with what to do about it."""
    with pytest.raises(TuneError, match="written in a way") as refused:
        edited(f"dynamic_batching {{ {text} }}", {PREFERRED: "32"})
    assert "by hand" in refused.value.hint
    for bad in ("a: [1", "parameters { key: 'slots' value { } }", "name: 'm'"):
        with pytest.raises(TuneError):
            edited(bad, {SLOTS: "1", DELAY: "1"})


_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12)
_SPACE = st.sampled_from([" ", "\n", "\t", "  # a comment: { slots }\n", "\r\n"])


@st.composite
def files(draw: st.DrawFn) -> str:
    """Entries of parameters and messages in many spellings."""
    quoted = lambda text: '"' + re.sub(r'["\\]', r"\\\g<0>", text) + '"'  # noqa: E731
    parts = []
    for _ in range(draw(st.integers(0, 6))):
        key = draw(st.sampled_from(["slots", "threads", "other", "x y"]) | _TEXT)
        colon, comma = draw(st.sampled_from([":", " :", " "])), draw(st.sampled_from([" ", ", ", "; "]))
        value = quoted(draw(st.integers(0, 99).map(str) | _TEXT))
        row = f"{{ key: {quoted(key)}{comma}value{colon} {{ string_value: {value} }} }}"
        parts.append(draw(st.sampled_from([f"parameters {row}", f"parameters: {row}", f"parameters [ {row} ]"])))
        if draw(st.booleans()):
            parts.append(draw(st.sampled_from([
                "dynamic_batching { }", "dynamic_batching: < priority_levels: 2 >", "max_batch_size: 0x10",
                "instance_group [ { count: 1 } ]", "version_policy { all { } }", 'name: "a" \'b\'',
            ])))  # fmt: skip
    return "".join(part + draw(_SPACE) for part in parts)


@given(files(), st.integers(0, 99), st.integers(0, 99))
def test_any_file_has_the_wanted_values_and_no_other_change(text: str, slots: int, size: int) -> None:
    """However it is written, the parsed result differs in what was asked for, and every line without it stays."""
    values = {SLOTS: str(slots), ("max_batch_size",): str(size)}
    after = edited(text, values)
    assert pbtxt.model_config(pbtxt.parse(after)) == expected(pbtxt.model_config(pbtxt.parse(text)), values)
    assert edited(after, values) == after
    for was, now in changed(text, after):
        assert not was or re.fullmatch(r"[^#\n]*", was), "no comment and no line goes"
        assert "\n" not in was or "\n" in now


def test_current_values_are_read_with_their_defaults() -> None:
    """What is set, in the form in which it would be written, and the default for what is absent or empty."""
    config = pbtxt.model_config(pbtxt.parse(ENCODER))
    assert [current(config, place, "d") for place in (PREFERRED, DELAY, THREADS, SLOTS, ("max_batch_size",))] == [
        "8,16,32", "d", "0", "d", "64",
    ]  # fmt: skip
    assert current(config, ("instance_group", "count"), "1") == "2"
