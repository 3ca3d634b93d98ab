"""Finding a checkpoint and deciding, before its weights are read, whether it can be exported.

A checkpoint is a folder in the Hugging Face format, or an id on the Hub that is downloaded into the local Hub cache.
Weights must be safetensors: pickled weights can run code when they are opened.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from export.errors import SourceError, UnsupportedModel

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")
_AGAIN = "Download or copy the checkpoint again, completely."
_LOCAL_HINT = "Give a local folder that holds config.json and *.safetensors, or check the id and the network."


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine. ``revision`` is the Hub's commit, None for a local folder."""

    id: str
    path: Path
    revision: str | None

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``. Raises `SourceError` if there is none or it is not a JSON object."""
        return read_json(self.path / "config.json")

    @cached_property
    def weights(self) -> tuple[Path, ...]:
        """The safetensors files, in name order. Raises `SourceError` for pickles, missing shards or no weights."""
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            shards = sorted({str(name) for name in read_json(index).get("weight_map", {}).values()})
            missing = [name for name in shards if not (self.path / name).is_file()]
            if missing:
                raise SourceError(f"{self.id} lacks the weight file {missing[0]}.", _AGAIN)
            return tuple(self.path / name for name in shards)
        found = tuple(sorted(self.path.glob("*.safetensors")))
        if found:
            return found
        pickles = sorted(path.name for pattern in _PICKLES for path in self.path.glob(pattern))
        if pickles:
            raise SourceError(
                f"{self.id} has no safetensors weights, only {pickles[0]}, which could run code when opened.",
                "Convert it where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER).",
            )
        raise SourceError(f"{self.id} has no *.safetensors weight file.", _LOCAL_HINT)

    def parameters(self) -> int:
        """Elements of all weights, read from the safetensors headers. Raises `SourceError` for a damaged file."""
        return sum(_elements(path) for path in self.weights)

    def sha256(self) -> str:
        """Hex digest over the weight files' bytes, in name order."""
        digest = hashlib.sha256()
        for path in self.weights:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


def resolve(
    model: str,
    revision: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    task: str = "auto",
) -> Source:
    """The checkpoint named by a folder or a Hub id, checked by its configuration.

    Raises:
        SourceError: no such folder or id, no network, pickled or missing weights, a configuration that cannot be read.
        UnsupportedModel: neither a causal language model nor an encoder that can be served as ``task``.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise SourceError("--revision is for models from the Hub, but a local folder was given.", "Leave it out.")
        source = Source(model, folder.resolve(), None)
        check_config(source, task)
    elif _looks_local(model) or not _HUB_ID.fullmatch(model):
        raise SourceError(f"There is no folder {model}.", _LOCAL_HINT)
    else:
        from export.hub import fetch

        folder = fetch(model, revision, lambda path, commit: check_config(Source(model, path, commit), task), say)
        source = Source(model, folder, folder.name)
        check_config(source, task)
    _ = source.weights  # refuses pickles and missing shards
    return source


def check_config(source: Source, task: str = "auto") -> None:
    """Refuse what cannot be exported, needs code of its own or is quantised already, by its configuration alone."""
    from export.encoder_source import encoder_task

    if encoder_task(source, task) is not None:
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = source.config
    family = str(config.get("model_type", "unknown"))
    architectures = [str(name) for name in config.get("architectures") or []]
    called = architectures[0] if architectures else family
    if config.get("is_encoder_decoder"):
        raise UnsupportedModel(f"{source.id} is a sequence-to-sequence model, not a causal one ({called}).", _KINDS)
    if architectures and not any(_CAUSAL.search(name) for name in architectures):
        raise UnsupportedModel(f"{source.id} is not a causal language model ({called}).", _KINDS)
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if config.get("auto_map"):
            raise UnsupportedModel(f"{source.id} needs code of its own, which is not run here.", _KINDS)
        raise UnsupportedModel(f"{source.id} is of a kind that transformers cannot generate with ({family}).", _KINDS)
    if config.get("quantization_config"):
        raise UnsupportedModel(f"{source.id} is quantised already.", "Export the original, with --precision int8.")


_KINDS = "Text generation models (GPT-2, DialoGPT and Llama families) can be exported."


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `SourceError` naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(f"{path.parent} has no {path.name}.", _LOCAL_HINT) from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read: {error}.", _LOCAL_HINT) from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} does not hold a JSON object.", _LOCAL_HINT)
    return value


def _looks_local(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).exists()


def _elements(path: Path) -> int:
    # Format: 8 bytes little-endian header length, then JSON (https://github.com/huggingface/safetensors#format).
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length) if length < 1 << 30 else b"")
            total = 0
            for name, entry in header.items():
                if name != "__metadata__":
                    size = 1
                    for dimension in entry["shape"]:
                        size *= int(dimension)
                    total += size
            return total
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise SourceError(f"The weight file {path.name} is damaged.", _AGAIN) from error
