"""One prompt, one answer, through a gateway."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.client import Answer, GatewayClient, GatewayError


@dataclass(frozen=True)
class Question:
    """`sampling` holds the OpenAI parameters that were given; `system` counts only in a chat."""

    prompt: str
    model: str
    chat: bool
    system: str | None = None
    max_tokens: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def request(self) -> tuple[str, dict[str, Any]]:
        """Path and body of the request."""
        body: dict[str, Any] = {"model": self.model, **self.sampling}
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        if not self.chat:
            return "/v1/completions", {**body, "prompt": self.prompt}
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return "/v1/chat/completions", {**body, "messages": [*system, {"role": "user", "content": self.prompt}]}


def has_chat(client: GatewayClient, model: str) -> bool:
    """Whether the model has a chat template. A server that is not ours and does not say is taken to have one."""
    try:
        models = client.health().get("models")
    except GatewayError as error:
        if error.status is None:
            raise
        return True
    for row in models if isinstance(models, list) else []:
        if isinstance(row, dict) and row.get("name") == model:
            return bool(row.get("chat"))
    return True


def ask(client: GatewayClient, question: Question, show: Callable[[str], None] | None = None) -> Answer:
    """Send the question; `show` gets the text as it comes. Raises GatewayError."""
    path, body = question.request()
    began = time.monotonic()
    first_at: float | None = None
    parts: list[str] = []
    reason, usage = "", (0, 0)
    for piece in client.stream(path, body):
        if piece.text:
            first_at = first_at or time.monotonic()
            parts.append(piece.text)
            if show is not None:
                show(piece.text)
        reason, usage = piece.finish_reason or reason, piece.usage or usage
    ended = time.monotonic()
    # An answer without text has no first token that anybody saw: its end is the first thing that came.
    ttft_s = (first_at or ended) - began
    return Answer("".join(parts), reason, *usage, round(ttft_s, 4), round(ended - began, 4))
