"""The rule of a mask tells its window, however long that is, and what is no causal window is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import masking_utils as rules

from export.errors import UnsupportedModel
from export.masks import MaskRecorder


def window(rule: Callable[..., torch.Tensor], max_len: int) -> int | None:
    recorder = MaskRecorder("family", max_len)
    return recorder.window(recorder.build(1, 2, 2, rule))


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_a_sliding_window_is_read_from_its_rule(size: int, max_len: int) -> None:
    """The window that a model masks with comes out, and none where no sequence outgrows it."""
    found = window(rules.sliding_window_causal_mask_function(size), max_len)
    assert found == (size if size < max_len else None)


def test_causal_has_no_window() -> None:
    """A plain causal mask attends to everything before."""
    assert window(rules.causal_mask_function, 2048) is None


@pytest.mark.parametrize(
    "rule",
    [
        rules.bidirectional_mask_function,
        rules.chunked_causal_mask_function(64, torch.zeros(1, dtype=torch.long)),
        rules.or_masks(rules.causal_mask_function, lambda row, head, query, key: key < 4),
    ],
    ids=["both directions", "chunks", "a prefix"],
)
def test_other_patterns_are_refused(rule: Callable[..., torch.Tensor]) -> None:
    """Chunks, prefixes and both directions are seen, although two tokens would not show them."""
    with pytest.raises(UnsupportedModel, match="neither causal nor a causal sliding window"):
        window(rule, 300)


def test_chunks_longer_than_every_sequence_are_causal() -> None:
    """Attention in chunks of 64 is causal attention for sequences of at most 64 tokens."""
    assert window(rules.chunked_causal_mask_function(64, torch.zeros(1, dtype=torch.long)), 64) is None


def test_a_mask_that_the_model_changed_is_refused() -> None:
    """A bias added to the mask is noticed: its numbers are no longer the recorder's."""
    recorder = MaskRecorder("family", 64)
    mask = recorder.build(1, 2, 2, rules.causal_mask_function)
    with pytest.raises(UnsupportedModel, match="bias or mask of its own"):
        recorder.window(mask + torch.tensor([[0.0, -1.0]]))
