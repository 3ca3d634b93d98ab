"""Each token by itself: its text and its bytes, for log-probabilities.

The bytes are the true ones also where a token is a part of a character: a byte-level vocabulary spells every byte as a
character (GPT-2's `bytes_to_unicode`), a SentencePiece one with byte fallback as `<0xAB>`. Where neither is so, they
are the text's UTF-8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

CACHED = 16_384  # tokens, some 200 bytes each
FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Pieces:
    """Knows every token of a tokenizer. `first`: it begins the answer, where tokenizers whose tokens are words put no
    space. A special token is its name. Safe to use from several threads.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {i: token.content for i, token in added.items() if token.special}
        kinds = set(_kinds(json.loads(tokenizer.decoder.__getstate__()))) if tokenizer.decoder is not None else set()
        self._byte_level, self._fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        # A word in front of a token shows what the tokenizer puts between the two.
        ids = range(tokenizer.get_vocab_size() if not self._byte_level else 0)
        self._before = next(((i, text) for i in ids if (text := self._decode(i)).isalnum()), None)
        self.head = lru_cache(CACHED)(self._head)

    def _head(self, token: int, first: bool) -> str:
        """The beginning of a token's JSON object; its log-probability and a brace make it whole."""
        text, data = self.piece(token, first)
        head = json.dumps({"id": token, "token": text, "bytes": list(data)}, separators=(",", ":"))
        return f'{head[:-1]},"logprob":'

    def piece(self, token: int, first: bool) -> tuple[str, bytes]:
        """A token's text and bytes."""
        name = self._tokenizer.id_to_token(token)
        if token in self._special or name is None:  # vocabularies are padded with ids that are no token
            text = self._special.get(token, "")
            return text, text.encode()
        data = self._bytes(name)
        if data is not None:
            return data.decode("utf-8", "replace"), data
        text = self._decode(token)
        if not first and self._before is not None:
            before, word = self._before
            both = self._decode(before, token)
            text = both.removeprefix(word) if both.startswith(word) else text
        return text, text.encode()

    def _bytes(self, name: str) -> bytes | None:
        """The bytes that a token's name spells, None where it is text."""
        if self._byte_level:
            try:
                return bytes(BYTES[character] for character in name)
            except KeyError:  # an added token
                return name.encode()
        spelt = FALLBACK.fullmatch(name) if self._fallback else None
        return bytes.fromhex(spelt[1]) if spelt else None

    def _decode(self, *ids: int) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _kinds(decoder: Any) -> Iterator[str]:
    """The types of a decoder and of those that it is made of."""
    yield decoder["type"]
    for part in decoder.get("decoders", ()):
        yield from _kinds(part)


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte: itself where it is printable Latin-1, else the next one from U+0100.

    Source: bytes_to_unicode in https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in shown)
    return {chr(byte): byte for byte in shown} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


BYTES = _byte_alphabet()
