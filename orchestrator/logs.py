"""Log lines: one JSON object each, to standard error or a file. The text of a prompt or an answer is never logged.

Every line that is written while a request is handled has its `request_id` and, where there is one, its `traceparent`.
A line is made where it is logged, some ten microseconds for a request's, and written by a thread (logwriter.py).
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import logging
import os
import sys
import threading
import time
import traceback
from json.encoder import encode_basestring_ascii as quoted
from operator import attrgetter
from types import TracebackType
from typing import Any

from orchestrator.context import handling
from orchestrator.domain import Record
from orchestrator.logwriter import Descriptor, Target, Writer
from orchestrator.masking import masked, suspicious
from orchestrator.rotation import STDERR, LogFile
from orchestrator.settings import Settings

log = logging.getLogger(__name__)
_requests = logging.getLogger("orchestrator.requests")
_encode = json.JSONEncoder(separators=(",", ":"), default=str).encode

# Of others only what is wrong is of interest; uvicorn's lines on starting and stopping repeat ours.
_QUIET = ("uvicorn.error", "asyncio", "urllib3", "opentelemetry", "grpc")

# The fields of a request's line by how they are written. What is empty is left out.
_TEXTS = (
    "model", "route", "operation", "task", "edge", "caller", "tenant", "outcome", "error", "finish_reason", "cache",
    "fallback", "refused", "shadow", "input_hash",
)  # fmt: skip
_COUNTS = ("prompt_tokens", "completion_tokens", "output_chars")
_SECONDS = ("ttft_s", "queue_s", "upstream_s", "duration_s")
_texts, _counts, _seconds = attrgetter(*_TEXTS), attrgetter(*_COUNTS), attrgetter(*_SECONDS)
_TEXT_KEYS, _COUNT_KEYS, _SECOND_KEYS = (
    tuple(f',"{name}":' for name in names) for names in (_TEXTS, _COUNTS, _SECONDS)
)


class RequestLine(logging.LogRecord):
    """A log record that takes all but its Record from `_LINE`: to make a whole one costs as much as the line."""

    def __init__(self, record: Record) -> None:
        self.__dict__.update(_LINE)
        self.record = record
        self.created = time.time()
        self.msecs = self.created % 1 * 1000


_LINE = vars(logging.LogRecord(_requests.name, logging.INFO, __file__, 0, "request", (), None, "log_request"))


def log_request(record: Record) -> None:
    """A sink: one line a request."""
    if _requests.isEnabledFor(logging.INFO):
        handlers = logging.root.handlers
        if len(handlers) == 1 and type(handlers[0]) is Queued:  # the way there costs as much as the line
            handlers[0].emit(RequestLine(record))
        else:
            _requests.handle(RequestLine(record))


class JsonLines(logging.Formatter):
    """`time` (RFC 3339, UTC), `level`, `logger`, `message`, `worker` (its number), `request_id`, `traceparent`.

    A request's line has the fields of its Record beside them. An exception is its type; its stack only in debug, and
    its message never: that may quote what a user sent. Secrets are masked.
    """

    def __init__(self, debug: bool, worker: int | None = None) -> None:
        super().__init__()
        self._debug, self._worker = debug, worker
        self._second, self._time = -1, ""

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record, RequestLine):
            return self._request(record)
        line: dict[str, object] = {
            "time": self._at(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": masked(_message(record)),
        }
        if self._worker is not None:
            line["worker"] = self._worker
        handled = handling.get()
        if handled is not None:
            line["request_id"] = masked(handled[0])
            if handled[1]:
                line["traceparent"] = handled[1]
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = type(record.exc_info[1]).__name__
            if self._debug:
                line["traceback"] = masked(stack_of(record.exc_info[1]))
        return _encode(line)

    def _request(self, line: RequestLine) -> str:
        """The same as `_encode` of a mapping, at half the cost."""
        record, trace = line.record, line.record.trace
        id, texts = record.id, _texts(record)
        if suspicious(id + record.model):  # all that a client can choose
            id, texts = masked(id), tuple(text and masked(text) for text in texts)
        parts = [f'{{"time":"{self._at(line)}","level":"info","logger":"{line.name}","message":"request"']
        if self._worker is not None:
            parts.append(f',"worker":{self._worker}')
        parts.append(f',"request_id":{quoted(id)}')
        traceparent = record.traceparent if trace is None else trace.own
        if traceparent:
            parts.append(f',"traceparent":"{traceparent}"')
        parts += [key + quoted(text) for key, text in zip(_TEXT_KEYS, texts, strict=True) if text]
        parts.append(',"stream":true' if record.stream else ',"stream":false')
        if record.degraded:
            parts.append(',"degraded":true')
        if record.sanitized:
            parts.append(f',"sanitized":{_encode(record.sanitized)}')
        parts += [f"{key}{count}" for key, count in zip(_COUNT_KEYS, _counts(record), strict=True)]
        parts += [
            f"{key}{seconds:.6f}"
            for key, seconds in zip(_SECOND_KEYS, _seconds(record), strict=True)
            if seconds is not None
        ]
        parts.append("}")
        return "".join(parts)

    def _at(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        if second != self._second:
            self._second, self._time = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._time}.{int(record.msecs):03d}Z"


class Readable(JsonLines):
    """The same for people at a terminal: time, level, logger, message, and what else there is as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = json.loads(super().format(record))
        head = [line.pop(name) for name in ("time", "level", "logger", "message")]
        stack = line.pop("traceback", "")
        text = f"{head[0][11:23]} {head[1]:8} {head[2]}: {head[3]}"
        text += "".join(f"  {name}={value}" for name, value in line.items())
        if not text.isprintable():  # a terminal obeys what it is sent
            text = text.encode("unicode_escape").decode()
        return f"{text}\n{stack}" if stack else text


class Queued(logging.Handler):
    """Formats a line where it is logged, and leaves writing it to a thread."""

    def __init__(self, writer: Writer) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:  # the standard library would print the arguments, secrets and all
            line = _encode({"level": "error", "logger": record.name, "message": f"no line: {type(error).__name__}"})
        self._writer.put(line.encode() + b"\n", record.levelno >= logging.WARNING)


def configure(settings: Settings, worker: int | None = None) -> Writer:
    """Send every logger of the process to `log_file`, else to standard error. A worker's lines have its number.

    JSON lines, except for a terminal. What is queued is written at the process's end. Raises OSError where the file
    cannot be had.
    """
    target: Target = Descriptor(STDERR)
    if settings.log_file is not None:
        target = LogFile(settings.log_file, settings.log_max_bytes, settings.log_files)
    readable = settings.log_file is None and os.isatty(STDERR)
    formatter = (Readable if readable else JsonLines)(settings.debug, worker)

    def lost_line(count: int) -> bytes:
        return formatter.format(_own_record(f"{count} log lines were lost")).encode() + b"\n"

    writer = Writer(target, lost_line)
    atexit.register(writer.close)
    handler = Queued(writer)
    handler.setFormatter(formatter)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    threading.excepthook = lambda caught: _uncaught(caught.exc_type, caught.exc_value, caught.exc_traceback)
    faulthandler.enable(STDERR)  # a crash in native code leaves the stacks of all threads, outside of any line
    return writer


def stack_of(error: BaseException) -> str:
    """The traceback of an exception and of those that led to it, with their types and without their messages."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)
    blocks = [
        f"Traceback (most recent call last):\n{''.join(traceback.format_tb(one.__traceback__))}{type(one).__name__}"
        for one in reversed(chain)
    ]
    return "\n\n".join(blocks)


def _message(record: logging.LogRecord) -> str:
    message = record.getMessage()
    if record.name == "asyncio":  # it goes on with the repr of a task or a callback, and so of exceptions and arguments
        message = message.partition("\n")[0].partition("(")[0].partition("<")[0].rstrip()
    return message


def _own_record(message: str) -> logging.LogRecord:
    return logging.LogRecord(log.name, logging.WARNING, __file__, 0, message, (), None)


def _uncaught(kind: type[BaseException], error: BaseException | None, stack: TracebackType | None) -> None:
    if error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit)):
        log.critical("an exception that nobody caught", exc_info=(kind, error, stack))
