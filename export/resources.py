"""What an export takes of the machine: memory and disk, asked for before anything is read, given back when done with."""

from __future__ import annotations

import ctypes
import gc


def release() -> None:
    """Give the memory of dropped objects back to the kernel: models are full of cycles, and glibc keeps freed pages."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return  # another C library: it has its own mind about freed memory
