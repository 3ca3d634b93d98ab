"""The store of prefixes: what it finds, that its memory is bounded, and that no chain is broken."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from backends.inflight.prefix import BLOCK, OVERHEAD, Prefixes

SIZE = 8 * BLOCK + OVERHEAD  # bytes of a block, which here is its tokens


def keep(store: Prefixes, tokens: list[int]) -> list[int]:
    """Keep all of some tokens; where the blocks that were copied begin."""
    copied = []

    def save(start: int, stop: int) -> np.ndarray:
        copied.append(start)
        return np.array(tokens[start:stop])

    store.keep(tokens, len(tokens), save)
    return copied


def found(store: Prefixes, tokens: list[int], most: int) -> list[int]:
    return [int(t) for block in store.find(tokens, most) for t in block]  # type: ignore[attr-defined]


texts = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), min_size=1, max_size=4).map(
    lambda parts: [token for token, blocks in parts for _ in range(blocks * BLOCK // 2)]
)


@given(st.lists(st.tuples(texts, st.booleans()), max_size=30), st.integers(0, 12))
def test_what_is_found_is_what_was_kept_and_memory_is_bounded(uses, blocks):
    """Whatever is kept and looked up in which order: a chain is that prompt's own from its first token on, the store
    never exceeds its limit, and its count of bytes is that of its blocks.
    """
    store = Prefixes(blocks * SIZE + SIZE // 2)
    for tokens, look in uses:
        if look:
            chain = found(store, tokens, len(tokens))
            assert chain == tokens[: len(chain)] and len(chain) % BLOCK == 0
            assert store.length(tokens, len(tokens)) == len(chain)
        else:
            keep(store, tokens)
            whole = len(tokens) // BLOCK
            assert store.length(tokens, len(tokens)) == min(whole, blocks) * BLOCK  # the latest is there
        assert store.bytes == len(store) * SIZE <= store.limit


def test_only_what_is_new_is_copied() -> None:
    """A prompt that continues another one adds its own blocks; one that is known copies nothing; parts of a block do
    not count.
    """
    store = Prefixes(100 * SIZE)
    shared = list(range(3 * BLOCK))
    assert keep(store, [*shared, 7]) == [0, BLOCK, 2 * BLOCK]
    assert keep(store, shared) == []
    assert keep(store, [*shared, *([9] * (BLOCK + 5))]) == [3 * BLOCK]
    assert store.length([*shared, *([8] * BLOCK)], 1000) == 3 * BLOCK
    assert store.length(shared, 3 * BLOCK - 1) == 2 * BLOCK


def test_the_same_tokens_behind_others_are_another_prefix() -> None:
    """A block stands for its tokens behind all those before it: what differs in front is not found."""
    store = Prefixes(100 * SIZE)
    keep(store, [*([1] * BLOCK), *([2] * BLOCK)])
    assert store.length([*([3] * BLOCK), *([2] * BLOCK)], 2 * BLOCK) == 0
    assert store.length([2] * BLOCK, BLOCK) == 0


def test_the_one_that_was_used_longest_ago_goes_first_leaf_by_leaf() -> None:
    """A full store loses the end of the chain that nobody used, and keeps its beginning as long as it can."""
    store = Prefixes(4 * SIZE)
    old, used = [1] * (2 * BLOCK), [2] * (2 * BLOCK)
    keep(store, old)
    keep(store, used)
    found(store, old, 2 * BLOCK)
    keep(store, [3] * BLOCK)
    assert [store.length(t, 99) // BLOCK for t in (old, used, [3] * BLOCK)] == [2, 1, 1]


def test_a_store_without_memory_keeps_nothing() -> None:
    """With a limit below one block there is never anything to find, and an emptied one is as new."""
    store = Prefixes(SIZE - 1)
    keep(store, [1] * (3 * BLOCK))
    assert (len(store), store.bytes) == (0, 0)
    store = Prefixes(10 * SIZE)
    keep(store, [1] * (3 * BLOCK))
    store.clear()
    assert (len(store), store.bytes, store.length([1] * (3 * BLOCK), 99)) == (0, 0, 0)
