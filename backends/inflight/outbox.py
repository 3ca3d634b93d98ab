"""Sends answers off the engine's thread.

Sending costs about a tenth of a millisecond a response, so a thread of its own does it, and what piled up for one
stream meanwhile goes out as one response. The same thread writes an empty response to a stream that has been silent for
KEEP_ALIVE_S: Triton notices that an HTTP client has hung up only when something is written. And it asks each stream
whether it was cancelled.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from .errors import EngineError, Internal
from .sequence import Delta

KEEP_ALIVE_S = 0.2  # promised: at least one response every 0.25 s
CANCEL_POLL_S = 0.1
TICK_S = 0.02


class Responder(Protocol):
    """One request's way back to its client. `started`: it has a slot, which its first text shows as well."""

    started: bool

    def send(self, text: str, finish: str, tokens: int, final: bool) -> None: ...

    def fail(self, error: EngineError) -> None: ...

    def is_cancelled(self) -> bool: ...


class Stream:
    """A sequence's sink. Without `streaming` everything goes out as one response at the end."""

    def __init__(self, outbox: Outbox, responder: Responder, streaming: bool) -> None:
        self._outbox = outbox
        self.responder, self.streaming = responder, streaming
        self._on_cancel: Callable[[], None] | None = None
        self.text: list[str] = []
        self.tokens = 0
        self.finish: str | None = None
        self.failure: EngineError | None = None
        self.closed = self.gone = self.notice = False
        self.sent_at = self.polled_at = time.monotonic()

    def attach(self, cancel: Callable[[], None]) -> None:
        """What to call when the client has gone; at once if it has already."""
        self._on_cancel = cancel
        if self.gone:
            self.cancel()

    def cancel(self) -> None:
        self.gone = True
        self.detach(call=True)

    def detach(self, call: bool = False) -> None:
        """Let go of the sequence, whose sink this is: both would stay, and with them Triton's response sender, until
        a garbage collection, which may come when Triton's side of it is gone.
        """
        on_cancel, self._on_cancel = self._on_cancel, None
        if call and on_cancel is not None:
            on_cancel()

    def admitted(self) -> None:
        self._outbox.announce(self)

    def delta(self, delta: Delta) -> None:
        self._outbox.take(self, delta, None)

    def error(self, error: EngineError) -> None:
        self._outbox.take(self, None, error)


class Outbox:
    """Owner of the sending thread. `open` registers a stream; it is forgotten once its last response is sent."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._open: set[Stream] = set()
        self._ready: dict[Stream, None] = {}  # insertion order: first ready, first sent
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="inflight-outbox", daemon=True)
        self._parent = os.getppid()

    def start(self) -> None:
        self._thread.start()

    def open(self, responder: Responder, streaming: bool) -> Stream:
        stream = Stream(self, responder, streaming)
        with self._lock:
            self._open.add(stream)
        return stream

    def take(self, stream: Stream, delta: Delta | None, error: EngineError | None) -> None:
        """Called by sinks: remember what is to be sent and wake the thread."""
        with self._lock:
            if stream.closed:
                return
            if delta is not None:
                stream.text.append(delta.text)
                stream.tokens += delta.tokens
                stream.finish = delta.finish
            stream.failure = stream.failure or error
            ended = stream.finish is not None or stream.failure is not None
            # Text that is certain goes out with the step that made it; a token that completes no text waits for the
            # next.
            if ended or (stream.streaming and any(stream.text)):
                self._ready[stream] = None
                self._lock.notify()
            stream.closed = ended

    def announce(self, stream: Stream) -> None:
        """Tell a streaming client at once, with an empty response, that its request has left the queue."""
        with self._lock:
            if stream.streaming and not stream.closed:
                stream.notice = True
                self._ready[stream] = None
                self._lock.notify()

    def stop(self, timeout_s: float) -> None:
        """Send what is ready, then end the thread."""
        with self._lock:
            self._stopping = True
            self._lock.notify()
        self._thread.join(timeout_s)

    def _loop(self) -> None:
        while self._round():
            if os.getppid() != self._parent:
                os._exit(1)  # Triton was killed: its stub would stay for ever

    def _round(self) -> bool:
        """Wait for something to send and send it; false once all is sent and the thread is to end.

        A method of its own, so that between two rounds no name keeps a stream that has ended.
        """
        with self._lock:
            if not self._ready:
                self._lock.wait(TICK_S if self._open else 0.25)
            batch = [(s, *self._cut(s)) for s in self._ready]
            self._ready.clear()
            idle = list(self._open)
            if self._stopping and not batch:
                return False
        for stream, text, tokens in batch:
            self._guard(stream, partial(self._send, stream, text, tokens))
        for stream in idle:
            if not stream.closed:
                self._guard(stream, partial(self._tend, stream))
        return True

    @staticmethod
    def _cut(stream: Stream) -> tuple[str, int]:
        cut = "".join(stream.text), stream.tokens
        stream.text, stream.tokens = [], 0
        return cut

    def _send(self, stream: Stream, text: str, tokens: int) -> None:
        with self._lock:
            finish, failure = stream.finish, stream.failure
            # An end that arrived after the cut goes out next time, with its text.
            ended = stream.closed and stream not in self._ready
            notice, stream.notice = stream.notice, False
        if notice:  # by itself, also where text has caught up with it: its time is what it says
            stream.responder.started = True
            stream.responder.send("", "", 0, final=False)
            if not (text or tokens or ended):
                stream.sent_at = time.monotonic()
                return
        if failure is not None and ended:
            if stream.streaming and text:  # generated before it
                stream.responder.send(text, "", tokens, final=False)
            stream.responder.fail(failure)
        else:
            stream.responder.send(text, (finish or "") if ended else "", tokens, final=ended)
        stream.sent_at = time.monotonic()
        if ended:
            stream.detach()
            with self._lock:
                self._open.discard(stream)

    def _tend(self, stream: Stream) -> None:
        now = time.monotonic()
        if stream.streaming and now - stream.sent_at >= KEEP_ALIVE_S:
            stream.responder.send("", "", 0, final=False)
            stream.sent_at = now
        if now - stream.polled_at >= CANCEL_POLL_S:
            stream.polled_at = now
            if stream.responder.is_cancelled():
                self._forget(stream)
                stream.responder.send("", "", 0, final=True)

    def _guard(self, stream: Stream, run: Callable[[], None]) -> None:
        """A stream that cannot be written to ends alone, with an error if one can be sent: Triton waits for an end."""
        try:
            run()
        except Exception as error:
            print(f"inflight: a response could not be sent: {error}", file=sys.stderr, flush=True)
            self._forget(stream)
            try:
                stream.responder.fail(Internal(f"a response could not be sent: {error}"))
            except Exception as again:
                print(f"inflight: nor could its end: {again}", file=sys.stderr, flush=True)

    def _forget(self, stream: Stream) -> None:
        stream.cancel()
        with self._lock:
            stream.closed = True
            self._ready.pop(stream, None)
            self._open.discard(stream)
