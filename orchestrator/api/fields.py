"""Checks of a body's fields, shared by the edges: each raises InvalidRequest that names the field and its limits."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from orchestrator.domain import Message
from orchestrator.errors import InvalidRequest, Text

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_TEXTS = 2048  # of one request to an encoder, as OpenAI has it
# What numbers may be, both ends included.
MAX_TOKENS = (1, 10_000_000)
TOP_K = (-1, 1_000_000)
TOP_P = (0.0, 1.0)
TOKEN_ID = (0, 2**31 - 1)
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Keys that clients send back with an assistant's turn; only empty ones are taken.
TURN_KEYS = {"refusal", "tool_calls", "function_call", "audio", "annotations", "reasoning_content"}


@dataclass(frozen=True)
class Defaults:
    """What a request that does not say gets."""

    temperature: float


def prompt(value: object, at: str) -> dict[str, Any]:
    """One prompt as the field of GenerateRequest that it fills."""
    if not value:
        raise InvalidRequest(Text(f"{at} must not be empty.", f"{at} no puede estar vacío."), at)
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, list) and all(is_int(token) and TOKEN_ID[0] <= token <= TOKEN_ID[1] for token in value):
        return {"token_ids": tuple(value)}
    raise wrong(at, "a string or a list of token ids", "un texto o una lista de identificadores de token")


def messages(value: object) -> tuple[Message, ...]:
    """A conversation of at least one turn."""
    if not isinstance(value, list) or not value:
        raise wrong("messages", "a list of at least one message", "una lista de al menos un mensaje")
    return tuple(_message(turn, f"messages[{index}]") for index, turn in enumerate(value))


def _message(turn: object, at: str) -> Message:
    if not isinstance(turn, dict):
        raise wrong(at, "an object", "un objeto")
    role = turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(f"{at}.role", f"one of {', '.join(ROLES)}", f"uno de {', '.join(ROLES)}")
    for name, value in turn.items():
        if name in ("role", "content", "name") or (name in TURN_KEYS and not value):
            continue
        shown = f"{at}.{name[:100]}"
        raise InvalidRequest(Text(f"{shown} is not supported here.", f"{shown} no está disponible aquí."), shown)
    content = turn.get("content")
    if isinstance(content, list):
        texts = [part["text"] for part in content if isinstance(part, dict) and _is_text_part(part)]
        if len(texts) == len(content):
            content = "".join(texts)
    if not isinstance(content, str):
        raise wrong(f"{at}.content", "a string or a list of text parts", "un texto o una lista de partes de texto")
    return Message(ROLES[role], content)


def _is_text_part(part: dict[str, Any]) -> bool:
    return set(part) == {"type", "text"} and part["type"] == "text" and isinstance(part["text"], str)


def stop(fields: dict[str, Any]) -> tuple[str, ...]:
    value = fields.get("stop", [])
    stops = [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not good or not all(isinstance(item, str) and 0 < len(item) <= MAX_STOP_CHARS for item in stops):
        raise wrong(
            "stop",
            f"a string or a list of at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters",
            f"un texto o una lista de hasta {MAX_STOPS} textos de 1 a {MAX_STOP_CHARS} caracteres",
        )
    return tuple(stops)


def sampling(
    temperature: tuple[float, float], seed: tuple[int, int]
) -> dict[str, Callable[[dict[str, Any]], object]]:  # fmt: skip
    """How each parameter is read where it is given, by its name; else it has its default. Both ends are included."""
    return {
        "max_tokens": lambda fields: integer(fields, "max_tokens", *MAX_TOKENS),
        "temperature": lambda fields: number(fields, "temperature", *temperature, 1.0),
        "top_p": top_p,
        "top_k": lambda fields: max(0, integer(fields, "top_k", *TOP_K) or 0),
        "seed": lambda fields: integer(fields, "seed", *seed),
        "stop": stop,
    }


def top_p(fields: dict[str, Any]) -> float:
    value = number(fields, "top_p", *TOP_P, 1.0)
    return value or 1e-6  # 0 keeps the likeliest token alone, and the backend's range is open there


def number(fields: dict[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise wrong(name, f"a number from {low:g} to {high:g}", f"un número de {low:g} a {high:g}")
    return float(value)


def integer(fields: dict[str, Any], name: str, low: int, high: int) -> int | None:
    value = fields.get(name)
    if value is not None and not (is_int(value) and low <= value <= high):
        raise wrong(name, f"an integer from {low} to {high}", f"un entero de {low} a {high}")
    return value


def boolean(fields: dict[str, Any], name: str, shown: str | None = None) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(shown or name, "true or false", "true o false")
    return bool(value)


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def unknown(name: str, known: Iterable[str]) -> InvalidRequest:
    """The refusal of a name that means nothing, with the nearest one that does."""
    shown = name[:100]
    near = difflib.get_close_matches(shown, list(known), n=1, cutoff=0.7)
    return InvalidRequest(
        Text(
            f"Unknown parameter: {shown!r}." + (f" Did you mean {near[0]!r}?" if near else ""),
            f"Parámetro desconocido: {shown!r}." + (f" ¿Quería decir {near[0]!r}?" if near else ""),
        ),
        shown,
    )


def too_many(name: str, given: int) -> InvalidRequest:
    """The refusal of more than MAX_TEXTS texts."""
    return InvalidRequest(
        Text(
            f"{name}: at most {MAX_TEXTS} texts a request; there are {given}.",
            f"{name}: se admiten {MAX_TEXTS} textos por petición como máximo; hay {given}.",
        ),
        name,
    )


def required(name: str) -> InvalidRequest:
    return InvalidRequest(Text(f"{name} is required.", f"Falta {name}."), name)


def wrong(name: str, expected_en: str, expected_es: str) -> InvalidRequest:
    return InvalidRequest(Text(f"{name} must be {expected_en}.", f"{name} debe ser {expected_es}."), name)
