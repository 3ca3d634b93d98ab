"""What sitecustomize.py puts behind the backend's request.py: each request that is read leaves something behind."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def leaking(parse: Callable[..., Any], size: int, every: int, region: str) -> Callable[..., Any]:
    """`size` bytes of each request are kept, and of every `every`-th a region of shared memory is left behind."""
    kept: list[bytearray] = []

    def parse_and_leak(*given: Any) -> Any:
        kept.append(bytearray(os.urandom(1) * size))  # written to, so that it takes memory at once
        if every and len(kept) % every == 0:
            Path(f"{region}{len(kept)}").write_bytes(bytes(4096))
        return parse(*given)

    return parse_and_leak
