"""The environment profiles: what `ENVIRONMENT` changes of the settings' defaults."""

from __future__ import annotations

from collections.abc import Mapping

PROFILES: Mapping[str, Mapping[str, object]] = {
    "development": {
        "model": "DialoGPT-small", "precision": "fp32", "device": "cpu", "max_batch_size": 1,
        "max_new_tokens": 50, "temperature": 0.7, "debug": True, "log_level": "debug",
        "auth": "open", "sanitize": "clean",
        "limit_per_minute": 0, "limit_per_hour": 0, "limit_per_day": 0, "backup": False,
    },
    "staging": {
        "model": "DialoGPT-medium", "precision": "mixed", "device": "auto", "max_batch_size": 2,
        "max_new_tokens": 100, "temperature": 0.7, "debug": False, "log_level": "info",
        "auth": "keys", "sanitize": "clean",
        "limit_per_minute": 60, "limit_per_hour": 1_000, "limit_per_day": 10_000, "backup": False,
    },
    "production": {
        "model": "DialoGPT-medium", "precision": "mixed", "device": "auto", "max_batch_size": 4,
        "max_new_tokens": 200, "temperature": 0.7, "debug": False, "log_level": "info",
        "auth": "keys", "sanitize": "reject",
        "limit_per_minute": 60, "limit_per_hour": 1_000, "limit_per_day": 10_000, "backup": True,
    },
}  # fmt: skip
