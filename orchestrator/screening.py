"""Sanitising whole requests: whatever in them is text passes sanitize.py's rules."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from orchestrator.domain import EncodeRequest, GenerateRequest, InferRequest, Message, changed
from orchestrator.inspection import Inspector
from orchestrator.sanitize import CHANGES, Rules, check

_CLEAN = "clean"  # of a request's memo: nothing was changed in it
_AT_A_TIME_CHARS = 50_000  # of many texts, before others come to their turn


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

    async def text(self, request: GenerateRequest) -> str:
        """The prompt as the model reads it, which of token ids its tokenizer says; a conversation has none."""
        if request.token_ids is not None:
            return (await self._inspect(request)).text or ""
        return request.text or ""

    async def encode(self, request: EncodeRequest) -> tuple[EncodeRequest, tuple[str, ...]]:
        """Each text by itself, under a limit of its own: the size of a body bounds them together."""
        texts: list[str] = []
        changes: set[str] = set()
        since = 0
        for index, text in enumerate(request.texts):
            since += len(text)
            if since > _AT_A_TIME_CHARS:
                await asyncio.sleep(0)
                since = 0
            cleaned = check([text], self._rules, f"text_input[{index}]")
            texts += cleaned.texts
            changes.update(cleaned.changes)
        if not changes:
            return request, ()
        return changed(request, texts=tuple(texts)), tuple(name for name in CHANGES if name in changes)

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
