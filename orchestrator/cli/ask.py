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


@dataclass(frozen=True)
class Kind:
    """What a model is for (`operation`: generate, embed, classify or infer), and whether it has a chat template."""

    operation: str = "generate"
    chat: bool = True


# What asks an encoder for one text: path, and how an answer reads
ENCODERS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "embed": ("/v1/embeddings", lambda row: f"{len(row['embedding'])} numbers, beginning {row['embedding'][:3]}"),
    "classify": ("/v1/classify", lambda row: f"{row['label']} ({row['score']:.2f})"),
}


def kind_of(client: GatewayClient, model: str) -> Kind:
    """What a model is for. A server that is not ours and does not say is taken to have a chat. Raises GatewayError."""
    try:
        models = client.health().get("models")
    except GatewayError as error:
        if error.status is None:
            raise
        return Kind()
    for row in models if isinstance(models, list) else []:
        if isinstance(row, dict) and row.get("name") == model:
            return Kind(str(row.get("operation") or "generate"), bool(row.get("chat")))
    return Kind()


def encode(client: GatewayClient, model: str, operation: str, text: str) -> str:
    """What an encoder makes of a text, in words. Raises GatewayError."""
    path, words = ENCODERS[operation]
    answer = client.ask(path, {"model": model, "input": text})
    try:
        return words(answer["data"][0])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        hint = "check that this is the URL of a TruthGPT gateway"
        raise GatewayError(f"the answer of {client.url} makes no sense", hint) from error


def ask(client: GatewayClient, question: Question, show: Callable[[str], None] | None = None) -> Answer:
    """Send the question; `show` gets the text as it comes. Raises GatewayError."""
    return send(client, *question.request(), show)


def send(
    client: GatewayClient, path: str, body: Mapping[str, Any], show: Callable[[str], None] | None = None
) -> Answer:
    """Send the body of a (chat) completion; `show` gets the text as it comes. Raises GatewayError."""
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
