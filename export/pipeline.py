"""The export, straight down: load -> trace -> optimise -> quantise -> verify -> publish."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from export import encoder_pipeline, kept, tensorrt
from export.calibrate import read_text
from export.chat import chat_template
from export.convert import Converted, check_options, check_weights, convert
from export.decoder import cache_shapes, trace
from export.encoder_config import EncoderServing
from export.encoder_source import encoder_task
from export.loading import limit, load_model
from export.manifest import TASK, Serving, config_pbtxt, write_manifest
from export.optimize import drop_weights, optimize, save
from export.precision import INT4_DRIFT, TABLE, check_device, serves_on
from export.probe import architecture, probe
from export.reference import Reference, make_prompts, prompt_lengths, run_reference
from export.repository import CONFIG, Repository, Staging, check_name, translated
from export.resources import available_memory, needs, release, require_memory, size
from export.rewrites import prefill_chunk
from export.runtime import SlotRuntime
from export.source import Source, Trust, resolve
from export.tokenizer import SAMPLE, load_tokenizer, special_tokens, write_tokenizer
from export.verify import BATCH, exercise, verify

STAGES = ("load", "trace", "optimise", "quantise", "verify", "publish")
TEMPLATE = "chat_template.jinja"
STEPS = 8
VERIFIED_CHUNK = 128  # tokens that one run reads of a prompt at most while an artefact is verified

# Called with a stage of STAGES and a fraction of it (0.0 … 1.0) or a text about it.
Progress = Callable[[str, float | str], None]


@dataclass(frozen=True)
class ExportOptions:
    """What to export, how, and to where. ``max_len`` None: the model's positions, at most 2048.

    ``target`` tensorrt: a graph for ONNX Runtime's TensorRT provider, verified in fp32 on this machine; ``precision``
    is then the engine's.
    ``serving`` is for decoders, ``serve_with`` ("backend" | "native") and ``encoder_serving`` for encoders.
    ``device`` (auto, cpu, cuda) is what the entry is for, ``calibrate`` a text for int8 and int4, ``allow_drift`` the
    share of the logits' spread that int4 may move them by,
    ``batch_invariant`` has int8 scale each row by itself, ``int8_cache`` stores keys and values in int8. ``given``
    names those of ``serving`` and ``encoder_serving`` that were asked for and are not just the defaults.
    """

    model: str
    repository: Path
    name: str | None = None
    precision: str = "fp32"
    chat_template: Path | None = None
    max_len: int | None = None
    revision: str | None = None
    target: str = "onnx"
    device: str = "auto"
    calibrate: Path | None = None
    allow_drift: float | None = None
    batch_invariant: bool = False
    int8_cache: bool = False
    trust: Trust = field(default_factory=Trust)
    serving: Serving = field(default_factory=Serving)
    given: tuple[str, ...] = ()
    task: str = "auto"
    serve_with: str = "backend"
    encoder_serving: EncoderServing = field(default_factory=EncoderServing)


@dataclass(frozen=True)
class Exported:
    """A published version. ``path`` is its folder, ``parity`` the manifest's block of that name, ``notes`` what else
    the one who exports should know.
    """

    name: str
    version: str
    path: Path
    precision: str
    parity: dict[str, Any]
    task: str = TASK
    fp32_layers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {
            "name": self.name,
            "version": self.version,
            "path": str(self.path),
            "task": self.task,
            "precision": self.precision,
            "parity": self.parity,
            "fp32_layers": list(self.fp32_layers),
            "notes": list(self.notes),
        }


def export_model(options: ExportOptions, progress: Progress = lambda stage, state: None) -> Exported:
    """Export a checkpoint and publish it as the next version of its name.

    Raises:
        ExportError: anything that a person can mend; nothing has been published then.
    """
    name = check_name(options.name if options.name is not None else default_name(options.model))
    tensorrt.check_precision(options.target, options.precision)
    check_options(
        options.precision, options.calibrate, options.allow_drift, options.batch_invariant, options.int8_cache
    )
    check_task(options, None if options.task == TASK else options.task)
    progress("load", 0.0)
    repository = Repository(options.repository.expanduser().absolute())
    repository.require_writable()
    source = resolve(
        options.model,
        options.revision,
        lambda text: progress("load", text),
        options.trust,
        options.task,
        lambda found: check_task(options, encoder_task(found, options.task)),
    )
    task = encoder_task(source, options.task)
    if task is not None:
        return encoder_pipeline.export_encoder(source, task, options, repository, name, progress)
    precision = tensorrt.graph_precision(options.target, options.precision)
    device = verifies_on(options)
    max_len = limit(source, options.max_len)
    serving, told = kept.decoder(repository.root, name, options.serving, options.given)
    options = replace(options, serving=serving)
    check_weights(source, precision, instead="fp16")
    needed = needs(source, precision, max_len, options.calibrate is not None, int8_cache=options.int8_cache)
    progress("load", f"needs {size(needed.memory)} of memory and {size(needed.disk)} of disk")
    require_memory(needed.memory, available_memory())
    with repository.staging(name) as staging:
        repository.require_space(needed.disk)
        _ = source.sha256  # a wrong file is found before hours of work
        draft = build(source, options, max_len, staging, progress, device)
        release()  # the model and its graph: the file is opened next
        progress("verify", 0.0)
        runtime = SlotRuntime(staging.folder / "model.onnx", BATCH, device=device)
        parity = verify(
            runtime,
            draft.references,
            precision,
            draft.chunk,
            lambda done: progress("verify", done),
            options.allow_drift,
        )
        parity["device"] = device
        if options.target == "tensorrt":
            parity["of"] = tensorrt.MEASURED
        if precision == "int4":
            draft.conversion["quantization"]["allowed_drift"] = max(INT4_DRIFT, options.allow_drift or 0.0)
        progress("publish", 0.0)
        with translated(options.repository):
            describe(source, options, max_len, staging, draft, parity)
        path = repository.publish(staging, lambda text: progress("publish", text))
    progress("publish", 1.0)
    layers = tuple(draft.conversion.get("fp32_layers", ()))
    notes = tuple(filter(None, (source.unused_code, told)))
    return Exported(name, str(staging.version), path, options.precision, parity, fp32_layers=layers, notes=notes)


def check_task(options: ExportOptions, task: str | None) -> None:
    """Raise `ExportError` for options that the task has not. ``task``: an encoder's, None a decoder's, "auto" unknown.

    Needs no checkpoint: called before one is fetched, and again once its configuration has told the task.
    """
    if task == "auto" and options.precision in encoder_pipeline.PRECISIONS:
        if options.target == "onnx":
            check_device(options.precision, options.device, slots=False)  # what no task has
    elif task in (None, "auto"):
        verifies_on(options)
    else:
        encoder_pipeline.check_options(options)


def verifies_on(options: ExportOptions) -> str:
    """Where a decoder is verified here. TensorRT's graph is on the processor, whatever there is: it is all in fp32.

    Raises:
        DeviceError: ``device`` does not run ``precision``, or nothing here can verify it.
    """
    return "cpu" if options.target == "tensorrt" else check_device(options.precision, options.device)


@dataclass(frozen=True)
class Draft:
    """What is known once the artefact is on disk: the manifest's facts, and what to verify the artefact against."""

    family: str
    graph: dict[str, Any]
    tokens: dict[str, Any]
    chat: bool
    references: list[Reference]
    chunk: int
    conversion: dict[str, Any]
    serving: Serving


def build(
    source: Source, options: ExportOptions, max_len: int, staging: Staging, progress: Progress, device: str
) -> Draft:
    """Load, trace, optimise and quantise; leaves model, tokenizer and chat template in the staging folder."""
    tokenizer = load_tokenizer(source)
    model = load_model(source)
    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    calibration = None
    if options.calibrate is not None:
        calibration = read_text(options.calibrate, tokenizer.encode, vocab_size, max_len)
    layout = probe(model, max_len)
    tokens = special_tokens(source, tokenizer, vocab_size)
    template = chat_template(source, tokenizer, options.chat_template, tokens)
    progress("load", 0.3)
    serving = replace(options.serving, prefill_chunk=prefill_chunk(model, options.serving.prefill_chunk))
    # transformers speaks first, before its model is touched. The chunk is small enough that prompts take several.
    chunk = max(1, min(serving.prefill_chunk, VERIFIED_CHUNK, max_len // 4))
    steps = min(STEPS, max_len // 4)
    text = [token for token in tokenizer.encode(SAMPLE) if token < vocab_size]
    prompts = make_prompts(prompt_lengths(max_len, chunk, steps), vocab_size, text)
    references = run_reference(model, prompts, steps, lambda done: progress("load", 0.3 + 0.7 * done))
    progress("trace", 0.0)
    graph = trace(model, layout, max_len, standard_operators=options.target == "tensorrt")
    progress("optimise", 0.0)
    optimize(graph)
    converted, graph_precision = Converted(graph), tensorrt.graph_precision(options.target, options.precision)
    with translated(options.repository):
        if graph_precision != "fp32":
            progress("quantise", 0.0)
            converted = convert(
                graph,
                graph_precision,
                staging.folder,
                lambda runtime: exercise(runtime, references, chunk),
                device,
                calibration,
                options.batch_invariant,
                options.int8_cache,
                lambda state: progress("quantise", state),
            )
        save(converted.graph, staging.folder)
        drop_weights(converted.graph)
        drop_weights(graph)
        write_tokenizer(tokenizer, staging.folder / "tokenizer.json")
        if template is not None:
            (staging.folder / TEMPLATE).write_text(template, encoding="utf-8")
    facts: dict[str, Any] = {
        "layers": len(layout.layers),
        "kv_heads": layout.caches[0][0],
        "head_dim": layout.caches[0][1],
        "caches": cache_shapes(graph),
        "kv_dtype": "int8" if options.int8_cache else TABLE[graph_precision].kv_dtype,
        "vocab_size": references[0].logits.shape[1],
        "max_len": max_len,
    }
    chat = template is not None
    return Draft(architecture(model), facts, tokens.manifest(), chat, references, chunk, converted.facts, serving)


def describe(
    source: Source, options: ExportOptions, max_len: int, staging: Staging, draft: Draft, parity: dict[str, Any]
) -> None:
    """Write manifest.json and config.pbtxt into the staging folder."""
    # TensorRT runs fp32 too: the backend asks for its provider, whatever the slots are of.
    device = options.device if options.target == "tensorrt" else serves_on(options.precision, options.device)
    body = {
        "name": staging.name,
        "version": str(staging.version),
        "task": TASK,
        "architecture": draft.family,
        "target": options.target,
        "precision": options.precision,
        **(tensorrt.manifest() if options.target == "tensorrt" else {}),
        "device": device,
        **draft.conversion,
        "source": source.manifest(),
        "graph": draft.graph,
        "tokens": draft.tokens,
        "chat_template": TEMPLATE if draft.chat else None,
        "limits": {"max_len": max_len},
        "parity": parity,
    }
    write_manifest(staging.folder, body)
    config = config_pbtxt(staging.name, options.precision, max_len, draft.chat, draft.serving, device)
    (staging.model / CONFIG).write_text(config, encoding="utf-8")


def default_name(model: str) -> str:
    """A model name from a Hub id or a folder: its last part, with dashes for what a name cannot hold."""
    folder = Path(model).expanduser()
    last = folder.resolve().name if folder.is_dir() else model.rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last)
