"""Batch files, and running them as the command does, for the tests of batches."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

from orchestrator.ops import batch
from orchestrator.ops.batchfile import Line, Source, answered
from orchestrator.ops.batchjournal import Journal

Row = dict[str, Any]


def line(custom_id: str, prompt: str = "Hola", **changes: Any) -> dict[str, Any]:
    """One request as a batch file has it."""
    body = {"model": "m", "prompt": prompt}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body, **changes}


def write(path: Path, *lines: Any) -> Path:
    """A batch file; bytes are written as they are."""
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
    return path


def rows(path: Path) -> list[Row]:
    return [json.loads(text) for text in path.read_bytes().splitlines()]


class Echo:
    """Answers each line with its own custom_id, in an order that is not the lines'; keeps what was asked."""

    def __init__(self, seed: int = 0, concurrency: int = 3) -> None:
        self.concurrency, self.asked = concurrency, []  # type: int, list[str]
        self._random = random.Random(seed)

    async def ask(self, line: Line, id: str) -> Row:
        self.asked.append(line.custom_id)
        for _ in range(self._random.randrange(4)):
            await asyncio.sleep(0)
        return answered(id, line.custom_id, 200, "r", {"usage": {"completion_tokens": 2}, "echo": "ñ\n" * 3})


async def do(file: Path, out: Path, asker: Any, stop: asyncio.Event | None = None, overwrite: bool = False) -> Any:
    """What the command does: (whether it came to the end, the counts)."""
    source = Source.open(file)
    tally = batch.Tally(source.lines)
    journal = Journal.open(out, source, overwrite, tally.keep)
    try:
        whole = await batch.run(source, journal, tally, asker, stop or asyncio.Event())
        if whole:
            journal.finish()
        return whole, tally
    finally:
        journal.close()
