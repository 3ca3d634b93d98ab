"""Random ids: one system call for many of them."""

from __future__ import annotations

import os

_POOL_BYTES = 4096
_pool, _at = b"", 0


def random_id(size: int) -> str:
    """`size` random bytes, unpredictable, in hexadecimal. Of one thread."""
    global _pool, _at
    if _at + size > len(_pool):
        _pool, _at = os.urandom(_POOL_BYTES), 0
    _at += size
    return _pool[_at - size : _at].hex()
