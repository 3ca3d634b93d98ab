"""OpenAI's completion and chat bodies -> GenerateRequest. What is not supported is refused by name, never dropped."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.api.http import Exchange
from orchestrator.domain import GenerateRequest, Message
from orchestrator.errors import InvalidRequest, Text

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_PROMPTS = 64
_SAMPLING = {"model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options"}
# Taken and without effect: they describe the caller or where the answer is kept, not the answer.
_IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
# Not supported: only the values that ask for nothing are taken (null always is).
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (1,), "logit_bias": ({},), "presence_penalty": (0, 0.0), "frequency_penalty": (0, 0.0),
}  # fmt: skip
_NEUTRAL_COMPLETION: Mapping[str, tuple[object, ...]] = {
    **_NEUTRAL, "best_of": (1,), "echo": (False,), "suffix": (), "logprobs": (),
}  # fmt: skip
_NEUTRAL_CHAT: Mapping[str, tuple[object, ...]] = {
    **_NEUTRAL, "logprobs": (False,), "top_logprobs": (), "response_format": ({"type": "text"},), "tools": ([],),
    "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],),
    "audio": (), "prediction": (), "reasoning_effort": (), "verbosity": (), "web_search_options": (),
}  # fmt: skip
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Keys that clients send back with an assistant's turn; only empty ones are taken.
_TURN_KEYS = {"refusal", "tool_calls", "function_call", "audio", "annotations", "reasoning_content"}


@dataclass(frozen=True)
class Defaults:
    """What a request that does not say gets."""

    temperature: float


@dataclass(frozen=True)
class Call:
    """A parsed body: what to generate, one request a prompt, and how to write it out."""

    requests: tuple[GenerateRequest, ...]
    include_usage: bool

    @property
    def request(self) -> GenerateRequest:
        """The first request; all of them share everything but the prompt and the id."""
        return self.requests[0]


def completion(body: dict[str, Any], exchange: Exchange, defaults: Defaults) -> Call:
    """`POST /v1/completions`. Raises InvalidRequest naming the parameter."""
    fields = _known(body, _SAMPLING | {"prompt"}, _NEUTRAL_COMPLETION)
    value = fields.get("prompt")
    if value is None:
        raise _required("prompt")
    if not isinstance(value, list) or not any(isinstance(item, (str, list)) for item in value):
        return _call(fields, exchange, defaults, **_prompt(value, "prompt"))
    if len({type(item) for item in value}) > 1:
        raise _wrong(
            "prompt",
            "a string, a list of token ids, or a list of either kind alone",
            "un texto, una lista de identificadores de token o una lista de una sola de estas clases",
        )
    if len(value) > MAX_PROMPTS:
        raise InvalidRequest(
            Text(
                f"prompt: at most {MAX_PROMPTS} prompts a request; there are {len(value)}.",
                f"prompt: se admiten {MAX_PROMPTS} textos por petición como máximo; hay {len(value)}.",
            ),
            "prompt",
        )
    if len(value) == 1:
        return _call(fields, exchange, defaults, **_prompt(value[0], "prompt"))
    prompts = [_prompt(item, f"prompt[{index}]") for index, item in enumerate(value)]
    call = _call(fields, exchange, defaults, **prompts[0])
    requests = (replace(call.request, id=f"{exchange.id}-{index}", **item) for index, item in enumerate(prompts))
    return replace(call, requests=tuple(requests))


def chat(body: dict[str, Any], exchange: Exchange, defaults: Defaults) -> Call:
    """`POST /v1/chat/completions`. Raises InvalidRequest naming the parameter."""
    fields = _known(body, _SAMPLING | {"messages", "max_completion_tokens"}, _NEUTRAL_CHAT)
    turns = fields.get("messages")
    if turns is None:
        raise _required("messages")
    if not isinstance(turns, list) or not turns:
        raise _wrong("messages", "a list of at least one message", "una lista de al menos un mensaje")
    messages = tuple(_message(turn, f"messages[{index}]") for index, turn in enumerate(turns))
    old, new = fields.get("max_tokens"), fields.pop("max_completion_tokens", None)
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            Text(
                "max_tokens and max_completion_tokens differ; send one of them.",
                "max_tokens y max_completion_tokens no coinciden; envíe solo uno.",
            ),
            "max_tokens",
        )
    if new is not None:
        fields["max_tokens"] = _integer(fields | {"max_completion_tokens": new}, "max_completion_tokens", 1, 10_000_000)
    return _call(fields, exchange, defaults, messages=messages)


def _known(body: dict[str, Any], names: set[str], neutral: Mapping[str, tuple[object, ...]]) -> dict[str, Any]:
    """The fields that matter and are not null. Refuses unknown names, and unsupported ones that ask for something."""
    fields = {}
    for name, value in body.items():
        if name in names:
            if value is not None:
                fields[name] = value
        elif name in neutral:
            if value is not None and not any(type(value) is type(one) and value == one for one in neutral[name]):
                raise InvalidRequest(Text(f"{name} is not supported here.", f"{name} no está disponible aquí."), name)
        elif name not in _IGNORED:
            shown = name[:100]
            near = difflib.get_close_matches(shown, [*names, *neutral], n=1, cutoff=0.7)
            raise InvalidRequest(
                Text(
                    f"Unknown parameter: {shown!r}." + (f" Did you mean {near[0]!r}?" if near else ""),
                    f"Parámetro desconocido: {shown!r}." + (f" ¿Quería decir {near[0]!r}?" if near else ""),
                ),
                shown,
            )
    return fields


def _call(fields: dict[str, Any], exchange: Exchange, defaults: Defaults, **prompt: Any) -> Call:
    if "model" not in fields:
        raise _required("model")
    if not isinstance(fields["model"], str):
        raise _wrong("model", "a string", "un texto")
    stream = _boolean(fields, "stream")
    options = fields.get("stream_options", {})
    if not isinstance(options, dict):
        raise _wrong("stream_options", "an object", "un objeto")
    if options and not stream:
        raise InvalidRequest(
            Text("stream_options is only allowed with stream.", "stream_options solo se admite con stream."),
            "stream_options",
        )
    for name in options:
        if name not in ("include_usage", "include_obfuscation"):  # the second only pads events, which ours do not need
            shown = f"stream_options.{name[:100]}"
            raise InvalidRequest(Text(f"Unknown parameter: {shown!r}.", f"Parámetro desconocido: {shown!r}."), shown)
    request = GenerateRequest(
        id=exchange.id,
        model=fields["model"],
        accepted_at=exchange.accepted_at,
        max_tokens=_integer(fields, "max_tokens", 1, 10_000_000),
        temperature=_number(fields, "temperature", 0.0, 2.0, defaults.temperature),
        top_p=_top_p(fields),
        top_k=max(0, _integer(fields, "top_k", -1, 1_000_000) or 0),
        seed=_integer(fields, "seed", -(2**63), 2**63 - 1),
        stop=_stop(fields),
        stream=stream,
        traceparent=exchange.traceparent,
        **prompt,
    )
    return Call((request,), stream and _boolean(options, "include_usage", "stream_options.include_usage"))


def _prompt(value: object, at: str) -> dict[str, Any]:
    """One prompt as the field of GenerateRequest that it fills."""
    if not value:
        raise InvalidRequest(Text(f"{at} must not be empty.", f"{at} no puede estar vacío."), at)
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, list) and all(_is_int(token) and 0 <= token < 2**31 for token in value):
        return {"token_ids": tuple(value)}
    raise _wrong(at, "a string or a list of token ids", "un texto o una lista de identificadores de token")


def _message(turn: object, at: str) -> Message:
    if not isinstance(turn, dict):
        raise _wrong(at, "an object", "un objeto")
    role = turn.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise _wrong(f"{at}.role", f"one of {', '.join(_ROLES)}", f"uno de {', '.join(_ROLES)}")
    for name, value in turn.items():
        if name in ("role", "content", "name") or (name in _TURN_KEYS and not value):
            continue
        shown = f"{at}.{name[:100]}"
        raise InvalidRequest(Text(f"{shown} is not supported here.", f"{shown} no está disponible aquí."), shown)
    content = turn.get("content")
    if isinstance(content, list):
        texts = [part["text"] for part in content if isinstance(part, dict) and _is_text_part(part)]
        if len(texts) == len(content):
            content = "".join(texts)
    if not isinstance(content, str):
        raise _wrong(f"{at}.content", "a string or a list of text parts", "un texto o una lista de partes de texto")
    return Message(_ROLES[role], content)


def _is_text_part(part: dict[str, Any]) -> bool:
    return set(part) == {"type", "text"} and part["type"] == "text" and isinstance(part["text"], str)


def _stop(fields: dict[str, Any]) -> tuple[str, ...]:
    value = fields.get("stop", [])
    stops = [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not good or not all(isinstance(item, str) and 0 < len(item) <= MAX_STOP_CHARS for item in stops):
        raise _wrong(
            "stop",
            f"a string or a list of at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters",
            f"un texto o una lista de hasta {MAX_STOPS} textos de 1 a {MAX_STOP_CHARS} caracteres",
        )
    return tuple(stops)


def _top_p(fields: dict[str, Any]) -> float:
    value = _number(fields, "top_p", 0.0, 1.0, 1.0)
    return value or 1e-6  # 0 keeps the likeliest token alone, and the backend's range is open there


def _number(fields: dict[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise _wrong(name, f"a number from {low:g} to {high:g}", f"un número de {low:g} a {high:g}")
    return float(value)


def _integer(fields: dict[str, Any], name: str, low: int, high: int) -> int | None:
    value = fields.get(name)
    if value is not None and not (_is_int(value) and low <= value <= high):
        raise _wrong(name, f"an integer from {low} to {high}", f"un entero de {low} a {high}")
    return value


def _boolean(fields: dict[str, Any], name: str, shown: str | None = None) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(shown or name, "true or false", "true o false")
    return bool(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _required(name: str) -> InvalidRequest:
    return InvalidRequest(Text(f"{name} is required.", f"Falta {name}."), name)


def _wrong(name: str, expected_en: str, expected_es: str) -> InvalidRequest:
    return InvalidRequest(Text(f"{name} must be {expected_en}.", f"{name} debe ser {expected_es}."), name)
