"""The checkpoint's tokenizer as one ``tokenizer.json``, and the tokens that begin and end a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from export.errors import SourceError
from export.source import Source, read_json

# Mixed on purpose: accents, punctuation, digits, an emoji's worth of bytes outside the basic plane, and white space.
SAMPLE = (
    "Hola, ¿cómo estás? I am fine, thank you. ¡Qué día tan bonito! What is the weather like today? "
    "El modelo responde en español y en inglés, con 12 palabras o 3.5 líneas.\nNew line, tab\tand \U0001f600. Adiós."
)


@dataclass(frozen=True)
class Tokens:
    """Special tokens: ids that end a text, the id that begins one (None: nothing does), and both as text."""

    eos: tuple[int, ...]
    bos: int | None
    eos_token: str | None
    bos_token: str | None

    def manifest(self) -> dict[str, Any]:
        """The manifest's ``tokens`` block."""
        return {"eos": list(self.eos), "bos": self.bos, "eos_token": self.eos_token, "bos_token": self.bos_token}


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, converted to the fast kind where it is not.

    Raises:
        SourceError: there is none, or it cannot be converted.
    """
    hint = "Put tokenizer.json beside config.json and export again."
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=source.trust.code, local_files_only=True
        )
    except Exception as error:
        raise SourceError(f"{source.id} has no tokenizer that can be read.", hint) from error
    # Where no file is found, transformers builds some tokenizers empty, with nothing but special tokens in them.
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):
        raise SourceError(f"{source.id} has no tokenizer.", hint)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise SourceError(f"The tokenizer of {source.id} cannot be converted to tokenizer.json.", "Convert it first.")
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write ``tokenizer.json`` without truncation or padding, and check that it encodes as the original does.

    Raises:
        SourceError: the written file would encode differently.
    """
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    path.write_text(copy.to_str(), encoding="utf-8")
    if Tokenizer.from_file(str(path)).encode(SAMPLE).ids != tokenizer.encode(SAMPLE):
        raise SourceError(
            "tokenizer.json would encode texts differently from the checkpoint's own tokenizer.",
            "Save the tokenizer as a fast one (save_pretrained) beside config.json and export again.",
        )


def special_tokens(source: Source, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tokens:
    """What ends and begins a text, by generation_config.json, else config.json, else the tokenizer.

    Ids outside the vocabulary (a configuration class's defaults) are dropped.
    """
    generation = source.path / "generation_config.json"
    settings = (read_json(generation) if generation.exists() else {}, source.config)

    def ids(key: str, fallback: int | None) -> tuple[int, ...]:
        for given in (*(setting.get(key) for setting in settings), fallback):
            found = [given] if isinstance(given, int) else given
            if isinstance(found, list) and (valid := [token for token in found if 0 <= token < vocab_size]):
                return tuple(dict.fromkeys(valid))
        return ()

    eos, bos = ids("eos_token_id", tokenizer.eos_token_id), ids("bos_token_id", tokenizer.bos_token_id)

    def text(token: str | None, found: tuple[int, ...]) -> str | None:
        return str(token) if token is not None else tokenizer.convert_ids_to_tokens(found[0]) if found else None

    return Tokens(eos, bos[0] if bos else None, text(tokenizer.eos_token, eos), text(tokenizer.bos_token, bos))
