"""The export of an encoder, straight down like a decoder's: load -> trace -> optimise -> quantise -> verify -> publish.

Served by the backend (the default) an export is one entry. Served natively it is two of the same graph: NAME tokenises
and answers, NAME--engine is the graph alone, run and batched by Triton's own backend. The engine is published first, so
whoever finds NAME finds its engine too.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import normalizers
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from export import kept, tensorrt
from export.convert import check_weights
from export.encoder import MASK, input_names, trace, with_head
from export.encoder_config import MAX_TEXTS, EncoderServing, encoder_pbtxt, engine_pbtxt
from export.encoder_source import CLASSIFICATION, SentenceSettings, head_files, sentence_settings
from export.encoder_verify import (
    EncoderReference,
    EncoderRuntime,
    lengths_to_check,
    most_pairs,
    run_reference,
    verify,
)
from export.errors import ExportError, SourceError, UnsupportedModel
from export.loading import load_model
from export.manifest import sha256, write_manifest
from export.optimize import drop_weights, optimize, save
from export.precision import check_device, serves_on
from export.probe import architecture
from export.quantize import quantize_int8
from export.reference import make_prompts
from export.repository import CONFIG, Repository, Staging, translated
from export.resources import available_memory, needs, number, release, require_memory, size, text_config
from export.source import Source
from export.tokenizer import SAMPLE, load_tokenizer, write_tokenizer
from export.unpadding import compute_live_tokens_only

if TYPE_CHECKING:
    from export.pipeline import Exported, ExportOptions, Progress

DEFAULT_MAX_LEN = 2048
PRECISIONS = ("fp32", "int8")


@dataclass(frozen=True)
class EncoderDraft:
    """What is known once the artefact is on disk. `skips_padding`: most of the graph computes live tokens only."""

    family: str
    names: tuple[str, ...]
    output: str
    width: int
    skips_padding: bool
    max_len: int
    pad: int
    settings: SentenceSettings
    classes: dict[str, Any]
    references: list[EncoderReference]


def export_encoder(
    source: Source, task: str, options: ExportOptions, repository: Repository, name: str, progress: Progress
) -> Exported:
    """Export and publish; see `export.pipeline.export_model`."""
    from export.pipeline import Exported

    precision = tensorrt.graph_precision(options.target, options.precision)
    check_weights(source, precision, instead="fp32")
    settings = sentence_settings(source) if task != CLASSIFICATION else SentenceSettings()
    tokenizer = load_tokenizer(source)
    longest = expected_length(source, tokenizer, settings, options.max_len)
    needed = needs(source, precision, longest, pairs=most_pairs(longest))
    progress("load", f"needs {size(needed.memory)} of memory and {size(needed.disk)} of disk")
    require_memory(needed.memory, available_memory())
    engine_name = f"{name}--engine" if options.serve_with == "native" else None
    serving, told = kept.encoder(
        repository.root, name, options.encoder_serving, options.given, engine_name is not None
    )
    with ExitStack() as stack:
        staging = stack.enter_context(repository.staging(name))
        engine = stack.enter_context(repository.staging(engine_name)) if engine_name else None
        repository.require_space(needed.disk)
        _ = source.sha256  # a wrong file is found before any work
        folder = (engine or staging).folder
        draft = build(source, task, options, settings, tokenizer, folder, staging.folder, progress)
        release()  # the model and its graph: the file is opened next
        progress("verify", 0.0)
        runtime = EncoderRuntime(folder / "model.onnx", draft.pad)
        parity = verify(runtime, draft.references, draft.output, precision, lambda done: progress("verify", done))
        parity["device"] = "cpu"
        if options.target == "tensorrt":
            parity["of"] = tensorrt.MEASURED
        built = build_engine(folder, draft, options, progress) if options.target == "tensorrt" else None
        progress("publish", 0.0)
        with translated(options.repository):
            describe(source, task, options, draft, staging, engine, parity, built, serving)
        if engine is not None:
            repository.publish(engine, lambda text: progress("publish", text))
        path = repository.publish(staging, lambda text: progress("publish", text))
    progress("publish", 1.0)
    notes = tuple(filter(None, (source.unused_code, told)))
    return Exported(name, str(staging.version), path, options.precision, parity, task, notes=notes)


def build(
    source: Source,
    task: str,
    options: ExportOptions,
    settings: SentenceSettings,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    front: Path,
    progress: Progress,
) -> EncoderDraft:
    """Load, trace, optimise and quantise; leaves the model in ``folder`` and the tokenizer in ``front``."""
    if settings.lower_case:
        lower_case(tokenizer)
    auto = AutoModelForSequenceClassification if task == CLASSIFICATION else AutoModel
    # The pooler of BERT and its like is no part of an embedding; checkpoints of other heads come without it.
    model = load_model(source, auto, unused="" if task == CLASSIFICATION else "pooler.")
    model.config.use_cache = False
    max_len = max_length(source, positions_of(model), tokenizer, settings, options.max_len)
    pad = pad_token(model, tokenizer)
    names = input_names(model, tokenizer.model_input_names)
    module = with_head(model, task, source, settings)
    progress("load", 0.3)
    references = run_reference(
        module, texts(model, tokenizer, max_len, pad), len(names), lambda done: progress("load", 0.3 + 0.7 * done)
    )
    progress("trace", 0.0)
    graph = trace(module, names, architecture(model))
    progress("optimise", 0.0)
    optimize(graph)
    # TensorRT plans a run by its shapes, and how many tokens are live is known within the run only.
    products = compute_live_tokens_only(graph, MASK) if options.target != "tensorrt" else 0
    if tensorrt.graph_precision(options.target, options.precision) == "int8":
        progress("quantise", 0.0)
        quantize_int8(graph)
    with translated(options.repository):
        save(graph, folder)
        drop_weights(graph)
        write_tokenizer(tokenizer, front / "tokenizer.json")
    return EncoderDraft(
        family=architecture(model),
        names=names,
        output=str(module.output),
        width=len(references[0].output),
        skips_padding=products > 0,
        max_len=max_len,
        pad=pad,
        settings=settings,
        classes=classes(model, module, len(references[0].output)) if task == CLASSIFICATION else {},
        references=references,
    )


def check_options(options: ExportOptions) -> None:
    """Raise `ExportError` for what encoders have not; needs no checkpoint."""
    template = ("chat_template",) if options.chat_template is not None else ()
    for key in (*template, *(key for key in options.given if key in kept.DECODER)):
        option = f"--{key.replace('_', '-')}"
        raise ExportError(f"{option} is for text generation models; this is an encoder.", "Leave it out.")
    decoders = (options.batch_invariant, options.int8_cache)
    if options.calibrate is not None or options.allow_drift is not None or any(decoders):
        raise ExportError(
            "--calibrate, --allow-drift, --batch-invariant and --kv-cache-dtype are for text generation models.",
            "Leave them out.",
        )
    if options.target == "tensorrt":
        if options.serve_with != "native":
            raise ExportError(
                "TensorRT runs an encoder's graph inside Triton itself.", "Give --serve-with native, or --target onnx."
            )
        if options.device == "cpu":
            raise ExportError("TensorRT runs on an NVIDIA GPU only.", "Leave --device out, or give --target onnx.")
        tensorrt.require_tensorrt()
    elif options.precision not in PRECISIONS:
        raise ExportError(
            f"Encoders have no {options.precision}.",
            f"Give --precision {' or '.join(PRECISIONS)}, or --target tensorrt --serve-with native for fp16.",
        )
    else:
        check_device(options.precision, options.device, slots=False)


def build_engine(folder: Path, draft: EncoderDraft, options: ExportOptions, progress: Progress) -> dict[str, str]:
    """Put a TensorRT engine in the place of the verified graph; returns what the manifest says of it."""
    progress("verify", "building the TensorRT engine")
    shapes = tensorrt.Shapes((1, 1), (16, min(32, draft.max_len)), (MAX_TEXTS, draft.max_len))
    built = tensorrt.build_plan(
        folder / "model.onnx",
        folder / "model.plan",
        dict.fromkeys(draft.names, shapes),
        fp16=options.precision == "fp16",
    )
    for path in folder.glob("model.onnx*"):
        path.unlink()
    return built


def describe(
    source: Source,
    task: str,
    options: ExportOptions,
    draft: EncoderDraft,
    staging: Staging,
    engine: Staging | None,
    parity: dict[str, Any],
    built: dict[str, str] | None,
    serving: EncoderServing,
) -> None:
    """Write manifest.json and config.pbtxt of the entry, and of its engine where it has one.

    ``serving`` is the entry's, ``options.encoder_serving`` the engine's.
    ``built`` is what is known of the TensorRT engine that takes the graph's place, None where there is none.
    """
    settings = draft.settings
    device = options.device if built is not None else serves_on(options.precision, options.device, slots=False)
    facts = {
        "task": task,
        "architecture": draft.family,
        "precision": options.precision,
        "target": options.target,
        "device": device,
        "source": {
            **source.manifest(),
            "modules": {str(path.relative_to(source.path)): sha256(path) for path in head_files(source, settings)},
        },
        "graph": {
            "inputs": list(draft.names),
            "output": draft.output,
            "width": draft.width,
            "max_len": draft.max_len,
            "skips_padding": draft.skips_padding,
        },
        "limits": {"max_len": draft.max_len},
        "parity": parity,
    }
    parameters = {
        "task": task,
        "max_len": str(draft.max_len),
        "precision": options.precision,
        "device": device,
        "threads": str(serving.threads),
        "max_tokens_per_batch": str(serving.max_tokens_per_batch),
    }
    if task == CLASSIFICATION:
        facts["classes"] = draft.classes
        parameters["labels"] = json.dumps(draft.classes["labels"], ensure_ascii=False)
        parameters["problem"] = draft.classes["problem"]
    else:
        head = ["normalize" if layer is None else f"dense {layer.activation}" for layer in settings.head]
        facts["embedding"] = {"pooling": list(settings.pooling), "head": head, "normalized": settings.normalized}
        parameters["dim"] = str(draft.width)
        parameters["normalized"] = str(settings.normalized).lower()
    front = {**facts, "tokens": {"pad": draft.pad}, "text": {"prompt": settings.prompt, "prompts": settings.prompts}}
    if engine is not None:
        named = {"name": engine.name, "version": str(engine.version), "graph_only": True}
        write_manifest(engine.folder, named | facts | ({} if built is None else tensorrt.manifest(built)))
        platform = "onnxruntime" if built is None else "tensorrt"
        own = options.encoder_serving
        config = engine_pbtxt(engine.name, platform, draft.names, draft.output, draft.width, own, device)
        (engine.model / CONFIG).write_text(config, encoding="utf-8")
        front["served_by"] = {
            "name": engine.name,
            "version": engine.version,
            "manifest_sha256": sha256(engine.folder / "manifest.json"),
        }
        parameters["engine"] = engine.name
    write_manifest(staging.folder, {"name": staging.name, "version": str(staging.version), **front})
    config = encoder_pbtxt(staging.name, task, draft.width, parameters, serving, native=engine is not None)
    (staging.model / CONFIG).write_text(config, encoding="utf-8")


def lower_case(tokenizer: PreTrainedTokenizerBase) -> None:
    """Lower-case texts first, as sentence-transformers does where a checkpoint's settings say so, in place."""
    backend = tokenizer.backend_tokenizer
    former = backend.normalizer
    parts = [former] if former is not None else []
    if isinstance(former, normalizers.Sequence):
        parts = [former[index] for index in range(len(former))]
    if not any(isinstance(part, normalizers.Lowercase) for part in parts):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *parts])


def expected_length(
    source: Source, tokenizer: PreTrainedTokenizerBase, settings: SentenceSettings, asked: int | None
) -> int:
    """`max_length` by the configuration alone, before weights are read; a few tokens more for RoBERTa and its kin."""
    positions = number(text_config(source), "max_position_embeddings") or None
    return max_length(source, positions, tokenizer, settings, min(asked, positions) if asked and positions else asked)


def max_length(
    source: Source,
    positions: int | None,
    tokenizer: PreTrainedTokenizerBase,
    settings: SentenceSettings,
    asked: int | None,
) -> int:
    """Tokens of the longest text: ``asked``, or what the checkpoint says up to 2048 unless it says so for sentences.

    ``positions``: what the model has, None where it has no limit.

    Raises:
        UnsupportedModel: ``asked`` is beyond the model's positions, or nothing says how long texts may be.
    """
    if asked is not None:
        if positions is not None and asked > positions:
            raise UnsupportedModel(
                f"--max-len {asked} is beyond the {positions} positions of {source.id}.", f"Give at most {positions}."
            )
        return asked
    stated = settings.max_tokens or min(int(tokenizer.model_max_length), DEFAULT_MAX_LEN)
    if positions is None and tokenizer.model_max_length > 1_000_000 and settings.max_tokens is None:
        raise UnsupportedModel(f"{source.id} does not say how long its texts may be.", "Give --max-len.")
    return min(stated, positions) if positions is not None else stated


def positions_of(model: PreTrainedModel) -> int | None:
    """Positions that a text can use. RoBERTa and its kin number theirs from behind the padding token's."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    for name, table in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return int(positions - table.padding_idx - 1)
    return positions


def pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills short rows: the model's, for some tell positions or the last token by it; else any."""
    for given in (model.config.get_text_config().pad_token_id, tokenizer.pad_token_id):
        if isinstance(given, int) and given >= 0:
            return given
    return 0


def texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_len: int, pad: int) -> list[tuple[int, ...]]:
    """Token ids to compare by: real and random ones of many lengths, and one text as the tokenizer frames it."""
    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    text = [token for token in tokenizer.encode(SAMPLE) if token < vocab_size and token != pad]
    other = next(token for token in range(vocab_size) if token != pad)
    made = make_prompts(lengths_to_check(max_len), vocab_size, text)
    framed = [tuple(text)] if len(text) <= max_len else []
    return [tuple(other if token == pad else token for token in ids) for ids in made] + framed


def classes(model: PreTrainedModel, module: nn.Module, width: int) -> dict[str, Any]:
    """Labels in the order of the logits, and how logits become scores.

    Raises:
        SourceError: the configuration names other labels than the head has outputs.
    """
    names = {int(index): str(label) for index, label in (model.config.id2label or {}).items()}
    if sorted(names) != list(range(width)):
        raise SourceError(
            f"config.json names {len(names)} labels (id2label), but the head has {width} outputs.",
            "Write one label for each output into config.json (id2label).",
        )
    kinds = {
        "regression": "regression",
        "single_label_classification": "single_label",
        "multi_label_classification": "multi_label",
    }
    problem = kinds.get(str(model.config.problem_type)) or ("regression" if width == 1 else "single_label")
    return {"labels": [names[index] for index in range(width)], "problem": problem}
