"""The alerts: what each means, how bad it is and how long it must hold. Which of them hold is in conditions.py.

The names are those of the rules for Prometheus in deploy/alerts.yml, so that one page of advice serves both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

CRITICAL, WARNING = "critical", "warning"


@dataclass(frozen=True)
class Rule:
    """One alert. It is raised once it has held for `for_s` seconds.

    `shared`: it is the whole deployment's, and told once however many replicas see it; else each machine has its own.
    `advice` is what to do first.
    """

    name: str
    severity: str
    for_s: float
    summary: str
    advice: str
    shared: bool = False

    @property
    def runbook(self) -> str:
        """Where in the documentation its advice is."""
        return f"docs/operations.md#{self.name.lower()}"


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "TruthGPTMemoryHigh", WARNING, 30.0, "The memory of the machine or container is nearly used up.",
            "See what takes it; run fewer workers, or export the model with fewer slots.",
        ),
        Rule(
            "TruthGPTGpuMemoryHigh", WARNING, 30.0, "The memory of a GPU is nearly used up.",
            "See what else runs on it (`nvidia-smi`); unload a model, or export it with fewer slots.",
        ),
        Rule(
            "TruthGPTErrorRateHigh", CRITICAL, 0.0, "Many of the last five minutes' requests failed.",
            "Look for their errors in the logs (`truthgpt audit tail --event error`), then run `truthgpt doctor`.",
        ),
        Rule(
            "TruthGPTQueueLong", WARNING, 60.0, "Many requests wait for a model.",
            "Add a replica or slots; see who sends so many (`truthgpt limits`).", shared=True,
        ),
        Rule(
            "TruthGPTBreakerOpen", CRITICAL, 0.0, "A model failed several times in a row and is being left alone.",
            "Find out why it fails (`truthgpt breaker show`, Triton's log); after a pause the next request tries it.",
            shared=True,
        ),
        Rule(
            "TruthGPTRedisAway", CRITICAL, 10.0, "Redis does not answer.",
            "Start Redis again or mend the way to it; requests go on without limits that are shared and without cache.",
            shared=True,
        ),
        Rule(
            "TruthGPTTritonAway", CRITICAL, 30.0, "Triton does not answer.",
            "Look at the end of Triton's log; the supervisor starts it again by itself.",
        ),
        Rule(
            "TruthGPTModelNotReady", CRITICAL, 30.0, "A model does not answer heartbeats.",
            "See what Triton's log says of it, then reload it (`truthgpt models reload`).", shared=True,
        ),
        Rule(
            "TruthGPTModelOnFallback", WARNING, 0.0, "A model runs on the CPU because its device failed.",
            "Mend the device, then reload the model.", shared=True,
        ),
        Rule(
            "TruthGPTDiskFull", CRITICAL, 0.0, "A disk is nearly full.",
            "Free space there, or have old files removed sooner.",
        ),
        Rule(
            "TruthGPTBackupTooOld", WARNING, 0.0, "There is no backup, or the newest is too old.",
            "See why the last one failed, and make one by hand.", shared=True,
        ),
        Rule(
            "TruthGPTJobFailing", WARNING, 0.0, "The last run of a scheduled job failed.",
            "Read its error, mend the cause and run the job by hand.", shared=True,
        ),
        Rule(
            "TruthGPTWorkerDown", CRITICAL, 60.0, "A worker of the gateway is silent or does not run.",
            "Look at the end of the gateway's log; the others serve on.",
        ),
        Rule(
            "TruthGPTAuditAway", CRITICAL, 0.0, "The audit log cannot be written.",
            "See the reason (`truthgpt status`, /health): most often the disk is full. Events wait, but not for ever.",
        ),
        Rule(
            "TruthGPTLimitsDegraded", WARNING, 60.0, "Limits are decided without Redis.",
            "See why Redis is slow or away; until then `redis_loss` says what holds.",
        ),
        Rule(
            "TruthGPTNotificationsFailing", WARNING, 0.0, "Messages about alerts do not arrive.",
            "Try the senders (`truthgpt alerts test`) and correct their settings.",
        ),
    )
}  # fmt: skip


def identity(name: str, labels: Mapping[str, str], host: str) -> str:
    """What makes two sightings one alert: name and labels, and the host where it is a machine's own."""
    rule = RULES.get(name)
    own = {**labels, **({} if rule is not None and rule.shared else {"@host": host})}
    text = "\0".join([name, *(f"{key}\0{own[key]}" for key in sorted(own))])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]
