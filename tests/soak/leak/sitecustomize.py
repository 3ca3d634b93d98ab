"""Makes a gateway's worker leak, so that the soak test can be seen to fail: Python runs it at start when its folder is
on PYTHONPATH. SOAK_LEAK_BYTES are kept of each request that ends; of every SOAK_LEAK_FILE_EVERY a file is left open.
"""

import os
import sys
from typing import Any

kept: list[object] = []


def _leak() -> None:
    from orchestrator.passage import Passage

    size, every = (int(os.environ.get(f"SOAK_LEAK_{name}", "0")) for name in ("BYTES", "FILE_EVERY"))
    record = Passage.record

    def record_and_leak(self: Passage[Any]) -> object:
        kept.append(bytearray(os.urandom(1) * size))  # written to, so that it takes memory at once
        if every and len(kept) % every == 0:
            os.open(os.devnull, os.O_RDONLY)
        return record(self)

    Passage.record = record_and_leak  # type: ignore[assignment, method-assign]


if "orchestrator.worker" in sys.orig_argv:
    _leak()
