"""The OpenAPI document's schemas of sampling parameters that plain requests do without, and of log-probabilities."""

from __future__ import annotations

from orchestrator.api import controls, fields
from orchestrator.api.openapi_parts import BOOLEAN, COUNT, NULL, OPEN, STRING, Schema, closed, listed, within


def sampling() -> dict[str, Schema]:
    """Each parameter with its limits, as the edges check them."""
    count = within("integer", controls.ANSWERS)
    highest = {
        name: {"type": "number", "exclusiveMinimum": 0, "maximum": high, "default": 1}
        for name, high in controls.ABOVE_ZERO.items()
    }
    known: dict[str, Schema] = {
        **highest,
        "n": {**count, "default": 1, "description": "Answers; with a seed s they are those of s, s + 1, and so on."},
        "best_of": {**count, "description": "Answers that are made, of which the likeliest n are returned; no stream."},
        "logprobs": {
            **within("integer", controls.LOGPROBS),
            "description": "Tell each token's log-probability, and as many of the likeliest tokens in its place.",
        },
        "logit_bias": {
            **OPEN, "maxProperties": controls.MAX_BIASES, "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
            "additionalProperties": within("number", controls.BIAS), "description": "By token id; -100 bans it.",
        },
        "presence_penalty": {**within("number", controls.PENALTY), "default": 0},
        "frequency_penalty": {**within("number", controls.PENALTY), "default": 0},
        "min_p": {**within("number", controls.MIN_P), "default": 0},
        "min_tokens": {**within("integer", controls.MIN_TOKENS), "default": 0},
        "stop_token_ids": listed(within("integer", fields.TOKEN_ID), 0, controls.MAX_STOP_TOKENS),
        "ignore_eos": {**BOOLEAN, "description": "Go on past the model's end tokens."},
        "priority": {
            **within("integer", controls.PRIORITY), "default": 0,
            "description": "Lower goes first in the model's queue; below 0 needs a key with the scope admin.",
        },
    }  # fmt: skip
    return {name: known[name] for name in sorted(controls.NAMES)}


def logprobs() -> dict[str, Schema]:
    """Those of a choice, in the forms of the two APIs."""
    number: Schema = {"type": "number"}
    token: dict[str, Schema] = {"token": STRING, "logprob": number, "bytes": listed(within("integer", (0, 255)))}
    chosen = closed({**token, "top_logprobs": listed(closed(token))})
    by_token = {**OPEN, "additionalProperties": number}
    return {
        "ChatLogprobs": closed({"content": listed(chosen), "refusal": NULL}),
        "CompletionLogprobs": closed(
            {
                "tokens": listed(STRING), "token_logprobs": listed(number), "text_offset": listed(COUNT),
                "top_logprobs": {**listed(by_token), "description": "The chosen token is always among them."},
            }
        ),
    }  # fmt: skip
