"""Our backend's parts without Triton: an entry, its engine and sequences for it, put together as model.py does."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from backends.inflight import entry as entries
from backends.inflight.engine import Engine
from backends.inflight.request import SamplingParams
from backends.inflight.scheduler import Scheduler
from backends.inflight.sequence import Sequence as Running
from backends.inflight.sequence import Sink
from backends.inflight.steps import ModelRunner, Tuning

DEADLINE_S = 600.0
DEFAULT = Tuning()
_PARAMETER = re.compile(r'key:\s*"([^"]+)"\s*value\s*:?\s*\{\s*string_value:\s*"([^"]*)"')


def read_entry(folder: Path, threads: int) -> entries.Entry:
    """The newest version of an exported model, with so many threads."""
    parameters = dict(_PARAMETER.findall((folder / "config.pbtxt").read_text()))
    versions = sorted((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
    return entries.load(versions[-1], {**parameters, "threads": str(threads)})


def engine(runner: ModelRunner, slots: int, max_queue: int, chunk: int, tuning: Tuning = DEFAULT) -> Engine:
    """An engine that is not started."""
    return Engine(runner, Scheduler(slots, max_queue, chunk), tuning=tuning)


def sequence(
    prompt: Sequence[int], new: int, decode: Callable[[Sequence[int]], str], sink: Sink, vocab_size: int
) -> Running:
    """Exactly `new` tokens, greedily."""
    params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    return Running(prompt, params, new, frozenset(), decode, sink, time.monotonic() + DEADLINE_S, vocab_size)
