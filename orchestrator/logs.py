"""Log lines: one JSON object each, to standard error or a file. The text of a prompt or an answer is never logged.

Every line that is written while a request is handled has its `request_id` and, where there is one, its `traceparent`.
A line is made where it is logged and written by a thread (logwriter.py), which makes those of requests as well.
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
from functools import lru_cache, partial
from json.encoder import encode_basestring_ascii as quoted
from operator import attrgetter
from types import TracebackType
from typing import Any

from orchestrator.context import handling
from orchestrator.domain import Record
from orchestrator.logwriter import Descriptor, Target, Writer
from orchestrator.masking import masked
from orchestrator.rotation import STDERR, LogFile
from orchestrator.settings import Settings

log = logging.getLogger(__name__)
_requests = logging.getLogger("orchestrator.requests")
_encode = json.JSONEncoder(separators=(",", ":"), default=str).encode

# Of others only what is wrong is of interest; uvicorn's lines on starting and stopping repeat ours.
_QUIET = ("uvicorn.error", "asyncio", "urllib3", "opentelemetry", "grpc")

# The texts of a request's line that many requests have in common. What is empty is left out.
COMMON = (
    "model", "route", "operation", "task", "edge", "caller", "tenant", "outcome", "error", "finish_reason", "cache",
    "fallback", "refused", "shadow",
)  # fmt: skip
_common = attrgetter(*COMMON)


class RequestLine(logging.LogRecord):
    """What a handler of somebody else's gets: a log record with the request's Record."""

    def __init__(self, record: Record) -> None:
        super().__init__(_requests.name, logging.INFO, __file__, 0, "request", (), None, "log_request")
        self.record = record


def log_request(record: Record) -> None:
    """A sink: one line a request."""
    if _requests.isEnabledFor(logging.INFO):
        handlers = logging.root.handlers
        if len(handlers) == 1 and type(handlers[0]) is Queued:  # the way there costs as much as the line
            handlers[0].request(record)
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
        self._of_worker = "" if worker is None else f',"worker":{worker}'

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record, RequestLine):
            return self.request(record.record, record.created)
        line: dict[str, object] = {
            "time": _at(record.created),
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

    def request(self, record: Record, at: float) -> str:
        """A request's line at a Unix time in seconds; the same as `_encode` of a mapping, at a third of the cost."""
        trace = record.trace
        traceparent = record.traceparent if trace is None else trace.own
        line = (
            f'{{"time":"{_at(at)}","level":"info","logger":"{_requests.name}","message":"request"{self._of_worker},'
            f'"request_id":{quoted(masked(record.id))},"stream":{"true" if record.stream else "false"},'
            f'"prompt_tokens":{record.prompt_tokens},"completion_tokens":{record.completion_tokens},'
            f'"output_chars":{record.output_chars},"duration_s":{record.duration_s:.6f}{_common_json(*_common(record))}'
        )
        if traceparent:
            line += f',"traceparent":"{traceparent}"'
        if record.input_hash:
            line += f',"input_hash":{quoted(record.input_hash)}'
        if record.ttft_s is not None:
            line += f',"ttft_s":{record.ttft_s:.6f}'
        if record.queue_s is not None:
            line += f',"queue_s":{record.queue_s:.6f}'
        if record.upstream_s is not None:
            line += f',"upstream_s":{record.upstream_s:.6f}'
        if record.degraded:
            line += ',"degraded":true'
        if record.sanitized:
            line += f',"sanitized":{_encode(record.sanitized)}'
        return line + "}"


def _at(created: float) -> str:
    second, milliseconds = divmod(int(created * 1000), 1000)
    return f"{_second(second)}.{milliseconds:03d}Z"


@lru_cache(maxsize=16)
def _second(at: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))


@lru_cache(maxsize=1024)
def _common_json(*texts: str | None) -> str:
    return "".join(f',"{name}":{quoted(masked(text))}' for name, text in zip(COMMON, texts, strict=True) if text)


class Readable(JsonLines):
    """The same for people at a terminal: time, level, logger, message, and what else there is as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record) if isinstance(record, RequestLine) else self._shown(super().format(record))

    def request(self, record: Record, at: float) -> str:
        return self._shown(super().request(record, at))

    @staticmethod
    def _shown(text: str) -> str:
        line: dict[str, Any] = json.loads(text)
        head = [line.pop(name) for name in ("time", "level", "logger", "message")]
        stack = line.pop("traceback", "")
        text = f"{head[0][11:23]} {head[1]:8} {head[2]}: {head[3]}"
        text += "".join(f"  {name}={value}" for name, value in line.items())
        if not text.isprintable():  # a terminal obeys what it is sent
            text = text.encode("unicode_escape").decode()
        return f"{text}\n{stack}" if stack else text


class Queued(logging.Handler):
    """Formats a line where it is logged, and leaves writing it to a thread, of a request's line the making too."""

    def __init__(self, writer: Writer, lines: JsonLines) -> None:
        super().__init__()
        self.setFormatter(lines)
        self._writer, self._lines = writer, lines

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:  # the standard library would print the arguments, secrets and all
            line = _no_line(record.name, error)
        self._writer.put(line.encode() + b"\n", record.levelno >= logging.WARNING)

    def request(self, record: Record) -> None:
        """The same for a request's line, which the thread makes too: several in one go take half the time."""
        self._writer.put(partial(self._made, record, time.time()))

    def _made(self, record: Record, at: float) -> bytes:
        try:
            line = self._lines.request(record, at)
        except Exception as error:
            line = _no_line(_requests.name, error)
        return line.encode() + b"\n"


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
    logging.basicConfig(level=settings.log_level.upper(), handlers=[Queued(writer, formatter)], force=True)
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


def _no_line(name: str, error: Exception) -> str:
    return _encode({"level": "error", "logger": name, "message": f"no line: {type(error).__name__}"})


def _own_record(message: str) -> logging.LogRecord:
    return logging.LogRecord(log.name, logging.WARNING, __file__, 0, message, (), None)


def _uncaught(kind: type[BaseException], error: BaseException | None, stack: TracebackType | None) -> None:
    if error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit)):
        log.critical("an exception that nobody caught", exc_info=(kind, error, stack))
