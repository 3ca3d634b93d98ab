"""The sampling parameters that plain requests do without: how each is read, its limits and its default.

All edges read them here, and the OpenAPI document tells of the same limits. A parameter that is at its default is as
good as none, so that two requests that mean the same are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.api.fields import MAX_TOKENS, TOKEN_ID, boolean, integer, is_int, number, wrong
from orchestrator.errors import InvalidRequest, Text

MAX_BIASES = 300
MAX_STOP_TOKENS = 64
# What numbers may be, both ends included but for those that are above 0.
BIAS = (-100.0, 100.0)
LOGPROBS = (0, 20)
ANSWERS = (1, 16)
PRIORITY = (-1000, 1000)
MIN_TOKENS = (0, MAX_TOKENS[1])
MIN_P = (0.0, 1.0)
PENALTY = (-2.0, 2.0)
ABOVE_ZERO = {"typical_p": 1.0, "repetition_penalty": 10.0}  # the highest; 1 is off


def _float(name: str, low: float, high: float) -> Callable[[dict[str, Any]], Any]:
    return lambda fields: number(fields, name, low, high, 0.0) or None


def _above_zero(name: str) -> Callable[[dict[str, Any]], Any]:
    high = ABOVE_ZERO[name]

    def read(fields: dict[str, Any]) -> float | None:
        value = fields[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= high:
            raise wrong(
                name, f"a number above 0 and at most {high:g}", f"un número mayor que 0 y hasta {high:g}"
            )  # fmt: skip
        return None if value == 1 else float(value)

    return read


def _logit_bias(fields: dict[str, Any]) -> dict[str, float] | None:
    given = fields["logit_bias"]
    if not isinstance(given, dict) or len(given) > MAX_BIASES:
        raise wrong(
            "logit_bias",
            f"an object of at most {MAX_BIASES} biases, each by its token's id",
            f"un objeto de hasta {MAX_BIASES} sesgos, cada uno por el identificador de su token",
        )
    by_id = {}
    for key, bias in given.items():
        # one spelling of an id ("7", not "07"), so that none comes twice
        id = int(key) if key.isascii() and key.isdecimal() and len(key) <= 10 else -1
        if str(id) != key or id > TOKEN_ID[1]:
            raise wrong(
                "logit_bias",
                f"an object whose keys are token ids; {key[:20]!r} is none",
                f"un objeto cuyas claves son identificadores de token; {key[:20]!r} no lo es",
            )
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not BIAS[0] <= bias <= BIAS[1]:
            raise wrong(
                f"logit_bias.{key}", f"a number from {BIAS[0]:g} to {BIAS[1]:g}",
                f"un número de {BIAS[0]:g} a {BIAS[1]:g}",
            )  # fmt: skip
        if bias:
            by_id[id] = float(bias)
    return {str(id): by_id[id] for id in sorted(by_id)} or None


def _stop_token_ids(fields: dict[str, Any]) -> list[int] | None:
    given = fields["stop_token_ids"]
    good = isinstance(given, list) and len(given) <= MAX_STOP_TOKENS
    if not good or not all(is_int(id) and TOKEN_ID[0] <= id <= TOKEN_ID[1] for id in given):
        raise wrong(
            "stop_token_ids",
            f"a list of at most {MAX_STOP_TOKENS} token ids",
            f"una lista de hasta {MAX_STOP_TOKENS} identificadores de token",
        )
    return sorted(set(given)) or None


# What only the model reads, by name: the value in one form, None for the default. The field is there.
CONTROLS: Mapping[str, Callable[[dict[str, Any]], Any]] = {
    "frequency_penalty": _float("frequency_penalty", *PENALTY),
    "ignore_eos": lambda fields: boolean(fields, "ignore_eos") or None,
    "logit_bias": _logit_bias,
    "min_p": _float("min_p", *MIN_P),
    "min_tokens": lambda fields: integer(fields, "min_tokens", *MIN_TOKENS) or None,
    "presence_penalty": _float("presence_penalty", *PENALTY),
    "repetition_penalty": _above_zero("repetition_penalty"),
    "stop_token_ids": _stop_token_ids,
    "typical_p": _above_zero("typical_p"),
}
NAMES = frozenset((*CONTROLS, "n", "best_of", "priority", "logprobs"))


def control(fields: dict[str, Any], values: dict[str, Any]) -> None:
    """Read what is there of NAMES, but for `logprobs`, into the fields of a GenerateRequest. Raises InvalidRequest."""
    if NAMES.isdisjoint(fields):  # as of nearly all requests
        return
    pairs = ((name, read(fields)) for name, read in CONTROLS.items() if name in fields)
    values["controls"] = tuple(pair for pair in pairs if pair[1] is not None)
    most, least = values.get("max_tokens"), fields.get("min_tokens", 0)
    if most is not None and least > most:
        raise wrong(
            "min_tokens", f"an integer from 0 to max_tokens, which is {most}",
            f"un entero de 0 a max_tokens, que es {most}",
        )  # fmt: skip
    values["n"] = n = integer(fields, "n", *ANSWERS) or 1
    made = integer(fields, "best_of", n, ANSWERS[1]) or n
    if made > n:
        if values.get("stream"):
            raise InvalidRequest(
                Text(
                    "best_of above n cannot be streamed: the best answers are known at the end.",
                    "best_of mayor que n no admite stream: las mejores respuestas se conocen al final.",
                ),
                "best_of",
            )
        values["best_of"] = made
    values["priority"] = integer(fields, "priority", *PRIORITY) or 0
