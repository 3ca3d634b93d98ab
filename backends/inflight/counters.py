"""What an engine has done since it was started, counted by its own thread and read by any other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Sums that never fall. Only the engine's thread adds to them, so that a step costs a few additions and no lock;
    whoever reads gets each sum whole, and two of them perhaps of one step apart.
    """

    steps: int = 0
    step_seconds: float = 0.0
    prefill_tokens: int = 0  # read by the model as prompts, those of a cache that was lost once more
    decode_tokens: int = 0  # generated
    cached_tokens: int = 0  # of prompts, taken from the prefix cache in place of reading them
    drafted: int = 0  # guessed ahead of the model by speculation
    accepted: int = 0  # of those, as the model itself would have gone on
