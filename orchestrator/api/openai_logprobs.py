"""Log-probabilities in the forms of OpenAI's two APIs, from the entries of docs/protocol.md.

An entry is a token's `token` (text), `bytes`, `logprob` and the likeliest tokens of its place, `top`.
"""

from __future__ import annotations

import codecs
from typing import Any

import orjson


def entries(text: str) -> list[dict[str, Any]]:
    """Those of a choice's `logprobs`."""
    found: list[dict[str, Any]] = orjson.loads(text) if text else []
    return found


def chat(text: str) -> dict[str, object] | None:
    """`choices[].logprobs` of a chat completion, None where there are none. `top` has exactly what was asked for."""
    found = entries(text)
    if not found:
        return None
    content = [{**_shown(entry), "top_logprobs": [_shown(one) for one in entry["top"]]} for entry in found]
    return {"content": content, "refusal": None}


def _shown(entry: dict[str, Any]) -> dict[str, object]:
    return {"token": entry["token"], "logprob": entry["logprob"], "bytes": entry["bytes"]}


class Offsets:
    """`choices[].logprobs` of a completion, piece by piece: each token's place in the text is counted in characters."""

    def __init__(self) -> None:
        self._at = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be of several tokens

    def completion(self, text: str) -> dict[str, object] | None:
        """The next piece's, None where it has none. The chosen token is always among the likeliest, as one more."""
        found = entries(text)
        if not found:
            return None
        offsets = []
        for entry in found:
            offsets.append(self._at)
            self._at += len(self._decoder.decode(bytes(entry["bytes"])))
        return {
            "tokens": [_name(entry) for entry in found],
            "token_logprobs": [entry["logprob"] for entry in found],
            "top_logprobs": [_by_name(entry) for entry in found],
            "text_offset": offsets,
        }


def _by_name(entry: dict[str, Any]) -> dict[str, float]:
    likeliest = {_name(one): one["logprob"] for one in reversed(entry["top"])}  # of two of one name the likelier
    return {**dict(reversed(likeliest.items())), _name(entry): entry["logprob"]}


def _name(entry: dict[str, Any]) -> str:
    """A token's text; of one that is only a part of a character its bytes, as OpenAI writes them."""
    data = bytes(entry["bytes"])
    try:
        data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
    return str(entry["token"])
