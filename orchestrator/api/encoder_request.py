"""The bodies of `/v1/embeddings` and `/v1/classify` -> EncodeRequest. What is not supported is refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.api.fields import MAX_TEXTS, boolean, integer, is_int, required, too_many, wrong
from orchestrator.api.http import Exchange
from orchestrator.api.openai_request import known
from orchestrator.api.policy import cache_policy, task
from orchestrator.domain import EncodeRequest
from orchestrator.errors import InvalidRequest, Text

# What numbers may be, both ends included.
DIMENSIONS = (1, 65_536)
ENCODINGS = ("float", "base64")
CLASSIFY = {"model", "input", "truncate"}
EMBEDDINGS = CLASSIFY | {"encoding_format", "dimensions"}


@dataclass(frozen=True)
class Call:
    """A parsed body: what to read, whether its input was one text and no list, and the form of an embedding."""

    request: EncodeRequest
    single: bool
    base64: bool = False


def embeddings(body: dict[str, Any], exchange: Exchange) -> Call:
    """`POST /v1/embeddings`. Raises InvalidRequest naming the parameter."""
    fields = known(body, EMBEDDINGS, {})
    encoding = fields.get("encoding_format", "float")
    if encoding not in ENCODINGS:
        raise wrong("encoding_format", "float or base64", "float o base64")
    return _call(fields, exchange, "embed", integer(fields, "dimensions", *DIMENSIONS), encoding == "base64")


def classify(body: dict[str, Any], exchange: Exchange) -> Call:
    """`POST /v1/classify`. Raises InvalidRequest naming the parameter."""
    return _call(known(body, CLASSIFY, {}), exchange, "classify")


def _call(
    fields: dict[str, Any], exchange: Exchange, operation: str, dimensions: int | None = None, base64: bool = False
) -> Call:
    if "model" not in fields:
        raise required("model")
    if not isinstance(fields["model"], str):
        raise wrong("model", "a string", "un texto")
    if "input" not in fields:
        raise required("input")
    request = EncodeRequest(
        id=exchange.id,
        model=fields["model"],
        accepted_at=exchange.accepted_at,
        texts=_texts(fields["input"]),
        operation=operation,
        truncate=boolean(fields, "truncate"),
        dimensions=dimensions,
        task=task(exchange.headers, ""),
        cache=cache_policy(exchange.headers),
        traceparent=exchange.traceparent,
    )
    return Call(request, isinstance(fields["input"], str), base64)


def _texts(given: object) -> tuple[str, ...]:
    if isinstance(given, str):
        _check(given, "input")
        return (given,)
    if not isinstance(given, list) or not given:
        raise wrong("input", "a string or a list of at least one string", "un texto o una lista de al menos un texto")
    if len(given) > MAX_TEXTS and isinstance(given[0], str):
        raise too_many("input", len(given))
    for index, text in enumerate(given):
        _check(text, f"input[{index}]")
    return tuple(given)


def _check(text: object, at: str) -> None:
    if isinstance(text, list) or is_int(text):
        raise InvalidRequest(
            Text(
                "input: token ids are not taken here, because the model's own tokenizer reads the text: send strings.",
                "input: aquí no se admiten identificadores de token, porque el texto lo lee el tokenizador del "
                "modelo: envíe textos.",
            ),
            "input",
        )
    if not isinstance(text, str):
        raise wrong(at, "a string", "un texto")
    if not text:
        raise InvalidRequest(Text(f"{at} must not be empty.", f"{at} no puede estar vacío."), at)
