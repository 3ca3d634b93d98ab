from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.encoder.packing import RUN_COST, RUN_COST_OF_SKIPPING, bucket, by_bucket, pack

LENGTHS = st.lists(st.integers(1, 512), min_size=1, max_size=64)


def cost(lengths: list[int], batches: list[list[int]], run_cost: int) -> int:
    return sum(run_cost + len(batch) * max(lengths[i] for i in batch) for batch in batches)


@given(lengths=LENGTHS, max_tokens=st.integers(1, 4096))
def test_every_text_runs_once_and_within_the_budget(lengths, max_tokens):
    """Each index is in exactly one batch, and a batch of several rows has at most max_tokens tokens with padding."""
    batches = pack(lengths, max_tokens, RUN_COST)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=7), max_tokens=st.integers(1, 200))
def test_no_other_way_to_cut_is_cheaper(lengths, max_tokens):
    """Against every way to cut the sorted texts into batches within the budget: none costs less."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    ways = []
    for cuts in range(len(order)):
        for places in combinations(range(1, len(order)), cuts):
            edges = [0, *places, len(order)]
            way = [order[a:b] for a, b in zip(edges, edges[1:], strict=False)]
            if all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= max_tokens for b in way):
                ways.append(cost(lengths, way, RUN_COST))
    assert cost(lengths, pack(lengths, max_tokens, RUN_COST), RUN_COST) == min(ways)


def test_short_texts_do_not_pay_for_a_long_neighbour():
    """A text of 500 tokens runs alone beside short ones, which run together."""
    assert pack([5, 500, 6, 7], 16_384, RUN_COST) == [[1], [3, 2, 0]]
    assert pack([5, 500, 6, 7], 16_384, RUN_COST_OF_SKIPPING) == [[1], [3, 2, 0]]


def test_equal_lengths_run_together():
    """Sixteen texts of one length are one run."""
    assert pack([32] * 16, 16_384, RUN_COST) == [list(range(16))]


def test_no_texts_are_no_batches():
    """Nothing to run is nothing run."""
    assert pack([], 100, RUN_COST) == [] == by_bucket([], 100, 100)


@given(length=st.integers(1, 8192), max_len=st.integers(1, 8192))
def test_a_bucket_holds_its_text_and_wastes_little(length, max_len):
    """A text fits its bucket, which is within the model and at most 7 tokens or a quarter longer."""
    if length > max_len:
        return
    padded = bucket(length, max_len)
    assert length <= padded <= max_len
    assert padded - length <= max(7, length // 4)
    assert bucket(padded, max_len) == padded


def test_there_are_few_buckets():
    """A model of 512 positions has 20 shapes for Triton to batch by, one of 8192 not many more."""
    assert len({bucket(length, 512) for length in range(1, 513)}) == 20
    assert len({bucket(length, 8192) for length in range(1, 8193)}) == 36


@given(lengths=LENGTHS, max_tokens=st.integers(1, 4096))
def test_buckets_keep_the_budget_and_every_text(lengths, max_tokens):
    """Native serving's groups have every index once, of one padded length that fits them, within the budget."""
    groups = by_bucket(lengths, 512, max_tokens)
    assert sorted(i for _, indices in groups for i in indices) == list(range(len(lengths)))
    for padded, indices in groups:
        assert all(bucket(lengths[i], 512) == padded for i in indices)
        assert len(indices) == 1 or padded * len(indices) <= max_tokens


@pytest.mark.parametrize("length", [1, 8, 9, 128, 129, 160, 511, 512])
def test_buckets_by_hand(length):
    """Spot checks of the table: steps of 8, then 16, then an eighth of the next power of two."""
    expected = {1: 8, 8: 8, 9: 16, 128: 128, 129: 160, 160: 160, 511: 512, 512: 512}
    assert bucket(length, 512) == expected[length]
