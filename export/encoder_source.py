"""What an encoder checkpoint says about itself: its task, and how token states become one embedding.

Two layouts are known. ``*ForSequenceClassification`` in ``config.json`` is a classifier. ``modules.json`` is the layout
of sentence-transformers (https://sbert.net): a list of modules, here a Transformer, a Pooling and any number of Dense
and Normalize behind it. What such a checkpoint asks for and the graph cannot give is refused by name.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.errors import DAMAGED, ENCODERS, SourceError, UnsupportedModel
from export.source import Source, read_json

EMBEDDINGS = "embeddings"
CLASSIFICATION = "sentiment_analysis"
TASKS = ("text_generation", CLASSIFICATION, EMBEDDINGS)
POOLING = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")

# The older spelling of Pooling's config.json: one flag a mode, concatenated in this order.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")
_CLASSIFIER = re.compile(r"ForSequenceClassification$")
_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")
_ASK = "Give --task embeddings to export it with mean pooling, as sentence-transformers would run it."


@dataclass(frozen=True)
class Dense:
    """A linear layer behind the pooling; ``folder`` holds its weights, ``activation`` is a class of torch.nn."""

    folder: str
    activation: str


@dataclass(frozen=True)
class SentenceSettings:
    """How token states become an embedding, and what happens to a text before it is tokenised.

    ``pooling`` names one or more of `POOLING`, concatenated. ``head`` is what follows it, in order: a `Dense`, or None
    for normalisation to unit length. ``prompt`` is put in front of every text; ``prompts`` are the checkpoint's named
    ones, for clients to put there themselves. ``max_tokens`` None: the checkpoint does not say.
    """

    pooling: tuple[str, ...] = ("mean",)
    head: tuple[Dense | None, ...] = ()
    max_tokens: int | None = None
    lower_case: bool = False
    prompt: str = ""
    prompts: dict[str, str] = field(default_factory=dict)

    @property
    def normalized(self) -> bool:
        """Whether embeddings have unit length."""
        return bool(self.head) and self.head[-1] is None


def encoder_task(source: Source, asked: str = "auto") -> str | None:
    """The encoder task of a checkpoint by its configuration, None where it is not an encoder's.

    ``asked`` is "auto" or one of `TASKS`. Raises `UnsupportedModel` for an encoder that cannot be served as asked.
    """
    if asked == TASKS[0]:
        return None
    config = source.config
    architectures = [str(name) for name in config.get("architectures") or []]
    classifier = any(_CLASSIFIER.search(name) for name in architectures)
    sentences = (source.path / "modules.json").is_file()
    if asked == "auto":
        task = EMBEDDINGS if sentences else CLASSIFICATION if classifier else None
        if task is None:
            if _plain_encoder(config, architectures):
                called = architectures[0] if architectures else config["model_type"]
                raise UnsupportedModel(f"{source.id} is not a causal language model ({called}).", _ASK)
            return None
    else:
        task = asked
        if task == CLASSIFICATION and not classifier:
            raise UnsupportedModel(
                f"{source.id} has no classification head ({', '.join(architectures) or 'no architecture named'}).",
                "Give a checkpoint whose architecture ends in ForSequenceClassification.",
            )
    _require_carried(source, config, architectures, task)
    return task


def _plain_encoder(config: dict[str, Any], architectures: list[str]) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    causal = not architectures or any(_CAUSAL.search(name) for name in architectures)
    encoder = config.get("model_type") in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_encoder_decoder")
    return encoder and not causal


def _require_carried(source: Source, config: dict[str, Any], architectures: list[str], task: str) -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    family = str(config.get("model_type", "unknown"))
    known = MODEL_MAPPING_NAMES if task == EMBEDDINGS else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if config.get("is_encoder_decoder"):
        raise UnsupportedModel(f"{source.id} is a sequence-to-sequence model, not an encoder ({family}).", ENCODERS)
    if family not in known:
        if config.get("auto_map"):
            raise UnsupportedModel(
                f"{source.id} needs code of its own ({family}), which is not run for encoders, trusted or not.",
                "Export a checkpoint of a family that transformers has; docs/encoders.md lists those that are tested.",
            )
        raise UnsupportedModel(
            f"{source.id} is of a kind that transformers cannot encode texts with ({family}).", ENCODERS
        )
    if config.get("quantization_config"):
        raise UnsupportedModel(f"{source.id} is quantised already.", "Export the original, with --precision int8.")


def sentence_settings(source: Source) -> SentenceSettings:
    """The checkpoint's own settings; mean pooling without normalisation where it has no ``modules.json``.

    Raises:
        UnsupportedModel: a module, a pooling or an option that the graph cannot express, by name.
        SourceError: a settings file that cannot be read.
    """
    if not (source.path / "modules.json").is_file():
        return SentenceSettings()
    modules = _modules(source)
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise UnsupportedModel(
            f"{source.id} is not a transformer with a pooling behind it, but {', '.join(kinds) or 'nothing'}.",
            ENCODERS,
        )
    if modules[0][1]:
        raise UnsupportedModel(
            f"{source.id} keeps its transformer in the folder {modules[0][1]}.",
            "Save it again with a current sentence-transformers, which keeps it beside modules.json.",
        )
    transformer = _transformer_settings(source)
    limit = transformer.get("max_seq_length")
    prompts, prompt = _prompts(source)
    return SentenceSettings(
        pooling=_pooling(source, modules[1][1], bool(prompt)),
        head=tuple(_head(source, kind, folder) for kind, folder in modules[2:]),
        max_tokens=limit if isinstance(limit, int) and limit > 0 else None,
        lower_case=bool(transformer.get("do_lower_case")),
        prompt=prompt,
        prompts=prompts,
    )


def _modules(source: Source) -> list[tuple[str, str]]:
    path = source.path / "modules.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [(str(module["type"]).rsplit(".", 1)[-1], str(module.get("path") or "")) for module in found]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SourceError(f"{path} cannot be read: {error!r}.", DAMAGED) from error


def _transformer_settings(source: Source) -> dict[str, Any]:
    path = next(iter(sorted(source.path.glob("sentence_*_config.json"))), None)
    settings = read_json(path) if path is not None else {}
    task = settings.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise UnsupportedModel(f"{source.id} runs its transformer for {task}, not for feature-extraction.", ENCODERS)
    modality = settings.get("modality_config")
    if modality is not None:
        output = modality.get("text", {}).get("method_output_name") if isinstance(modality, dict) else None
        if output != "last_hidden_state":
            raise UnsupportedModel(
                f"{source.id} pools '{output}' of its transformer, not its last hidden state.", ENCODERS
            )
    return settings


def _pooling(source: Source, folder: str, prompted: bool) -> tuple[str, ...]:
    config = read_json(source.path / folder / "config.json")
    given = config.get("pooling_mode") or [mode for flag, mode in _FLAGS.items() if config.get(flag)] or "mean"
    modes = (given,) if isinstance(given, str) else tuple(str(mode) for mode in given)
    unknown = [mode for mode in modes if mode not in POOLING]
    if unknown:
        raise UnsupportedModel(f"{source.id} pools by '{unknown[0]}'; known: {', '.join(POOLING)}.", ENCODERS)
    if prompted and config.get("include_prompt") is False:
        raise UnsupportedModel(f"{source.id} leaves its prompt out of the pooling (include_prompt false).", ENCODERS)
    return modes


def _head(source: Source, kind: str, folder: str) -> Dense | None:
    config = source.path / folder / "config.json"
    settings = read_json(config) if config.is_file() else {}
    for key in ("module_input_name", "module_output_name"):
        if settings.get(key) not in (None, "sentence_embedding"):
            raise UnsupportedModel(
                f"{source.id}: {kind} works on '{settings[key]}', not on the sentence embedding.", ENCODERS
            )
    if kind == "Normalize":
        return None
    if kind != "Dense":
        raise UnsupportedModel(
            f"{source.id} has the module {kind}, which is not exported; known: Pooling, Dense, Normalize.",
            ENCODERS,
        )
    activation = str(settings.get("activation_function") or "torch.nn.modules.activation.Tanh")
    name = activation.rsplit(".", 1)[-1]
    if not activation.startswith("torch.nn.modules.") or name not in _ACTIVATIONS:
        raise UnsupportedModel(
            f"{source.id}: Dense uses {activation}; known: {', '.join(_ACTIVATIONS)} of torch.nn.", ENCODERS
        )
    if settings.get("use_residual"):
        raise UnsupportedModel(f"{source.id}: Dense has a residual connection (use_residual).", ENCODERS)
    if not (source.path / folder / "model.safetensors").is_file():
        raise SourceError(
            f"{source.id}: the module {folder} has no model.safetensors.",
            "Save it again with a current sentence-transformers: pickled weights could run code when opened.",
        )
    return Dense(folder, name)


def _prompts(source: Source) -> tuple[dict[str, str], str]:
    path = source.path / "config_sentence_transformers.json"
    settings = read_json(path) if path.is_file() else {}
    prompts = {str(name): str(text) for name, text in (settings.get("prompts") or {}).items()}
    default = settings.get("default_prompt_name")
    return prompts, prompts.get(default, "") if default else ""


def head_files(source: Source, settings: SentenceSettings) -> list[Path]:
    """The weight files of the modules behind the pooling, in order."""
    return [source.path / layer.folder / "model.safetensors" for layer in settings.head if layer is not None]
