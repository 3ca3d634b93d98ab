"""From a request's texts to token ids, with every refusal naming the text that it is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from ..inflight.entry import EntryError
from ..inflight.errors import EngineError, InvalidArgument

MAX_BYTES = 1_000_000  # of one text: reading more would hold up its neighbours for seconds


@dataclass(frozen=True)
class Tokens:
    """One text: its ids, and its segment ids (0 everywhere, for nearly all tokenizers)."""

    ids: list[int]
    types: list[int]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Texts:
    """One request's texts, as they came over the wire; ``truncate`` cuts those that are too long."""

    texts: Sequence[bytes | str]
    truncate: bool


class TextCodec:
    """The tokenizer of one entry."""

    def __init__(self, folder: Path, max_len: int, prompt: str = "") -> None:
        path = folder / "tokenizer.json"
        try:
            self._whole = Tokenizer.from_file(str(path))
            self._cutting = Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise EntryError(f"{path} is not a tokenizer: {error}; export the model again") from error
        self._whole.no_truncation()
        self._cutting.enable_truncation(max_len)
        for tokenizer in (self._whole, self._cutting):
            tokenizer.no_padding()
        self._max_len, self._prompt = max_len, prompt

    def encode(self, requests: Sequence[Texts]) -> list[list[Tokens] | EngineError]:
        """Each request's tokens, or what is wrong with it. All texts are tokenised in one go, on all cores."""
        read = [self._read(request) for request in requests]
        answers: list[list[Tokens] | EngineError] = [r if isinstance(r, EngineError) else [] for r in read]
        for tokenizer, truncate in ((self._whole, False), (self._cutting, True)):
            chosen = {i: r for i, r in enumerate(read) if isinstance(r, list) and requests[i].truncate is truncate}
            for i, found in zip(chosen, _tokenised(tokenizer, list(chosen.values())), strict=True):
                answers[i] = found if isinstance(found, EngineError) else self._checked(found)
        return answers

    def _read(self, request: Texts) -> list[str] | EngineError:
        texts = []
        for number, raw in enumerate(request.texts):
            data = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
            if len(data) > MAX_BYTES:
                return InvalidArgument(f"text_input[{number}] has {len(data)} bytes; at most {MAX_BYTES} are read")
            try:
                texts.append(self._prompt + data.decode("utf-8"))
            except UnicodeDecodeError as error:
                return InvalidArgument(f"text_input[{number}] is not valid UTF-8 (byte {error.start})")
        return texts

    def _checked(self, encodings: Sequence[Encoding]) -> list[Tokens] | EngineError:
        for number, encoding in enumerate(encodings):
            if len(encoding.ids) > self._max_len:
                return InvalidArgument(
                    f"text_input[{number}] has {len(encoding.ids)} tokens; the model reads at most {self._max_len} "
                    "(set truncate to cut)"
                )
            if not encoding.ids:
                return InvalidArgument(f"text_input[{number}] has no tokens")
        return [Tokens(encoding.ids, encoding.type_ids) for encoding in encodings]


def _tokenised(tokenizer: Tokenizer, requests: Sequence[Sequence[str]]) -> list[list[Encoding] | EngineError]:
    """What the tokenizer makes of each request. One failing text fails them all, so they are then read one by one:
    a tokenizer without a token for what is unknown to it refuses words.
    """
    try:
        flat = iter(tokenizer.encode_batch([text for texts in requests for text in texts]))
        return [[next(flat) for _ in texts] for texts in requests]
    except Exception:  # the tokenizers library raises bare Exception
        return [_one_by_one(tokenizer, texts) for texts in requests]


def _one_by_one(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoding] | EngineError:
    found = []
    for number, text in enumerate(texts):
        try:
            found.append(tokenizer.encode(text))
        except Exception as error:
            return InvalidArgument(f"text_input[{number}] cannot be tokenised: {str(error)[:200]}")
    return found
