"""Makes a gateway's worker leak, so that the soak test can be seen to fail: Python runs it at start when its folder is
on PYTHONPATH. SOAK_LEAK_BYTES are kept and SOAK_LEAK_FILES left open for each request that ends.
"""

import os
import sys

kept: list[object] = []


def _leak() -> None:
    from orchestrator.domain import Record

    size, files = (int(os.environ.get(f"SOAK_LEAK_{name}", "0")) for name in ("BYTES", "FILES"))
    make = Record.__init__

    def make_and_leak(self: Record, *args: object, **kwargs: object) -> None:
        make(self, *args, **kwargs)  # type: ignore[arg-type]  # whatever its fields are
        kept.append(bytearray(os.urandom(1) * size))  # written to, so that it takes memory at once
        kept.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(files))

    Record.__init__ = make_and_leak  # type: ignore[method-assign]


if "orchestrator.worker" in sys.orig_argv:
    _leak()
