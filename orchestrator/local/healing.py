"""What a failing model needs. Pure: evidence in, action out; time is a parameter.

Seen on the real server: when the backend's stub process is killed or stopped, Triton goes on saying that it is ready,
new requests fail or hang
and running streams neither end nor fail. Unloading and loading the model mends it. A stopped or dead server needs a
new process.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Action(Enum):
    WAIT = "wait"
    RELOAD = "reload the model"
    RESTART = "restart the server"


@dataclass(frozen=True)
class Evidence:
    """One look at a model. `failing_s`: seconds since its last good heartbeat. `stub_runs`, `server_runs`: the process
    exists and is not stopped. `server_answers`: Triton itself answered its liveness probe. `pending`: it was asked for
    a heartbeat and may still answer in time.
    """

    failing_s: float
    stub_runs: bool
    server_runs: bool
    server_answers: bool
    pending: bool = False


# Without proof of a dead process a model may just be slow, and a restart costs every running stream: wait longer.
SUSPECT_S = 1.0
PATIENCE_S = 6.0


def decide(evidence: Evidence) -> Action:
    """The mildest action that mends what the evidence shows."""
    if evidence.failing_s < SUSPECT_S:
        return Action.WAIT
    if not evidence.server_runs:
        return Action.RESTART
    if not evidence.stub_runs and evidence.server_answers:
        return Action.RELOAD
    if evidence.pending or evidence.failing_s < PATIENCE_S:
        return Action.WAIT
    return Action.RELOAD if evidence.server_answers else Action.RESTART


def backoff_s(failures: int) -> float:
    """Pause before the next attempt: none after the first failure, then 0.5 s doubling to 4 s.

    Short, because a model is to be back within 15 s of any fault.
    """
    return 0.0 if failures <= 1 else float(min(4.0, 0.5 * 2 ** min(failures - 2, 10)))
