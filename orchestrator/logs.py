"""Log lines: one JSON object a line on standard error. The text of a prompt or an answer is never logged."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time

from orchestrator.domain import Record

_requests = logging.getLogger("orchestrator.requests")


class JsonLines(logging.Formatter):
    """`time` (RFC 3339, UTC), `level`, `logger`, `message`, `worker` (its number), and the fields of a Record.

    Tracebacks only in debug.
    """

    def __init__(self, debug: bool, worker: int | None = None) -> None:
        super().__init__()
        self._debug = debug
        self._fixed = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._fixed,
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[0] is not None:
            # An exception's message may quote what a user sent: only shown where debugging is switched on.
            line["exception"] = record.exc_info[0].__name__
            if self._debug:
                line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure(level: str, debug: bool, worker: int | None = None) -> None:
    """Send every logger of the process to standard error as JSON lines; a worker's have its number."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(debug, worker))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # Its lines on starting and stopping repeat ours.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def log_request(record: Record) -> None:
    """A sink: one line a request."""
    fields = dataclasses.asdict(record)
    for name in ("ttft_s", "duration_s", "accepted"):
        if fields[name] is not None:
            fields[name] = round(fields[name], 6)
    _requests.info("request", extra={"fields": fields})
