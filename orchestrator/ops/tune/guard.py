"""The process that stands by while new settings are put in place, and undoes them if the one at work is killed.

It reads a pipe that only that process can write to. "done" means that all is well; the end of the pipe without it, that
the other one is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

from orchestrator.settings import Settings

DONE = b"done"
END_S = 10.0
LOCK_S = 30.0  # the kernel takes a moment to give back what a dead process held


@contextlib.contextmanager
def watching(settings: Settings) -> Iterator[None]:
    """Have a guard for as long as the context lasts. Raises OSError when no process can be started."""
    guard = subprocess.Popen(  # noqa: S603 (our own program, no shell)
        [sys.executable, "-m", __name__],
        env={**os.environ, **settings.child_environ()},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C at the terminal is not for it
    )
    try:
        yield
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
            guard.communicate(DONE, END_S)
        if guard.poll() is None:
            guard.kill()
            guard.wait()


def main() -> None:
    """Wait for the word, or for the end of whoever should have said it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.buffer.read() == DONE:
        return
    from orchestrator.ops.tune import applying

    applying.recover(Settings.load(), wait_s=LOCK_S)


if __name__ == "__main__":
    main()
