"""Every series of the gateway: name, kind, labels, meaning, how the workers' gauges become one, what to watch it for.

The names follow SYSTEM's own and OpenTelemetry's meanings for generative AI. A label is a model that is served, a task,
an operation, an edge, an outcome, a state, a stage or an error's kind: never a user, a key, a session or a request.
"""

from __future__ import annotations

from dataclasses import dataclass

TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
QUEUE_S = (*TTFT_S, 30.0, 60.0, 120.0)
DURATION_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0,
)  # fmt: skip
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
OVERHEAD_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
STAGE_S = (*OVERHEAD_S, 2.5, 10.0, 60.0)


@dataclass(frozen=True)
class Series:
    """`kind` is counter, gauge or histogram; `merge` is how the workers' gauges become one: sum, max or min.

    `alert` says in words when to wake somebody. Values are seconds, bytes or plain numbers, as the name ends.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str
    alert: str = ""
    merge: str = "sum"
    buckets: tuple[float, ...] = ()


def _counter(name: str, labels: str, help: str, alert: str = "") -> Series:
    return Series(name, "counter", tuple(labels.split()), help, alert)


def _gauge(name: str, labels: str, merge: str, help: str, alert: str = "") -> Series:
    return Series(name, "gauge", tuple(labels.split()), help, alert, merge)


def _histogram(name: str, labels: str, buckets: tuple[float, ...], help: str, alert: str = "") -> Series:
    return Series(name, "histogram", tuple(labels.split()), help, alert, buckets=buckets)


TABLE: dict[str, Series] = {
    series.name: series
    for series in (
        # requests
        _counter(
            "truthgpt_requests_total", "endpoint edge outcome",
            "Requests that have ended, by operation, protocol and outcome: ok, refused (the request or its caller was "
            "at fault), error (the service was) or cancelled.",
        ),
        _gauge(
            "truthgpt_error_rate", "", "max", "Part of the requests of the last five minutes whose outcome was error.",
            "above 0.1 while at least 100 requests came in five minutes",
        ),
        _counter(
            "truthgpt_errors_total", "kind",
            "Errors and refusals by kind, those before the request path (credentials, paths, headers) included.",
            "growing for `internal`; growing far faster than usual for `unauthenticated`",
        ),
        _histogram(
            "truthgpt_request_duration_seconds", "model endpoint outcome", DURATION_S,
            "Time from accepting a request to its end.",
        ),
        _counter("truthgpt_generations_total", "model_name status",
                 "Generations that have ended; the status is their outcome."),
        _histogram(
            "truthgpt_generation_duration_seconds", "model_name", DURATION_S,
            "Time from accepting a request to the end of its answer, where it was ok, cached or not.",
        ),
        _histogram(
            "truthgpt_time_to_first_token_seconds", "model", TTFT_S,
            "Time from accepting a request to the first text of an answer that the model generated for it.",
            "above what you promise, at the 95th percentile",
        ),
        _histogram(
            "truthgpt_time_per_output_token_seconds", "model", TOKEN_S,
            "Mean time between the tokens of an answer after the first one; the client's reading included.",
        ),
        _histogram(
            "truthgpt_queue_seconds", "model", QUEUE_S,
            "Time in the model's queue; 0 for a request that had a slot at once.",
            "above a second at the 95th percentile: add a replica or slots",
        ),
        _histogram(
            "truthgpt_overhead_seconds", "endpoint", OVERHEAD_S,
            "The gateway's own part of a request before Triton is asked; of one that is answered without it, all.",
            "above 5 ms at the median: the machine is too busy, or Redis slow",
        ),
        _histogram("truthgpt_stage_seconds", "stage", STAGE_S, "Time in each stage of the request path."),
        _counter(
            "truthgpt_tokens_total", "model kind",
            "Tokens: prompt (read by the model), completion (generated), cached (answered without the model).",
        ),
        _counter("truthgpt_fallbacks_total", "model", "Answers that another model or a fixed text gave for this model.",
                 "growing"),
        _gauge("truthgpt_in_flight", "", "sum", "Requests that are being answered.",
               "near `max_concurrency` times the workers: further ones get 503"),
        # what is upstream
        _counter(
            "truthgpt_upstream_requests_total", "model outcome",
            "Attempts at Triton, retries included: ok, error or cancelled.",
        ),
        _gauge("truthgpt_breaker_state", "model", "max", "Circuit breaker: 0 closed, 1 half-open, 2 open.",
               "2 for a minute"),
        _gauge("truthgpt_model_ready", "model", "min", "1 while the model answers every worker's heartbeats.",
               "0 for half a minute"),
        _gauge("truthgpt_model_fallback", "model", "max",
               "1 while the model runs on the CPU because its device failed.", "1: mend the device, reload the model"),
        _gauge("truthgpt_model_requests", "model state", "max",
               "Requests in the model's slots (running) and in its queue (waiting).",
               "above 0 for minutes while waiting: scale out"),
        _gauge("truthgpt_triton_up", "", "min", "1 while Triton, or any of several servers, answers every worker.",
               "0 for half a minute"),
        _gauge("truthgpt_triton_servers", "state", "max",
               "Triton servers that take requests (ready), failed and rest (ejected), take no new ones (draining) or "
               "do not answer (down); where workers differ the largest of their counts.",
               "above 0 for minutes while ejected or down"),
        _counter("truthgpt_triton_failovers_total", "",
                 "Requests that were sent to another Triton server because the first one failed or was full.",
                 "growing"),
        _counter("truthgpt_triton_lookup_failures_total", "",
                 "Look-ups of a name in `triton_urls` that failed or found nothing.", "growing for minutes"),
        # cache and limits
        _counter("truthgpt_cache_requests_total", "task result",
                 "Requests by what the cache had: hit, miss, or bypass where it was not asked."),
        _counter(
            "truthgpt_limit_decisions_total", "endpoint outcome",
            "Requests of callers with limits: allowed, refused, or shadow (let in where a limit would have refused).",
            "growing far faster than usual for `refused`",
        ),
        _gauge("truthgpt_limit_degraded", "", "max", "1 while a worker decides limits without Redis.",
               "1 for a minute"),
        _counter("truthgpt_limit_without_redis_total", "",
                 "Requests of callers with limits that were decided without Redis, as `redis_loss` says."),
        _gauge("truthgpt_redis_up", "", "min", "1 while Redis answers every worker; absent where none is configured.",
               "0 for a minute"),
        _gauge("truthgpt_redis_memory_usage_bytes", "", "max", "Memory that Redis uses for its data."),
        # audit
        _gauge("truthgpt_audit_up", "", "min", "1 while every worker can write the audit log; absent where it is off.",
               "0"),
        _counter("truthgpt_audit_lost_total", "", "Events that could not be written into the audit log.", "growing"),
        # processes
        _gauge("truthgpt_workers", "state", "sum",
               "Workers that say how they are (up), that have not for three seconds (silent), that do not run (down).",
               "above 0 for a minute while silent or down"),
        _gauge("truthgpt_workers_ready", "", "sum", "Workers that would take a request now.", "0"),
        _counter("truthgpt_worker_restarts_total", "", "Workers that were started in place of one that had ended.",
                 "growing"),
        _gauge("truthgpt_memory_usage_bytes", "", "sum", "Resident memory of the gateway's processes."),
        _gauge("truthgpt_system_memory_used_bytes", "", "max",
               "Memory in use that cannot be had back: of the container where it has a limit, else of the machine.",
               "above 0.9 of `truthgpt_system_memory_total_bytes`"),
        _gauge("truthgpt_system_memory_total_bytes", "", "max", "Memory that the container or the machine has."),
        _gauge("truthgpt_gpu_memory_usage_bytes", "gpu", "max",
               "Memory in use on each NVIDIA GPU, by its number; absent where there is none.",
               "above 0.95 of `truthgpt_gpu_memory_total_bytes`"),
        _gauge("truthgpt_gpu_memory_total_bytes", "gpu", "max", "Memory of each NVIDIA GPU."),
        _gauge("truthgpt_disk_free_bytes", "folder", "min",
               "Free space where the home, the model repository and the backups are.",
               "below 0.1 of `truthgpt_disk_total_bytes`"),
        _gauge("truthgpt_disk_total_bytes", "folder", "max", "Size of the file systems where these folders are."),
        _counter("truthgpt_cpu_seconds_total", "", "CPU time of the gateway's processes."),
        # operating
        _gauge("truthgpt_active_users", "", "max",
               "Callers with a request in the last five minutes, over all replicas; approximate, to within 2 %."),
        _gauge("truthgpt_alerts_firing", "severity", "sum", "Alerts of the built-in watcher that fire now."),
        _counter("truthgpt_notifications_total", "sender outcome",
                 "Messages about alerts by how they were sent (webhook, slack, email): ok or error.",
                 "growing for `error`"),
        _gauge("truthgpt_job_last_run_timestamp_seconds", "name", "max", "When each job last ended, as Unix time."),
        _gauge("truthgpt_job_last_success_timestamp_seconds", "name", "max",
               "When each job last ended well, as Unix time."),
        _gauge("truthgpt_job_failing", "name", "max", "1 while a job's last run is one that failed.", "1"),
        _gauge("truthgpt_backup_newest_timestamp_seconds", "", "max",
               "When the newest backup was made, as Unix time; 0 while there is none, absent where none are made.",
               "older than two days"),
        _gauge("truthgpt_build_info", "version python", "max", "1, with the version of the gateway and of Python."),
    )
}  # fmt: skip
