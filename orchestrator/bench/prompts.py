"""Prompts: made of plain words, each different from all others and of the length that was asked for, or from a file.

How many words make so many tokens only the server's tokeniser knows; `size` finds it out by asking.
"""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from orchestrator.bench.plan import PlanError, Prompt

# Short and common: one token each with most tokenisers. None twice: they are the digits of a prompt's number.
WORDS = tuple(
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil its now find long down day did get come made may part over new "
    "sound take only little work know place year live me back give most very after thing our just name good man think "
    "say great where help through much before line right too mean old any same tell boy follow came want show also "
    "around form three small set put end does another well large must big even such because turn here why ask went "
    "men read need land home us move try kind hand picture again change off play air away house point page".split()
)
MAX_FILE_BYTES = 64 << 20
MAX_FILE_PROMPTS = 100_000
NEAR = 0.02  # of the tokens that were asked for
ATTEMPTS = 6
MOST_WORDS = 4  # for each token that was asked for, whatever a server says it counts
_RING = 20_000


@dataclass(frozen=True)
class Sizing:
    """How long prompts are made: `words` give about `tokens`, None where the server does not count them."""

    words: int
    tokens: int | None


class Prompts:
    """Prompts by number, in order: the same seed gives the same ones. No two of a seed begin alike.

    The first word counts fastest, so that a server which keeps prefixes finds none of them again.
    """

    def __init__(self, seed: str, words: int) -> None:
        rng = random.Random(f"truthgpt-bench {seed}")  # noqa: S311  no secret
        self._words = words
        self._offset = rng.randrange(len(WORDS) ** 4)
        self._ring = rng.choices(WORDS, k=_RING + words)
        self._next = 0

    def take(self) -> Prompt:
        """The next prompt."""
        number, self._next = self._next, self._next + 1
        rest, head = number + self._offset, []
        for _ in range(min(5, self._words)):
            rest, digit = divmod(rest, len(WORDS))
            head.append(WORDS[digit])
        start = number * 7919 % _RING  # a prime: neighbours have other parts of the ring
        return Prompt(" ".join([*head, *self._ring[start : start + self._words - len(head)]]))


class Given:
    """Prompts from a file, in order and over again."""

    def __init__(self, prompts: tuple[Prompt, ...]) -> None:
        self._prompts, self._next = prompts, 0

    def take(self) -> Prompt:
        number, self._next = self._next, self._next + 1
        return self._prompts[number % len(self._prompts)]


async def size(tokens: int, ask: Callable[[int], Awaitable[int | None]]) -> Sizing:
    """How many words a prompt of `tokens` has. `ask` sends one of so many words and returns the server's count.

    Tokens grow in a straight line with words from what a template adds: two points draw it, the others correct it.
    """
    words, points = min(8, tokens), dict[int, int]()
    for _ in range(ATTEMPTS):
        count = await ask(words)
        if count is None:
            return Sizing(tokens, None)
        points[words] = count
        if abs(count - tokens) <= max(0.5, NEAR * tokens):
            break
        words = min(_towards(tokens, points), MOST_WORDS * tokens)
        if words in points:
            break
    best = min(points, key=lambda key: abs(points[key] - tokens))
    return Sizing(best, points[best])


def _towards(tokens: int, points: dict[int, int]) -> int:
    """The number of words that the line through the two points nearest to `tokens` promises."""
    if len(points) == 1:
        ((words, count),) = points.items()
        # half the way: a longer prompt than asked for might not fit the model
        guess = round(words + (tokens - count) // 2 * words / count) if count else words
        return max(1, min(guess, words - 1) if count > tokens else max(guess, words + 1))
    (w0, t0), (w1, t1) = sorted(points.items(), key=lambda point: abs(point[1] - tokens))[:2]
    slope = (t1 - t0) / (w1 - w0)  # none between neighbours that happen to have as many: a token a word, then
    return max(1, round(w0 + (tokens - t0) / (slope if slope > 0 else 1)))


def read_file(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a JSONL file: each line a string, {"prompt": text} or {"messages": [{"role", "content"}]}.

    Raises PlanError naming the line, and OSError.
    """
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)  # of a pipe nobody knows the size
    if len(data) > MAX_FILE_BYTES:
        raise PlanError(f"{path}: larger than {MAX_FILE_BYTES} bytes", "give a part of it")
    try:
        lines = enumerate(data.decode().split("\n"), 1)
        prompts = [_prompt(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: not UTF-8", "convert it with iconv") from error
    if not 0 < len(prompts) <= MAX_FILE_PROMPTS:
        raise PlanError(f"{path}: {len(prompts)} prompts", f"give from 1 to {MAX_FILE_PROMPTS}")
    return tuple(prompts)


def _prompt(line: str, where: str) -> Prompt:
    hint = 'a line is a JSON string, {"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{where}: not JSON", hint) from error
    if isinstance(value, dict) and isinstance(turns := value.get("messages"), list) and turns:
        pairs = [(turn.get("role"), turn.get("content")) for turn in turns if isinstance(turn, dict)]
        good = [(role, content) for role, content in pairs if _text(role) and (content == "" or _text(content))]
        if len(good) == len(turns):
            return Prompt(turns=tuple(good))
    text = value.get("prompt") if isinstance(value, dict) else value
    if not _text(text):
        raise PlanError(f"{where}: no prompt", hint)
    return Prompt(text)


def _text(value: object) -> TypeGuard[str]:
    """Whether it is a text that can be sent."""
    return isinstance(value, str) and bool(value) and not any("\ud800" <= letter <= "\udfff" for letter in value)
