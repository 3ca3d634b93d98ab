"""What a stack says about itself after a soak: its metrics, its audit log, its log's errors."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterable, Iterator

from tests.e2e.stack import Stack

MOST = 20  # errors of a log that are shown
TOLD_S = 2.5  # workers tell the process that is scraped once a second
EDGES = ("openai", "kserve", "grpc")
# a line of the gateway's or the supervisor's, JSON, or of Triton's: E1122 12:00:00.000000 …
_ERROR = re.compile(r'"level":\s*"(?:error|critical)"|^E\d{4} ')
_NO_GPU = "CudaDriverHelper has not been initialized"  # Triton's, at its start
_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def faults(stack: Stack) -> list[str]:
    """What is wrong with a stack that is not asked any more, a line each."""
    time.sleep(TOLD_S)
    try:
        _, _, metrics = stack.request("GET", "/metrics", port="OPS")
        found = of_metrics(metrics.decode())
    except OSError as error:
        found = [f"no metrics: {error}"]
    audited = stack.cli("audit", "verify", timeout=600)
    if audited.returncode != 0:
        found.append(f"audit verify: {audited.stdout}{audited.stderr}")
    for path in sorted((stack.home / "logs").glob("*.log*")):
        with path.open(errors="replace") as lines:
            found += [f"{path.name}: {line}" for line in itertools.islice(errors(lines), MOST)]
    return found


def of_metrics(text: str) -> list[str]:
    """No hang-up was recorded at an edge, or audit events were lost."""
    cancelled = dict.fromkeys(EDGES, 0.0)
    lost: float | None = None
    for name, labels, value in _SAMPLE.findall(text):
        of = dict(_LABEL.findall(labels))
        if name == "truthgpt_requests_total" and of["outcome"] == "cancelled":
            cancelled[of["edge"]] += float(value)
        if name == "truthgpt_audit_lost_total":
            lost = float(value)
    found = [f"no request was recorded as cancelled at the {edge} edge" for edge in EDGES if not cancelled[edge]]
    return found if lost == 0 else [*found, f"audit events were lost: {lost}"]


def errors(lines: Iterable[str]) -> Iterator[str]:
    """The lines of a log that say that something has failed."""
    return (line.strip()[:500] for line in lines if _ERROR.search(line) and _NO_GPU not in line)
