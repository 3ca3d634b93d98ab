"""How many tokens a request may use, and whether they fit its model. The tokenizer is asked only where it matters."""

from __future__ import annotations

import sys

from orchestrator.domain import EncodeRequest, GenerateRequest, Limits, Model
from orchestrator.errors import InvalidRequest, Text, Unavailable
from orchestrator.inspection import Inspector

NO_TEMPLATE = Text(
    "messages: this model has no chat template; use /v1/completions, or export it with --chat-template FILE.",
    "messages: este modelo no tiene plantilla de chat; use /v1/completions o expórtelo con --chat-template FILE.",
)


SPECIAL_TOKENS = 2  # around a text
TURN_TOKENS = 16  # of a chat template around one turn


class Tokens:
    """`default_max_tokens` is what a request that does not say may generate."""

    def __init__(self, inspect: Inspector, default_max_tokens: int) -> None:
        self._inspect, self._default = inspect, default_max_tokens

    def fit(self, model: Model, request: GenerateRequest, limits: Limits) -> int:
        """A bound on the tokens that the request can use, prompt and answer; 0 where no limit counts them.

        Raises InvalidRequest when it can never fit. What only the tokenizer can tell the model refuses itself.
        """
        if request.messages is not None and not model.chat:
            raise InvalidRequest(NO_TEMPLATE, "messages")
        room = model.max_len
        if room is not None:
            if request.max_tokens is not None and request.max_tokens >= room:
                raise _too_long("max_tokens", request.max_tokens, room)
            if request.token_ids is not None and len(request.token_ids) >= room:
                raise _too_long("prompt", len(request.token_ids), room)
        if not (limits.tokens_per_minute or limits.tokens_per_day):
            return 0
        return self._most(model, request, _bound(request))

    def fit_texts(self, model: Model, request: EncodeRequest, limits: Limits) -> int:
        """The same of texts for an encoder. Each has a bound of its own, and no more than the model reads."""
        if not (limits.tokens_per_minute or limits.tokens_per_day):
            return 0
        most = sys.maxsize if model.max_len is None else model.max_len
        return sum(min(len(text.encode(errors="replace")) + SPECIAL_TOKENS, most) for text in request.texts)

    async def exact(self, model: Model, request: GenerateRequest) -> int:
        """The most tokens that the request can use, by the model's own tokenizer; the bound while that is away."""
        try:
            return self._most(model, request, (await self._inspect(request)).tokens)
        except Unavailable:  # a cached or a fallback answer may still come
            return self._most(model, request, _bound(request))

    def _most(self, model: Model, request: GenerateRequest, prompt: int) -> int:
        answer = request.max_tokens or self._default
        most, room = prompt + answer, model.max_len
        if room is not None:
            most, answer = min(most, room), min(answer, room)
        return most + (request.answers - 1) * answer


def _bound(request: GenerateRequest) -> int:
    """Of the prompt's tokens: no byte-level tokenizer makes more of them than there are bytes."""
    if request.token_ids is not None:
        return len(request.token_ids)
    if request.messages is None:
        return len((request.text or "").encode()) + SPECIAL_TOKENS
    return sum(len(turn.content.encode()) + TURN_TOKENS for turn in request.messages)


def _too_long(param: str, given: int, room: int) -> InvalidRequest:
    return InvalidRequest(
        Text(
            f"{param}: {given} tokens leave no room in this model's context of {room} tokens.",
            f"{param}: {given} tokens no dejan sitio en el contexto de {room} tokens de este modelo.",
        ),
        param,
    )
