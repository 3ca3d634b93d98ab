"""Sanitising whole requests: whatever in them is text passes sanitize.py's rules."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.domain import EmbedRequest, GenerateRequest, InferRequest, Message
from orchestrator.inspection import Inspector
from orchestrator.sanitize import Rules, check

_CLEAN = "clean"  # of a request's memo: nothing was changed in it


class Screen:
    """Each method returns the request that may go on, and the names of what was changed. Raises InvalidRequest."""

    def __init__(self, rules: Rules, inspect: Inspector) -> None:
        self._rules, self._inspect = rules, inspect

    async def generate(self, request: GenerateRequest) -> tuple[GenerateRequest, tuple[str, ...]]:
        """A prompt of token ids is read as text by its model's tokenizer; it stays as it is where nothing changes."""
        memo = request.memo
        if memo is not None and _CLEAN in memo:
            return request, ()
        if request.messages is not None:
            cleaned = check([turn.content for turn in request.messages], self._rules, "messages")
            if not cleaned.changes:
                if memo is not None:
                    memo[_CLEAN] = True
                return request, ()
            messages = tuple(
                Message(turn.role, text) for turn, text in zip(request.messages, cleaned.texts, strict=True)
            )
            return replace(request, messages=messages, memo=None), cleaned.changes
        if request.token_ids is not None:
            if self._rules.mode == "off":
                return request, ()
            text = (await self._inspect(request)).text
            if not text:  # special tokens alone are no text that could be dangerous
                return request, ()
            cleaned = check([text], self._rules, "prompt")
            # White space and compositions are the tokenizer's own business.
            if not set(cleaned.changes) - {"whitespace", "nfc"}:
                return request, ()
            return replace(request, token_ids=None, text=cleaned.texts[0], memo=None), cleaned.changes
        cleaned = check([request.text or ""], self._rules, "prompt")
        if cleaned.changes:
            return replace(request, text=cleaned.texts[0], memo=None), cleaned.changes
        if memo is not None:
            memo[_CLEAN] = True
        return request, ()

    def embed(self, request: EmbedRequest) -> tuple[EmbedRequest, tuple[str, ...]]:
        cleaned = check(request.texts, self._rules, "input")
        return (replace(request, texts=cleaned.texts) if cleaned.changes else request), cleaned.changes

    def infer(self, request: InferRequest) -> tuple[InferRequest, tuple[str, ...]]:
        """The elements of BYTES tensors are texts, all of a request's together under one limit.

        An element that is not UTF-8 is binary and passes as it is, as numbers do.
        """
        places = [
            (index, at, text)
            for index, tensor in enumerate(request.inputs)
            for at, element in enumerate(tensor.elements)
            if (text := _text(element))
        ]
        if not places or self._rules.mode == "off":
            return request, ()
        names = {request.inputs[index].name for index, _, _ in places}
        param = names.pop() if len(names) == 1 else "inputs"
        cleaned = check([text for _, _, text in places], self._rules, param)
        if not cleaned.changes:
            return request, ()
        elements = [list(tensor.elements) for tensor in request.inputs]
        for (index, at, _), text in zip(places, cleaned.texts, strict=True):
            elements[index][at] = text.encode()
        pairs = zip(request.inputs, elements, strict=True)
        inputs = tuple(replace(tensor, elements=tuple(own)) for tensor, own in pairs)
        return replace(request, inputs=inputs), cleaned.changes


def _text(element: bytes) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError:
        return ""
