"""What figures can be compared within: the same entry, set the same but for what is tuned, on the same machine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict

import psutil

from orchestrator import engines, models, pbtxt
from orchestrator.models import Entry, Version
from orchestrator.ops.tune import editing
from orchestrator.ops.tune.figures import Workload
from orchestrator.ops.tune.history import Subject
from orchestrator.ops.tune.knobs import Knob, Room

GB = 1 << 30


def room() -> Room:
    """What a candidate has to fit into here."""
    return Room(len(os.sched_getaffinity(0)), int(psutil.virtual_memory().available))


def subject_of(entry: Entry, version: Version, source: str, given: Sequence[Knob], workload: Workload) -> Subject:
    """Raises ModelsError when a manifest cannot be read."""
    config = editing.expected(pbtxt.model_config(pbtxt.parse(source)), {knob.place: "0" for knob in given})
    engine = models.engine_of(entry.folder.parent, version)
    parts = [version.digest, engine[1].digest if engine is not None else "", json.dumps(config, sort_keys=True)]
    return Subject(entry.name, _digest("\n".join(parts)), machine(), **asdict(workload))


def machine() -> str:
    """The processor, its cores that may be used, memory and GPUs."""
    memory = round(psutil.virtual_memory().total / GB)
    return f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {memory} GiB, {engines.this_machine()}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:  # no /proc
        pass
    return os.uname().machine


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
