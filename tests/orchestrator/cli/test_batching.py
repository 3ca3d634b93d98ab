"""`truthgpt models show`: what each batching setting means, from files alone."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator import pbtxt
from orchestrator.cli.batching import settings, slot_bytes

GRAPH = {"caches": {"past_key_0": [12, 1024, 64], "past_value_0": [12, 1024, 64]}, "kv_dtype": "float16"}
DECODER = {"graph": GRAPH, "limits": {"max_len": 1024}}


def told(manifest: dict[str, Any], config: str = "", **parameters: str) -> dict[str, tuple[str, str]]:
    """setting -> (value, words)"""
    parsed = pbtxt.model_config(pbtxt.parse(config))
    return {each.name: (each.value, each.words) for each in settings(parsed, manifest, parameters)}


def test_a_slots_memory_is_that_of_its_caches() -> None:
    """Every cache's elements times their size; an older manifest says it by layers; 0 and unknown are told apart."""
    assert slot_bytes(DECODER) == 2 * 12 * 1024 * 64 * 2
    older = {"graph": {"layers": 3, "kv_heads": 2, "head_dim": 8, "max_len": 100}}
    assert slot_bytes(older) == 2 * 3 * 2 * 8 * 100 * 4
    assert slot_bytes({"graph": {**GRAPH, "kv_dtype": "int8"}}) == 2 * 12 * 1024 * 64
    assert slot_bytes({"graph": {"layers": 0, "kv_heads": 0, "head_dim": 0, "max_len": 9}}) == 0
    assert (
        slot_bytes({}) is slot_bytes({"graph": {"layers": 1}}) is slot_bytes({"graph": {**GRAPH, "caches": 7}}) is None
    )


def test_a_decoders_settings_have_their_defaults() -> None:
    """What config.pbtxt leaves empty is shown as the backend takes it, and what an older export lacks is not shown."""
    shown = told(DECODER, slots="", threads="2")
    assert {name: value for name, (value, _) in shown.items()} == {
        "slots": "16", "prefill_chunk": "128", "max_queue": "256", "threads": "2", "default_max_tokens": "",
    }  # fmt: skip
    assert "50.3 MB when all are full, 3.15 MB each" in shown["slots"][1]
    assert shown["default_max_tokens"][1].endswith("leaves of 1024")
    assert "does not say" in told(DECODER, default_max_tokens="64")["default_max_tokens"][1]


@pytest.mark.parametrize(
    ("parameter", "value", "words"),
    [
        ("prefix_reuse", "true", "not read again"),
        ("prefix_reuse", "false", "read from its beginning"),
        ("speculation", "auto", "guessed"),
        ("speculation", "off", "one token a step"),
        ("token_target_ms", "40", "fewer tokens of prompts"),
        ("token_target_ms", "0", "no target"),
    ],
)
def test_newer_settings_are_told_where_they_are(parameter: str, value: str, words: str) -> None:
    """Each value has its meaning."""
    shown = told(DECODER, **{parameter: value})
    assert shown[parameter][0] == value and words in shown[parameter][1]


def test_a_prefix_cache_without_memory_is_none() -> None:
    """With 0 MiB every prompt is read whole, whatever prefix_reuse says."""
    shown = told(DECODER, prefix_reuse="true", prefix_cache_mb="0")
    assert "read from its beginning" in shown["prefix_reuse"][1] and shown["prefix_cache_mb"][0] == "0"


def test_nonsense_in_a_file_is_shown_and_breaks_nothing() -> None:
    """A value that the backend will refuse stands there as it is."""
    assert told({"graph": [], "limits": 3}, slots="many")["slots"][0] == "many"


def test_an_encoders_dynamic_batching() -> None:
    """Triton's own names, with times in milliseconds and seconds."""
    shown = told(
        {"embedding": {}},
        """max_batch_size: 64 instance_group [ { kind: KIND_CPU count: 2 } ]
        dynamic_batching { preferred_batch_size: [ 8, 16 ] max_queue_delay_microseconds: 100
        default_queue_policy { default_timeout_microseconds: 30000000 max_queue_size: 256 } }""",
        max_tokens_per_batch="16384",
    )
    assert {name: value for name, (value, _) in shown.items()} == {
        "max_batch_size": "64", "preferred_batch_size": "8, 16", "max_queue_delay_microseconds": "100",
        "max_queue_size": "256", "default_timeout_microseconds": "30000000", "max_tokens_per_batch": "16384",
        "instance_group": "2",
    }  # fmt: skip
    assert "0.1 ms" in shown["max_queue_delay_microseconds"][1] and "30 s" in shown["default_timeout_microseconds"][1]
    at_once = told({"classes": {}}, "max_batch_size: 8 dynamic_batching { }")
    assert "no text waits" in at_once["max_queue_delay_microseconds"][1]


def test_the_graph_of_another_entry_batches_for_nobody() -> None:
    """Nobody asks it by itself."""
    assert told({"graph_only": True, "embedding": {}}) == {}
