"""From the wire's `sampling_parameters` to one frozen, checked value. Pure: no Triton, no tensors."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InvalidArgument

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_BIASES = 300
MAX_LOGPROBS = 20
MAX_ANSWERS = 16
MAX_TOKEN_ID = 2**31 - 1  # whether an id is in the vocabulary is checked where the model is known


@dataclass(frozen=True)
class SamplingParams:
    """How one request is generated. `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0, `typical_p` 1,
    `repetition_penalty` 1 and the other penalties 0 are off; `timeout_s` is in seconds; `ignore_eos` goes on past the
    model's end tokens. `logit_bias` has pairs of token id and what is added to its logit, `logprobs` the number of
    likeliest tokens that are told with each one, or None. Of `best_of` answers the best `n` are returned. A lower
    `priority` goes first.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    timeout_s: float | None = None
    ignore_eos: bool = False
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    n: int = 1
    best_of: int = 1
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    priority: int = 0


@dataclass(frozen=True)
class Prompt:
    """Exactly one of the three is set."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None


def parse(text_input: bytes, sampling_parameters: bytes | None) -> tuple[Prompt, SamplingParams]:
    """Check a request's text and its JSON object of parameters.

    Raises InvalidArgument naming the parameter and its limits; unknown names are refused.
    """
    try:
        text = text_input.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"text_input is not valid UTF-8 (byte {error.start})") from error
    given = _object(sampling_parameters)
    unknown = sorted(set(given) - set(_READERS) - {"messages", "prompt_token_ids"})
    if unknown:
        known = ", ".join([*sorted(_READERS), "messages", "prompt_token_ids"])
        raise InvalidArgument(f"unknown sampling parameter {unknown[0]!r:.80}; known: {known}")
    prompt = _prompt(text, given)
    values = {name: read(name, given[name]) for name, read in _READERS.items() if given.get(name) is not None}
    values.setdefault("seed", secrets.randbits(63))
    values.setdefault("best_of", values.get("n", 1))
    params = SamplingParams(**values)
    if params.best_of < params.n:
        raise InvalidArgument(f"best_of must be an integer from n ({params.n}) to {MAX_ANSWERS}, not {params.best_of}")
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise InvalidArgument(
            f"min_tokens must be an integer from 0 to max_tokens ({params.max_tokens}), not {params.min_tokens}"
        )
    return prompt, params


def _object(raw: bytes | None) -> dict[str, Any]:
    if not raw:
        return {}
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"sampling_parameters is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidArgument("sampling_parameters must be one JSON object")
    return value


def _prompt(text: str, given: Mapping[str, Any]) -> Prompt:
    messages, token_ids = given.get("messages"), given.get("prompt_token_ids")
    if sum((bool(text), messages is not None, token_ids is not None)) > 1:
        raise InvalidArgument("give one of text_input, messages and prompt_token_ids, not several")
    if messages is not None:
        return Prompt(messages=_messages(messages))
    if token_ids is not None:
        if not isinstance(token_ids, list) or not all(
            isinstance(t, int) and not isinstance(t, bool) for t in token_ids
        ):
            raise InvalidArgument("prompt_token_ids must be a list of integers")
        return Prompt(token_ids=tuple(token_ids))
    return Prompt(text=text)


def _messages(value: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise InvalidArgument("messages must be a non-empty list")
    for i, message in enumerate(value):
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str)
        ):
            raise InvalidArgument(f"messages[{i}] must be an object with a string role and a string content")
    return tuple(value)


def _integer(low: int, high: int) -> Callable[[str, Any], int]:
    def read(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InvalidArgument(f"{name} must be an integer from {low} to {high}, not {value!r:.80}")
        return value

    return read


def _number(low: float, high: float, above: bool = False) -> Callable[[str, Any], float]:
    def read(name: str, value: Any) -> float:
        # NaN fails the comparison; an integer beyond any float is compared exactly.
        good = not isinstance(value, bool) and isinstance(value, int | float) and low <= value <= high
        if not good or (above and value == low):
            bound = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
            raise InvalidArgument(f"{name} must be a number {bound}, not {value!r:.80}")
        return float(value)

    return read


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name} must be true or false, not {value!r:.80}")
    return value


def _top_k(name: str, value: Any) -> int:
    return max(0, _integer(-1, 1_000_000)(name, value))  # -1 and 0 both switch it off, as in vLLM


def _stop(name: str, value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARS for s in stops)
    ):
        raise InvalidArgument(
            f"{name} must be a string or a list of at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters"
        )
    return tuple(stops)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_STOP_TOKENS or not all(_is_token(t) for t in value):
        raise InvalidArgument(f"{name} must be a list of at most {MAX_STOP_TOKENS} token ids (integers from 0)")
    return tuple(value)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKEN_ID


def _logit_bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise InvalidArgument(f"{name} must be an object of at most {MAX_BIASES} entries, token id to bias")
    return tuple((_token_key(name, key), _bias(f"{name}[{key:.20}]", bias)) for key, bias in value.items())


def _token_key(name: str, key: str) -> int:
    # one spelling an id ("7", not "07"), so that no id comes twice
    token = int(key) if key.isascii() and key.isdecimal() and len(key) <= 10 else -1
    if str(token) != key or not _is_token(token):
        raise InvalidArgument(f"{name} must have token ids (integers from 0) as its keys, not {key!r:.80}")
    return token


_bias = _number(-100, 100)

_READERS: dict[str, Callable[[str, Any], Any]] = {
    "max_tokens": _integer(1, 10_000_000),
    "temperature": _number(0, 100),
    "top_k": _top_k,
    "top_p": _number(0, 1, above=True),
    "seed": _integer(-(2**63), 2**64 - 1),
    "stop": _stop,
    "timeout_s": _number(0, 86_400, above=True),
    "ignore_eos": _boolean,
    "min_p": _number(0, 1),
    "typical_p": _number(0, 1, above=True),
    "repetition_penalty": _number(0, 10, above=True),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": _logit_bias,
    "logprobs": _integer(0, MAX_LOGPROBS),
    "n": _integer(1, MAX_ANSWERS),
    "best_of": _integer(1, MAX_ANSWERS),
    "min_tokens": _integer(0, 10_000_000),
    "stop_token_ids": _token_ids,
    "priority": _integer(-1000, 1000),
}
