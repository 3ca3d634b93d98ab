"""One attempt to send something: it has so many seconds altogether, whatever the other side does.

A socket's own time-out counts from the last byte, and looking up a name has none. So the attempt runs in a daemon
thread, which is left alone when its time is over: its connection is cut, and if it comes so far later it gets none.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

AFTER_MAX_S = 60.0  # of what a server asks to wait


class SendError(Exception):
    """A message could not be sent; the text has no secrets. `again`: trying once more may help, after `after_s`."""

    def __init__(self, message: str, again: bool, after_s: float | None = None) -> None:
        super().__init__(message)
        self.again = again
        self.after_s = None if after_s is None else min(AFTER_MAX_S, max(0.0, after_s))


class Attempt:
    """What one attempt has: its time and its connection."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._ends = time.monotonic() + timeout_s
        self._lock = threading.Lock()
        self._over = False
        self._handle: socket.socket | None = None

    def connect(self, host: str, port: int) -> socket.socket:
        """A TCP connection. Raises OSError."""
        left_s = max(0.001, self._ends - time.monotonic())
        made = socket.create_connection((host, port), timeout=left_s)
        made.settimeout(2 * self.timeout_s)  # who waits is woken by `end`; should that fail, by this
        with self._lock:
            if self._over:
                made.close()
                raise TimeoutError
            # another descriptor of the same connection: TLS takes the first one over
            self._handle = made.dup()
        return made

    def end(self) -> None:
        """Cut the connection, and let no other one come."""
        with self._lock:
            self._over = True
            if self._handle is not None:
                with contextlib.suppress(OSError):  # it is cut already
                    self._handle.shutdown(socket.SHUT_RDWR)
                self._handle.close()
                self._handle = None


def within(timeout_s: float, send: Callable[[Attempt], None]) -> None:
    """Run `send` for at most so many seconds. Raises SendError, whatever it raises."""
    attempt, failed, done = Attempt(timeout_s), [], threading.Event()

    def work() -> None:
        try:
            send(attempt)
        except Exception as error:
            failed.append(error)
        finally:
            done.set()

    try:
        threading.Thread(target=work, name="alert attempt", daemon=True).start()
    except RuntimeError as error:
        raise SendError("no thread is to be had", again=True) from error
    in_time = done.wait(timeout_s)
    attempt.end()
    if not in_time:
        raise SendError(f"no answer within {timeout_s:g} s", again=True)
    if failed:
        raise _translated(failed[0], timeout_s) from failed[0]


def _translated(error: Exception, timeout_s: float) -> SendError:
    """Without the texts of errors that may quote an address, which may be a secret."""
    import ssl

    if isinstance(error, SendError):
        return error
    if isinstance(error, ssl.SSLCertVerificationError):
        return SendError(f"its certificate is not trusted: {error.verify_message}", again=False)
    if isinstance(error, ssl.SSLError):
        return SendError(f"no TLS connection: {error.reason or 'it was closed'}", again=True)
    if isinstance(error, TimeoutError):
        return SendError(f"no answer within {timeout_s:g} s", again=True)
    if isinstance(error, socket.gaierror):
        return SendError("the name of the host cannot be looked up", again=True)
    if isinstance(error, OSError):
        return SendError(error.strerror or f"the connection failed ({type(error).__name__})", again=True)
    return SendError(f"it cannot be sent ({type(error).__name__})", again=False)
