"""Prefixes of earlier sequences, kept so that nobody computes them again.

Tokens are cut into blocks of BLOCK; a block's node hangs on that of the block before it, so it stands for its tokens
behind all tokens before them. Nodes are found by the tokens themselves: no hash collision can give one prompt the
cache of another.

Memory is bounded: the node that was used longest ago goes first. Using a node uses its ancestors right after it, so
they are always younger, and the oldest node is a leaf: no chain is ever broken in its middle.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import Protocol

BLOCK = 16  # tokens
OVERHEAD = 512  # bytes of a node beside its block, of which a model without a cache has none


class Block(Protocol):
    """A copy of some positions of a slot's cache; see runner.Runner.save."""

    @property
    def nbytes(self) -> int: ...


@dataclass(eq=False)
class _Node:
    """`tokens`: the block's own, as bytes (whose hash is keyed, so that nobody can make them collide); `siblings`: the
    nodes behind the same block, itself among them.
    """

    siblings: dict[bytes, _Node]
    tokens: bytes
    block: Block
    children: dict[bytes, _Node] = field(default_factory=dict)


class Prefixes:
    """A store of at most `limit` bytes. Not thread-safe: the engine's thread is its only caller."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._roots: dict[bytes, _Node] = {}
        self._nodes: OrderedDict[_Node, None] = OrderedDict()  # the one used longest ago first

    def __len__(self) -> int:
        """How many blocks are kept."""
        return len(self._nodes)

    def length(self, tokens: Ids[int], most: int) -> int:
        """How many of the first `most` tokens are kept from the first on: a multiple of BLOCK."""
        return BLOCK * len(self._walk(tokens, most))

    def find(self, tokens: Ids[int], most: int) -> list[Block]:
        """The blocks of the longest chain that is kept of the first `most` tokens, which counts as a use of them."""
        chain = self._walk(tokens, most)
        self._use(chain)
        return [node.block for node in chain]

    def keep(self, tokens: Ids[int], most: int, save: Callable[[int, int], Block]) -> None:
        """Keep the whole blocks of the first `most` tokens that are not kept yet; `save(start, stop)` copies one out.

        Does nothing more once there is no room for a block beside those in front of it.
        """
        chain = self._walk(tokens, most)
        for start in range(BLOCK * len(chain), most - BLOCK + 1, BLOCK):
            siblings = chain[-1].children if chain else self._roots
            node = _Node(siblings, _key(tokens, start), save(start, start + BLOCK))
            self._add(node)
            chain.append(node)
            self._use(chain)
            self._shrink()
            if node not in self._nodes:
                return

    def clear(self) -> None:
        self._roots.clear()
        self._nodes.clear()
        self.bytes = 0

    def _walk(self, tokens: Ids[int], most: int) -> list[_Node]:
        chain: list[_Node] = []
        nodes = self._roots
        for start in range(0, min(most, len(tokens)) - BLOCK + 1, BLOCK):
            node = nodes.get(_key(tokens, start))
            if node is None:
                break
            chain.append(node)
            nodes = node.children
        return chain

    def _use(self, chain: list[_Node]) -> None:
        for node in reversed(chain):
            self._nodes.move_to_end(node)

    def _add(self, node: _Node) -> None:
        node.siblings[node.tokens] = node
        self._nodes[node] = None
        self.bytes += node.block.nbytes + OVERHEAD

    def _shrink(self) -> None:
        while self.bytes > self.limit:
            node, _ = self._nodes.popitem(last=False)
            del node.siblings[node.tokens]
            self.bytes -= node.block.nbytes + OVERHEAD


def _key(tokens: Ids[int], start: int) -> bytes:
    return array("q", tokens[start : start + BLOCK]).tobytes()
