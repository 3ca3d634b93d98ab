"""Sanitising whole requests: whatever in them is text passes sanitize.py's rules."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.domain import EmbedRequest, GenerateRequest, InferRequest, Message
from orchestrator.inspection import Inspector
from orchestrator.sanitize import Rules, check


class Screen:
    """Each method returns the request that may go on, and the names of what was changed. Raises InvalidRequest."""

    def __init__(self, rules: Rules, inspect: Inspector) -> None:
        self._rules, self._inspect = rules, inspect

    async def generate(self, request: GenerateRequest) -> tuple[GenerateRequest, tuple[str, ...]]:
        """A prompt of token ids is read as text by its model's tokenizer; it stays as it is where nothing changes."""
        if request.messages is not None:
            cleaned = check([turn.content for turn in request.messages], self._rules, "messages")
            if not cleaned.changes:
                return request, ()
            pairs = zip(request.messages, cleaned.texts, strict=True)
            return replace(request, messages=tuple(Message(turn.role, text) for turn, text in pairs)), cleaned.changes
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
            return replace(request, token_ids=None, text=cleaned.texts[0]), cleaned.changes
        cleaned = check([request.text or ""], self._rules, "prompt")
        return (replace(request, text=cleaned.texts[0]) if cleaned.changes else request), cleaned.changes

    def embed(self, request: EmbedRequest) -> tuple[EmbedRequest, tuple[str, ...]]:
        cleaned = check(request.texts, self._rules, "input")
        return (replace(request, texts=cleaned.texts) if cleaned.changes else request), cleaned.changes

    def infer(self, request: InferRequest) -> tuple[InferRequest, tuple[str, ...]]:
        """BYTES tensors are text; one that is not UTF-8 is binary and passes as it is, numbers do too."""
        inputs, changes = list(request.inputs), []
        for index, tensor in enumerate(inputs):
            if tensor.datatype != "BYTES" or not tensor.elements:
                continue
            try:
                texts = [element.decode() for element in tensor.elements]
            except UnicodeDecodeError:
                continue
            if self._rules.mode == "off" or not any(texts):
                continue
            cleaned = check(texts, self._rules, tensor.name)
            if cleaned.changes:
                inputs[index] = replace(tensor, elements=tuple(text.encode() for text in cleaned.texts))
                changes += [change for change in cleaned.changes if change not in changes]
        return (replace(request, inputs=tuple(inputs)) if changes else request), tuple(changes)
