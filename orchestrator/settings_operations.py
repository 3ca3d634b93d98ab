"""The settings of what keeps a deployment well: monitoring, alerts, maintenance, backups. `Settings` has them all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestrator.spec import setting

_RATIO = {"minimum": 0.01, "maximum": 1.0}
_DAYS = {"minimum": 0, "maximum": 36_500}
_ADDRESS = r"[^@\s,<>\"]+@[^@\s,<>\"]+"


@dataclass(frozen=True, repr=False)
class OperationsSettings:
    """Durations are seconds (`_s`) or days (`_days`), sizes bytes, ratios between 0 and 1."""

    monitoring: bool = setting(True, "Watch the stack, raise alerts and keep a metric history.")
    alert_interval_s: float = setting(10.0, "Pause between two looks at the alerts.", minimum=0.2, maximum=3600.0)
    alert_memory: float = setting(0.9, "Part of the machine's or container's memory that raises an alert.", **_RATIO)
    alert_gpu_memory: float = setting(0.95, "Part of a GPU's memory that raises an alert.", **_RATIO)
    alert_disk: float = setting(0.9, "Part of a disk in use that raises an alert.", **_RATIO)
    alert_error_rate: float = setting(0.1, "Part of the last five minutes' requests that failed.", **_RATIO)
    alert_error_requests: int = setting(
        100, "Requests in five minutes below which the error rate raises no alert.", minimum=1, maximum=10**9
    )
    alert_queue: int = setting(
        32, "Requests waiting for a model that raise an alert after a minute.", minimum=1, maximum=10**6
    )
    alert_backup_age_s: float = setting(
        172_800.0, "Age of the newest backup that raises an alert, where backups are made.", minimum=60.0,
        maximum=31_536_000.0,
    )  # fmt: skip
    alert_repeat_s: float = setting(
        14_400.0, "Pause before an alert that still fires is sent again.", minimum=60.0, maximum=31_536_000.0
    )
    alert_timeout_s: float = setting(5.0, "Deadline of one attempt to send an alert.", minimum=0.1, maximum=60.0)
    alert_retries: int = setting(
        3, "Further attempts to send an alert, each after twice the pause of the one before.", minimum=0, maximum=10
    )
    alert_webhook_url: str | None = setting(
        None, "URL that alerts are posted to as JSON.", secret=True, pattern=r"https?://.+"
    )
    alert_slack_url: str | None = setting(
        None, "Incoming webhook of Slack, or of a service that takes the same.", secret=True, pattern=r"https?://.+"
    )
    alert_email_to: str | None = setting(
        None, "Comma-separated addresses that alerts are mailed to; needs smtp_url.",
        pattern=rf"{_ADDRESS}(\s*,\s*{_ADDRESS})*",
    )  # fmt: skip
    alert_email_from: str = setting("truthgpt@localhost", "Sender of the mails.", pattern=_ADDRESS)
    smtp_url: str | None = setting(
        None, "Mail server: smtp://[USER:PASSWORD@]HOST[:PORT], with STARTTLS where it offers that, or smtps://.",
        secret=True, pattern=r"smtps?://.+",
    )  # fmt: skip
    maintenance: bool = setting(True, "Run the scheduled jobs: cleaning up, adapting the cache, checking the backups.")
    schedules: str | None = setting(
        None, "Other times for jobs, UTC: NAME=CRON, several separated by semicolons; NAME=off leaves one out.",
        pattern=r"\s*[a-z_]+\s*=[^;=]+(;\s*[a-z_]+\s*=[^;=]+)*;?\s*",
    )  # fmt: skip
    log_days: int = setting(7, "Rotated log files older than that are removed; 0 keeps them.", **_DAYS)
    cache_file_age_s: float = setting(
        86_400.0, "Files in home/cache older than that are removed; 0 keeps them.", minimum=0.0, maximum=31_536_000.0
    )
    temporary_age_s: float = setting(
        3600.0, "What interrupted work has left is removed once it is older than that.", minimum=60.0,
        maximum=31_536_000.0,
    )  # fmt: skip
    metrics_days: int = setting(30, "Days of metric history that are kept; 0 keeps all.", **_DAYS)
    audit_days: int = setting(0, "Whole files of the audit log older than that are removed; 0 keeps them.", **_DAYS)
    keep_versions: int = setting(
        3, "Newest versions of each model that are kept; 0 keeps all. One that is loaded is never removed.", minimum=0,
        maximum=1000,
    )  # fmt: skip
    backup: bool = setting(False, "Make a backup every day.")
    backup_dir: Path | None = setting(None, "Folder of the backups. Unset: home/backups.")
    backup_models: bool = setting(True, "Have the model repository in the scheduled backups.")
    backup_days: int = setting(30, "Backups older than that are removed, but never the newest; 0 keeps them.", **_DAYS)
    backup_keep: int = setting(10, "Backups that are kept at most; 0 keeps all.", minimum=0, maximum=10_000)
    backup_key: str | None = setting(
        None, "Key that backups are encrypted with: an age identity (AGE-SECRET-KEY-1…). Unset: not encrypted.",
        secret=True, pattern=r"AGE-SECRET-KEY-1[02-9AC-HJ-NP-Z]{58}",
    )  # fmt: skip
