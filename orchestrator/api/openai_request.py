"""OpenAI's completion and chat bodies -> GenerateRequest. What is not supported is refused by name, never dropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.api import controls
from orchestrator.api.fields import (
    MAX_TOKENS,
    Defaults,
    boolean,
    integer,
    messages,
    prompt,
    required,
    sampling,
    unknown,
    wrong,
)
from orchestrator.api.http import Exchange
from orchestrator.api.policy import cache_policy, task
from orchestrator.domain import GenerateRequest, made
from orchestrator.errors import InvalidRequest, Text

MAX_PROMPTS = 64
# What numbers may be, both ends included.
TEMPERATURE = (0.0, 2.0)
SEED = (-(2**63), 2**63 - 1)
SAMPLING = {
    "model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options",
    *(controls.NAMES - {"best_of"}),
}  # fmt: skip
COMPLETION = SAMPLING | {"prompt", "best_of", "echo"}
CHAT = SAMPLING | {"messages", "max_completion_tokens", "top_logprobs"}
STREAM_OPTIONS = ("include_usage", "include_obfuscation")  # the second only pads events, which ours do not need
# Taken and without effect: they describe the caller or where the answer is kept, not the answer.
IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
# Not supported: only the values that ask for nothing are taken (null always is).
NEUTRAL_COMPLETION: Mapping[str, tuple[object, ...]] = {"suffix": ()}
NEUTRAL_CHAT: Mapping[str, tuple[object, ...]] = {
    "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (), "prediction": (), "reasoning_effort": (),
    "verbosity": (), "web_search_options": (),
}  # fmt: skip


_SAMPLING = sampling(TEMPERATURE, SEED)


@dataclass(slots=True)
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
    fields = known(body, COMPLETION, NEUTRAL_COMPLETION)
    value = fields.get("prompt")
    if value is None:
        raise required("prompt")
    own = _completion_only(fields)
    if not isinstance(value, list) or not any(isinstance(item, (str, list)) for item in value):
        return _call(fields, exchange, defaults, **prompt(value, "prompt"), **own)
    if len({type(item) for item in value}) > 1:
        raise wrong(
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
        return _call(fields, exchange, defaults, **prompt(value[0], "prompt"), **own)
    prompts = [prompt(item, f"prompt[{index}]") for index, item in enumerate(value)]
    call = _call(fields, exchange, defaults, **prompts[0], **own)
    if len(value) * call.request.answers > MAX_PROMPTS:
        raise InvalidRequest(
            Text(
                f"n, best_of: at most {MAX_PROMPTS} answers a request, those to all its prompts together.",
                f"n, best_of: se admiten {MAX_PROMPTS} respuestas por petición como máximo, a todos sus textos juntos.",
            ),
            "n",
        )
    requests = (replace(call.request, id=f"{exchange.id}-{index}", **item) for index, item in enumerate(prompts))
    return replace(call, requests=tuple(requests))


def chat(body: dict[str, Any], exchange: Exchange, defaults: Defaults) -> Call:
    """`POST /v1/chat/completions`. Raises InvalidRequest naming the parameter."""
    fields = known(body, CHAT, NEUTRAL_CHAT)
    if "messages" not in fields:
        raise required("messages")
    turns = messages(fields["messages"])
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
        fields["max_tokens"] = integer(fields | {"max_completion_tokens": new}, "max_completion_tokens", *MAX_TOKENS)
    own: dict[str, Any] = {}
    if "logprobs" in fields or "top_logprobs" in fields:
        top = integer(fields, "top_logprobs", *controls.LOGPROBS)
        if boolean(fields, "logprobs"):
            own["logprobs"] = top or 0
        elif top:
            raise InvalidRequest(
                Text("top_logprobs is only allowed with logprobs.", "top_logprobs solo se admite con logprobs."),
                "top_logprobs",
            )
    return _call(fields, exchange, defaults, messages=turns, **own)


def _completion_only(fields: dict[str, Any]) -> dict[str, Any]:
    """What a completion has that a chat has not, as fields of GenerateRequest."""
    own: dict[str, Any] = {}
    if "logprobs" in fields:
        own["logprobs"] = integer(fields, "logprobs", *controls.LOGPROBS)
    if "echo" in fields:
        own["echo"] = boolean(fields, "echo")
        if own["echo"] and "logprobs" in own:
            raise InvalidRequest(
                Text(
                    "echo is not supported together with logprobs: the prompt's tokens have none here.",
                    "echo no está disponible junto con logprobs: los tokens del texto de entrada no los tienen aquí.",
                ),
                "echo",
            )
    return own


def known(body: dict[str, Any], names: set[str], neutral: Mapping[str, tuple[object, ...]]) -> dict[str, Any]:
    """The fields that matter and are not null. Refuses unknown names, and unsupported ones that ask for something."""
    fields = {}
    for name, value in body.items():
        if name in names:
            if value is not None:
                fields[name] = value
        elif name in neutral:
            if value is not None and not any(type(value) is type(one) and value == one for one in neutral[name]):
                raise InvalidRequest(Text(f"{name} is not supported here.", f"{name} no está disponible aquí."), name)
        elif name not in IGNORED:
            raise unknown(name, (*names, *neutral))
    return fields


def _call(fields: dict[str, Any], exchange: Exchange, defaults: Defaults, **prompt: Any) -> Call:
    if "model" not in fields:
        raise required("model")
    if not isinstance(fields["model"], str):
        raise wrong("model", "a string", "un texto")
    stream = boolean(fields, "stream")
    options = fields.get("stream_options", {})
    if not isinstance(options, dict):
        raise wrong("stream_options", "an object", "un objeto")
    if options and not stream:
        raise InvalidRequest(
            Text("stream_options is only allowed with stream.", "stream_options solo se admite con stream."),
            "stream_options",
        )
    for name in options:
        if name not in STREAM_OPTIONS:
            shown = f"stream_options.{name[:100]}"
            raise InvalidRequest(Text(f"Unknown parameter: {shown!r}.", f"Parámetro desconocido: {shown!r}."), shown)
    wanted = {name: boolean(options, name, f"stream_options.{name}") for name in options}
    values: dict[str, Any] = {
        "id": exchange.id, "model": fields["model"], "accepted_at": exchange.accepted_at, "stream": stream,
        "temperature": defaults.temperature, "task": task(exchange.headers, ""),
        "cache": cache_policy(exchange.headers), "traceparent": exchange.traceparent,
    }  # fmt: skip
    for name, read in _SAMPLING.items():
        if name in fields:
            values[name] = read(fields)
    controls.control(fields, values)
    request = made(GenerateRequest, **values, **prompt)
    return Call((request,), wanted.get("include_usage", False))
