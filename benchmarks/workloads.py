"""What the engines are asked: lists of conversations of made-up tokens. Pure: the same arguments, the same tokens.

- **W**: C requests at once, prompts of 64 tokens, 64 new ones.
- **chat**: 16 clients with one system prompt of 512 tokens, 4 turns each; a turn adds 32 tokens of the user and 64
  generated ones, and begins when the last one has ended.
- **long**: C requests at once, prompts of 768 tokens, 32 new ones.
- **mixed**: lengths from a fixed table (prompts of 16 to 512 tokens, answers of 16 to 128), arriving as a Poisson
  process whether or not others have ended (open loop); reports goodput.

No two runs have a prompt in common, else a cache of prefixes would answer those of the run before.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

FIRST, LAST = 1000, 50_000  # token ids of prompts: words of the checkpoint's vocabulary
W_PROMPT = W_NEW = 64
SYSTEM, TURNS, USER, CHAT_NEW = 512, 4, 32, 64
LONG_PROMPT, LONG_NEW = 768, 32
MIXED_PROMPT, MIXED_NEW, MIXED_TABLE, MIXED_S = (16, 512), (16, 128), 64, 15.0
TTFT_S, PER_TOKEN_S = 1.0, 0.1  # a request of `mixed` is good when it meets both


@dataclass(frozen=True)
class Turn:
    """What is added to the prompt, and how many tokens are generated."""

    tokens: tuple[int, ...]
    new: int


@dataclass(frozen=True)
class Conversation:
    """Turns one after the other; the first is due `at_s` seconds after the start."""

    at_s: float
    turns: tuple[Turn, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Workload:
    """`loads` are numbers of clients, or requests a second where `open_loop`; `make(load, seed)` gives conversations.

    `max_len`: what a model's context must hold. `together`: engines that take whole batches only can run it. `prefix`:
    its prompts begin alike. `rounds`: no more than these.
    """

    name: str
    loads: tuple[float, ...]
    max_len: int
    make: Callable[[float, str], list[Conversation]]
    open_loop: bool = False
    together: bool = True
    prefix: bool = False
    rounds: int = 100


def _words(draw: random.Random, count: int) -> tuple[int, ...]:
    return tuple(draw.randrange(FIRST, LAST) for _ in range(count))


def _alike(prompt: int, new: int) -> Callable[[float, str], list[Conversation]]:
    def make(clients: float, seed: str) -> list[Conversation]:
        draw = random.Random(f"{seed} {prompt}")
        return [Conversation(0.0, (Turn(_words(draw, prompt), new),)) for _ in range(int(clients))]

    return make


def chat(clients: float, seed: str) -> list[Conversation]:
    """One system prompt for all of a run's clients."""
    draw = random.Random(f"{seed} chat")
    system = _words(draw, SYSTEM)
    found = []
    for _ in range(int(clients)):
        turns = [Turn(_words(draw, USER), CHAT_NEW) for _ in range(TURNS)]
        turns[0] = Turn(system + turns[0].tokens, CHAT_NEW)
        found.append(Conversation(0.0, tuple(turns)))
    return found


def lengths() -> list[tuple[int, int]]:
    """The table of `mixed`: prompt and answer, each log-uniform in its range."""
    draw = random.Random("lengths")

    def one(low: int, high: int) -> int:
        return round(math.exp(draw.uniform(math.log(low), math.log(high))))

    return [(one(*MIXED_PROMPT), one(*MIXED_NEW)) for _ in range(MIXED_TABLE)]


def mixed(rate: float, seed: str) -> list[Conversation]:
    """Arrivals for MIXED_S seconds at `rate` a second. Their number is `rate` x MIXED_S and the table's rows come in
    turn, so that every run has the same work; when they come differs.
    """
    draw, table, at_s, found = random.Random(f"{seed} mixed"), lengths(), 0.0, []
    for number in range(round(rate * MIXED_S)):
        prompt, new = table[number % len(table)]
        found.append(Conversation(at_s, (Turn(_words(draw, prompt), new),)))
        at_s += draw.expovariate(rate)
    return found


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W", (1, 8, 16), 256, _alike(W_PROMPT, W_NEW)),
        Workload("chat", (16,), 1024, chat, together=False, prefix=True, rounds=3),
        Workload("long", (1, 4), 1024, _alike(LONG_PROMPT, LONG_NEW)),
        Workload("mixed", (2, 4, 6), 1024, mixed, open_loop=True, together=False, rounds=3),
    )
}
