"""Finding a checkpoint and deciding, before its weights are read, whether it can be exported and trusted.

A checkpoint is a folder in the Hugging Face format, or an id on the Hub that is downloaded into the local Hub cache.
Two things in a checkpoint can run code: pickled weights when they are opened, and modelling code that it brings. Both
are refused unless they are allowed by name (`Trust`), and pickles are opened by torch's restricted unpickler even then.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from export.errors import DAMAGED, SourceError, UnsupportedModel
from export.weightfiles import Tensor, pickled_tensors, safetensors_tensors

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LOCAL_HINT = "Give a local folder that holds config.json and *.safetensors, or check the id and the network."
_PICKLE_HINT = (
    "Convert it where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER); "
    "or give --allow-pickle."
)


@dataclass(frozen=True)
class Trust:
    """What of a checkpoint may be opened although it could run code: ``pickle`` weights, ``code`` of its own."""

    pickle: bool = False
    code: bool = False


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine. ``revision`` is the Hub's commit, None for a local folder."""

    id: str
    path: Path
    revision: str | None
    trust: Trust = field(default_factory=Trust)

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``. Raises `SourceError` if there is none or it is not a JSON object."""
        return read_json(self.path / "config.json")

    @cached_property
    def weights(self) -> tuple[Path, ...]:
        """The weight files, in name order: safetensors, or pickles where those are allowed and nothing else is there.

        Raises:
            SourceError: pickles that are not allowed, missing shards or no weights.
        """
        found = self._files("model.safetensors", "*.safetensors")
        if found:
            return found
        if self.trust.pickle and (found := self._files("pytorch_model.bin", "pytorch_model*.bin")):
            return found
        pickles = sorted(path.name for pattern in _PICKLES for path in self.path.glob(pattern))
        if pickles:
            raise SourceError(
                f"{self.id} has no safetensors weights, only {pickles[0]}, which could run code when opened.",
                _PICKLE_HINT,
            )
        raise SourceError(f"{self.id} has no *.safetensors weight file.", _LOCAL_HINT)

    @property
    def unused_code(self) -> str | None:
        """What to say of code that the checkpoint brings and that is not run, as transformers has its family; or None.

        Families that transformers has not are refused without their code.
        """
        if self.trust.code or not self.config.get("auto_map"):
            return None
        family = self.config.get("model_type")
        return f"the checkpoint's own code (auto_map) is not used: {family} is transformers' own here"

    def manifest(self) -> dict[str, Any]:
        """The manifest's ``source`` block."""
        unused = {"own_code": "not used"} if self.unused_code else {}
        return {"id": self.id, "revision": self.revision, "sha256": self.sha256, **unused}

    @property
    def pickled(self) -> bool:
        """Whether `weights` are pickles."""
        return self.weights[0].suffix != ".safetensors"

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor of the weight files: read from safetensors' headers, from pickles without their data.

        Raises:
            SourceError: a damaged or truncated file, a pickle of more than tensors, or quantised weights.
        """
        read = pickled_tensors if self.pickled else safetensors_tensors
        found = tuple(tensor for path in self.weights for tensor in read(path))
        for tensor in found:
            # Buffers (masks, positions) may be integers; a matrix of them is somebody's quantisation.
            if tensor.name.endswith(".weight") and not tensor.floating:
                raise SourceError(
                    f"{self.id} stores the weight {tensor.name} as {tensor.dtype}, not as floating-point numbers.",
                    "Export the original, with --precision int8.",
                )
        return found

    def parameters(self) -> int:
        """Elements of all tensors. Raises as `tensors` does."""
        return sum(tensor.elements for tensor in self.tensors)

    @cached_property
    def stacked(self) -> tuple[Tensor, ...]:
        """Weights that no quantiser shrinks, for they are no matrices: a mixture's experts, however they are stored.

        transformers loads the experts of a layer as one tensor of three dimensions. Raises as `tensors` does.
        """
        return tuple(tensor for tensor in self.tensors if tensor.dims == 3 or ".experts." in tensor.name)

    @cached_property
    def sha256(self) -> str:
        """Hex digest over the weight files' bytes, in name order.

        Raises:
            SourceError: a file of the Hub's cache is not the one that the Hub has.
        """
        total = hashlib.sha256()
        for path in self.weights:
            digest = hashlib.sha256()
            try:
                with path.open("rb") as file:
                    while block := file.read(1 << 20):
                        total.update(block)
                        digest.update(block)
            except OSError as error:
                raise SourceError(f"{path} cannot be read: {error.strerror}.", DAMAGED) from error
            # The cache keeps a large file under its SHA-256 and links to it from the snapshot.
            expected = path.resolve().name
            if self.revision is not None and _SHA256.fullmatch(expected) and digest.hexdigest() != expected:
                raise SourceError(
                    f"The weight file {path.name} of {self.id} is not the Hub's: its SHA-256 is another.",
                    f"Remove {path.resolve()} and export again.",
                )
        return total.hexdigest()

    def _files(self, single: str, pattern: str) -> tuple[Path, ...]:
        index = self.path / f"{single}.index.json"
        if not index.exists():
            return tuple(sorted(self.path.glob(pattern)))
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise SourceError(f"{index.name} of {self.id} names no weight files.", DAMAGED)
        shards = sorted({str(name) for name in names.values()})
        for name in shards:
            if Path(name).name != name:
                raise SourceError(f"{index.name} of {self.id} names a file outside the folder: {name}.", DAMAGED)
            if not (self.path / name).is_file():
                raise SourceError(f"{self.id} lacks the weight file {name}.", DAMAGED)
        return tuple(self.path / name for name in shards)


def resolve(
    model: str,
    revision: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    trust: Trust | None = None,
    task: str = "auto",
    accept: Callable[[Source], None] = lambda source: None,
) -> Source:
    """The checkpoint named by a folder or a Hub id, checked by its configuration.

    ``accept`` may refuse it by its configuration too, before weights are fetched: it raises then.

    Raises:
        SourceError: no such folder or id, no network, weights or code not allowed, a configuration that cannot be read.
        UnsupportedModel: neither a causal language model nor an encoder that can be served as ``task``.
    """
    trust = trust or Trust()

    def check(path: Path, commit: str | None) -> Source:
        source = Source(model, path, commit, trust)
        check_config(source, task)
        accept(source)
        return source

    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise SourceError("--revision is for models from the Hub, but a local folder was given.", "Leave it out.")
        source = check(folder.resolve(), None)
    elif _looks_local(model) or not _HUB_ID.fullmatch(model):
        raise SourceError(f"There is no folder {model}.", _LOCAL_HINT)
    else:
        from export.hub import fetch

        folder = fetch(model, revision, check, say, pickle=trust.pickle, code=trust.code)
        source = check(folder, folder.name)
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
    causal = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family), *filter(_CAUSAL.search, architectures)}
    if architectures and causal.isdisjoint(architectures):
        raise UnsupportedModel(f"{source.id} is not a causal language model ({called}).", _KINDS)
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if not config.get("auto_map"):
            raise UnsupportedModel(
                f"{source.id} is of a kind that transformers cannot generate with ({family}).", _KINDS
            )
        if not source.trust.code:
            raise UnsupportedModel(
                f"{source.id} needs code of its own, which is not run here.",
                "Read its *.py files; if you trust them, give --trust-remote-code.",
            )
    if config.get("quantization_config"):
        raise UnsupportedModel(f"{source.id} is quantised already.", "Export the original, with --precision int8.")


_KINDS = "docs/models.md lists the text generation models that are exported, docs/encoders.md the encoders."


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
