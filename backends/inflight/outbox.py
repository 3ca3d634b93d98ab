"""Sends answers off the engine's thread.

Sending costs some tenths of a millisecond a response, and Triton and the client have as much work with it, so a thread
of its own does it, one response after the other, the most urgent first:

1. at once: the first text of a stream, its end, an error, the notice that it has got a slot;
2. in rounds: the other text of all streams. A round is followed by a pause as long as it takes to keep sending at SHARE
   of the time, PAUSE_S at most; what piled up for a stream meanwhile is one response. A stream that is alone never
   waits;
3. an empty response to a stream that has been silent for KEEP_ALIVE_S: Triton notices that an HTTP client has hung up
   only when something is written. And each stream is asked whether it was cancelled.
"""

from __future__ import annotations

import heapq
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Ids
from functools import partial
from itertools import count

from .answer import Answer
from .errors import EngineError, Internal
from .sequence import Delta
from .stream import Responder, Stream

KEEP_ALIVE_S = 0.2  # promised: at least one response every 0.25 s
CANCEL_POLL_S = 0.1
SHARE = 0.08  # of the time; Triton and the kernel spend about twice as much on a response
PAUSE_S = 0.08
FIRST_COST_S = 0.0002  # a response's, before any was measured


class Outbox:
    """Owner of the sending thread. `open` registers a stream; it is forgotten once its last response is sent."""

    def __init__(self, share: float = SHARE, pause_s: float = PAUSE_S) -> None:
        self._share, self._pause_s = share, pause_s
        self._lock = threading.Condition()
        self._open: set[Stream] = set()
        self._urgent: dict[Stream, None] = {}  # insertion order: first ready, first sent
        self._ready: dict[Stream, None] = {}  # for the next round
        self._round: deque[Stream] = deque()  # those that the round in progress has not come to
        self._sent, self._spent_s = 0, 0.0  # streams that the round has come to, and what that took
        self._cost_s = FIRST_COST_S  # of one stream in a round, smoothed
        self._due = 0.0  # no round begins before
        self._watch: list[tuple[float, int, Stream]] = []  # a heap: when to look after whom
        self._number = count()
        self._awaited = True  # the thread sleeps until text comes, and not until a round is due
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="inflight-outbox", daemon=True)
        self._parent = os.getppid()

    def start(self) -> None:
        self._thread.start()

    def open(self, responder: Responder, streaming: bool, answers: Ids[Answer], keep: int | None = None) -> Stream:
        """A stream of these answers, all of them to be returned unless `keep` says how many."""
        stream = Stream(self, responder, streaming, answers, len(answers) if keep is None else keep)
        with self._lock:
            self._open.add(stream)
            self._look_after(stream)
        return stream

    def take(self, stream: Stream, answer: Answer, delta: Delta) -> None:
        """Called by sinks: keep what the engine made, and wake the thread if that has to go out now."""
        with self._lock:
            if stream.closed:
                return
            answer.arrived.append(delta)
            if delta.finish is not None:
                answer.ended = True
                stream.closed = all(each.ended for each in stream.answers)
            if stream.closed or (stream.streaming and (not answer.spoke or delta.finish is not None)):
                self._hurry(stream)
            elif stream.streaming and stream not in self._urgent:
                self._ready[stream] = None
                if self._awaited:
                    self._lock.notify()

    def fail(self, stream: Stream, error: EngineError) -> None:
        """One of the stream's sequences failed: so does the request, and its other sequences are cancelled."""
        with self._lock:
            if stream.closed:
                return
            stream.failure, stream.closed = error, True
            self._hurry(stream)
        stream.cancel()

    def announce(self, stream: Stream) -> None:
        """Tell a streaming client at once, with an empty response, that its request has left the queue."""
        with self._lock:
            if stream.streaming and not stream.closed and not stream.responder.started:
                stream.notice = True
                self._hurry(stream)

    def stop(self, timeout_s: float) -> None:
        """Send what is ready, then end the thread."""
        with self._lock:
            self._stopping = True
            self._lock.notify()
        self._thread.join(timeout_s)

    def _hurry(self, stream: Stream) -> None:
        self._ready.pop(stream, None)
        self._urgent[stream] = None
        self._lock.notify()

    def _look_after(self, stream: Stream) -> None:
        due = stream.polled_at + CANCEL_POLL_S
        if stream.streaming:
            due = min(due, stream.sent_at + KEEP_ALIVE_S)
        heapq.heappush(self._watch, (due, next(self._number), stream))

    def _loop(self) -> None:
        while self._step():
            if os.getppid() != self._parent:
                os._exit(1)  # Triton was killed: its stub would stay for ever

    def _step(self) -> bool:
        """Send the most urgent response, or wait for one; false once all is sent and the thread is to end.

        A method of its own, so that between two steps no name keeps a stream that has ended.
        """
        with self._lock:
            now = time.monotonic()
            work = self._next(now)
            if work is None:
                if self._stopping:
                    self._watch.clear()
                    return False
                self._sleep(now)
                return True
        self._guard(*work)
        return True

    def _next(self, now: float) -> tuple[Stream, Callable[[], None]] | None:
        """Whose turn it is and what to do, None if there is nothing to do yet. The lock is held."""
        if self._urgent:
            stream = next(iter(self._urgent))
            del self._urgent[stream]
            return stream, partial(self._send, stream, stream.collect(), stream.closed)
        if self._ready and not self._round and (now >= self._due or self._stopping):
            self._round.extend(self._ready)
            self._ready.clear()
            self._sent, self._spent_s = 0, 0.0
        while self._round:
            stream = self._round.popleft()
            if stream in self._open:
                return stream, partial(self._send_in_round, stream, stream.collect())
        while self._watch and self._watch[0][0] <= now and not self._stopping:
            stream = heapq.heappop(self._watch)[2]
            if not stream.closed:
                return stream, partial(self._tend, stream, now)
        return None

    def _sleep(self, now: float) -> None:
        """Until there is something to do, or a stream is to be looked after. The lock is held, and free meanwhile."""
        until = min(now + CANCEL_POLL_S, self._watch[0][0] if self._watch else now + CANCEL_POLL_S)
        # In a pause nobody needs to wake it for text: there will be some when the pause is over.
        self._awaited = now >= self._due
        self._lock.wait(max(0.0, (until if self._awaited else min(until, self._due)) - now))

    def _send_in_round(self, stream: Stream, arrived: Ids[Ids[Delta]]) -> None:
        began = time.monotonic()
        self._send(stream, arrived, False)
        now = time.monotonic()
        self._sent += 1
        self._spent_s += now - began
        if not self._round:
            # A round that the machine interrupted says nothing of what sending costs.
            cost_s = min(self._spent_s / self._sent, 2 * self._cost_s)
            self._cost_s += (cost_s - self._cost_s) / 8
            self._due = now + min(self._pause_s, self._cost_s * (self._sent - 1) / self._share)

    def _send(self, stream: Stream, arrived: Ids[Ids[Delta]], ended: bool) -> None:
        responder = stream.responder
        stream.tell_cached()
        notice, stream.notice = stream.notice, False
        if notice and not responder.started:  # by itself, also if text has caught up with it: its time is what it says
            responder.started = True
            responder.send(stream.nothing(), final=False)
        stream.write(arrived)
        if stream.failure is not None and ended:
            if stream.streaming and stream.has_news:  # generated before it
                responder.send(stream.parts(), final=False)
            responder.fail(stream.failure)
        elif ended or (stream.streaming and stream.has_news):
            responder.send(stream.parts(), final=ended)
        stream.sent_at = time.monotonic()
        if ended:
            stream.detach()
            self._forget(stream)

    def _tend(self, stream: Stream, now: float) -> None:
        if not stream.streaming:
            with self._lock:
                arrived = stream.collect()
            stream.write(arrived)
        elif now >= stream.sent_at + KEEP_ALIVE_S:
            stream.tell_cached()
            stream.responder.send(stream.nothing(), final=False)
            stream.sent_at = now
        if now >= stream.polled_at + CANCEL_POLL_S:
            stream.polled_at = now
            if stream.responder.is_cancelled():
                stream.cancel()
                self._forget(stream)
                stream.responder.send(stream.nothing(), final=True)
                return
        with self._lock:
            self._look_after(stream)

    def _guard(self, stream: Stream, run: Callable[[], None]) -> None:
        """A stream that cannot be written to ends alone, with an error if one can be sent: Triton waits for an end."""
        try:
            run()
        except Exception as error:
            print(f"inflight: a response could not be sent: {error}", file=sys.stderr, flush=True)
            stream.cancel()
            self._forget(stream)
            try:
                stream.responder.fail(Internal(f"a response could not be sent: {error}"))
            except Exception as again:
                print(f"inflight: nor could its end: {again}", file=sys.stderr, flush=True)

    def _forget(self, stream: Stream) -> None:
        with self._lock:
            stream.closed = True
            self._urgent.pop(stream, None)
            self._ready.pop(stream, None)
            self._open.discard(stream)
