"""What the engine has done since it began, for whoever watches it. Written by its thread alone, read without a lock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Tokens, steps and seconds are counted up; `last_step_s`, `kv_positions` (of running sequences) and
    `prefix_bytes` are what they are now.
    """

    prefill_tokens: int = 0  # fed as prompts, those fed again included
    decode_tokens: int = 0  # generated
    cached_tokens: int = 0  # of prompts, taken from the prefix cache
    drafted: int = 0
    accepted: int = 0  # of the drafted ones
    steps: int = 0
    step_s: float = 0.0
    last_step_s: float = 0.0
    kv_positions: int = 0
    prefix_bytes: int = 0
